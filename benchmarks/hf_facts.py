"""What a memory buys a pretrained model: facts found, running text predicted, tokens read and written in a second.

    python benchmarks/hf_facts.py --model DIRECTORY [--gguf FILE] --calibration a.txt --texts b.txt c.txt d.txt e.txt

`hf_texts.py` makes such texts of Debian packages; the committed figures are of other stretches of the same ones.

Forms of calibration are compared one after the other, each trained from the start for its share of the time that
`--seconds` for all of it leaves. After each the texts are read as documents with 64 facts each at even depths, of
sentences, names and places that the calibration has not seen, and are asked for them at each size: `facts` of 64
sentences, and `alike` of 8, each said of 8 places, so that the place alone decides. A question is asked as it is, and
behind a full stop (`behind_stop`). Running text is what follows a document: as it is read on, segment by segment
(`text`), and with the memory as it stood (`text_behind`), against the same segments without the memory. An entry for
each form and size goes into results/<machine>/hf.json at once, and `in-context`, with as much of a document before each
question as the model's positions allow. Last, with the form whose facts are best, a document of the largest size is
read from nothing, and a token is written, as in `bench_hf.py`.
"""

from __future__ import annotations

import argparse
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, environment, gpu_milliseconds, write_down
from hf_judge import KINDS, SEGMENTS, documents_of, in_context, judged, mean
from torch import Tensor

from memtrans.hf import ModelMemory, add_memory, calibrate, load_memory
from memtrans.hf.facts import Words
from memtrans.hf.opening import open_model

PART = 200_000  # characters


class Remembering:
    """A tokenizer that reads no text twice: each form is calibrated with the same ones."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.known = tokenizer, dict[str, list[int]]()

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        if text not in self.known:
            self.known[text] = list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        return {"input_ids": self.known[text]}

    def parts(self, text: str) -> list[str]:
        """Parts of a text at ends of paragraphs, read by all cores at once."""
        parts = [""]
        for paragraph in text.split("\n\n"):
            if len(parts[-1]) > PART:
                parts.append("")
            parts[-1] += paragraph + "\n\n"
        self.known.update(zip(parts, self.tokenizer(parts, add_special_tokens=False)["input_ids"], strict=True))
        return parts


class Clock:
    """How much time is left."""

    def __init__(self, seconds: float) -> None:
        self.end, self.begin = time.perf_counter() + seconds, time.perf_counter()

    @property
    def left(self) -> float:
        return self.end - time.perf_counter()

    def say(self, *said: object) -> None:
        print(f"[{time.perf_counter() - self.begin:5.1f} s]", *said, flush=True)


@contextmanager
def part_of(clock: Clock, name: str) -> Iterator[None]:
    """A part of the run; one that fails says so, and the next ones run."""
    try:
        yield
    except Exception:
        clock.say(name, "failed")
        traceback.print_exc()


class Bench:
    """The model, the texts, and what is done with them."""

    def __init__(self, options: argparse.Namespace, clock: Clock) -> None:
        self.options, self.clock = options, clock
        dtype = "bfloat16" if DEVICE == "cuda" else "float32"
        self.model, tokenizer = open_model(options.model, dtype, DEVICE, options.gguf)
        clock.say("model", "opened")
        self.tokenizer = Remembering(tokenizer)
        self.texts = [self.encode(path.read_text()) for path in options.texts]
        self.calibration = self.tokenizer.parts(options.calibration.read_text())
        self.labels = {"op": "hf", "impl": "memtrans", "mode": "forward", "dtype": dtype, **environment()}
        clock.say("texts of", [len(text) for text in self.texts], "tokens")

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    @contextmanager
    def memory(self, learned: Path | None = None, **changed: Any) -> Iterator[ModelMemory]:
        """One that has learned nothing, or what was saved; the model is without it afterwards, whatever happens."""
        options = self.options
        if learned is None:
            most = max(*options.sizes, *options.calibration_sizes)
            memory = add_memory(self.model, max_memories=most, segment=options.segment, keep_ids=False)
        else:
            memory = load_memory(self.model, learned, **changed)
        try:
            yield memory
        finally:
            memory.remove()

    def write(self, case: str, **figures: Any) -> None:
        write_down({**self.labels, "case": case, **figures})
        self.clock.say(case, {name: value for name, value in figures.items() if isinstance(value, int | float)})

    def measured(self, memory: ModelMemory, size: int, words: Words) -> dict[str, float]:
        together, segment = self.options.together, self.options.segment
        texts = [text for text in self.texts if len(text) >= size + SEGMENTS * segment]
        groups = [texts[at : at + together] for at in range(0, len(texts), together)]
        made = (documents_of(group, size, segment, self.encode, words) for group in groups)
        found = mean([judged(self.model, memory, documents, self.options.search, self.encode) for documents in made])
        return {**found, "documents": len(texts)}

    def judge(self, memory: ModelMemory, form: str, sizes: Sequence[int], **said: Any) -> float:
        """Facts and text at each size; the nats at the largest one."""
        nats = math.inf
        for size in sizes:
            for kind, words in KINDS.items():
                figures = self.measured(memory, size, words)
                self.write(f"{kind}-{size}-{form}", **figures, search=self.options.search, **said)
                nats = figures["nats"]
        return nats

    def in_context(self) -> None:
        with self.memory() as memory:
            for kind, words in KINDS.items():
                documents = documents_of(self.texts, self.options.context, self.options.segment, self.encode, words)
                self.write(f"{kind}-in-context", **in_context(self.model, memory, documents, self.encode))

    def otherwise(self, form: str) -> None:
        """What was learned, with other numbers of neighbours and a larger memory than it was learned with."""
        place, options = self.options.save / form, self.options
        for k in options.other_k:
            with self.memory(place, k=k) as memory:
                self.judge(memory, f"{form}-k{k}", options.sizes)
        if options.far:
            with self.memory(place, max_memories=max(options.far)) as memory:
                self.judge(memory, form, options.far)

    def calibrated(self, form: str, seconds: float) -> float:
        """Learns a form in so many seconds, judges and saves it."""
        options = self.options
        text = {"documents": self.calibration, "sizes": options.calibration_sizes, "report": self.clock.say}
        given = {name: getattr(options, name) for name in ("rate", "text_weight", "lesson_steps")}
        steps = {"steps": options.steps, "seconds": seconds}
        steps |= {name: value for name, value in given.items() if value is not None}
        with self.memory() as memory:
            begin = time.perf_counter()
            learned = calibrate(self.model, memory, self.tokenizer, form=form, **text, **steps)
            took = time.perf_counter() - begin
            self.clock.say(form, learned)
            memory.save(options.save / form)
            said = {"ms": took * 1e3, "training_s": min(took, seconds), "calibration": learned}
            return self.judge(memory, form, options.sizes, **said)

    @torch.no_grad()
    def timed(self, memory: ModelMemory, form: str) -> None:
        """Reading from nothing, and a token behind it."""
        from bench_hf import writing  # which pytest has to be there for

        size, segment = max(self.options.calibration_sizes), self.options.segment
        for documents in (len(self.texts), 1):
            ids = torch.tensor([text[:size] for text in self.texts[:documents]], device=DEVICE)
            for search in (True, False):
                memory.reset(documents)
                with memory.reading_again():
                    first, again = (self.read(memory, ids, search) for _ in range(2))
                case = f"reading-{size}-b{documents}-{form}" + ("" if search else "-no-search")
                rate = {"tokens_per_second": ids.numel() / again}
                self.write(case, ms=again * 1e3, **rate, first_ms=first * 1e3)  # the first one captures
        write = writing(self.model, segment)
        captured, eager = gpu_milliseconds(write, math.inf) if DEVICE == "cuda" else 2 * (timed_here(write),)
        self.write(f"token-{size}-{form}", ms=captured, eager_ms=eager)
        with memory.off():
            write = writing(self.model, segment)
            captured, eager = gpu_milliseconds(write, math.inf) if DEVICE == "cuda" else 2 * (timed_here(write),)
        self.write(f"token-off-{form}", ms=captured, eager_ms=eager)

    def read(self, memory: ModelMemory, ids: Tensor, search: bool) -> float:
        memory.clear_rows(torch.ones(len(ids), dtype=torch.bool, device=DEVICE))
        begin = time.perf_counter()
        memory.read(ids, search=search, progress=False)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin


def timed_here(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1e3


def asked_for() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--gguf", help="file of quantised weights in the directory")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate with")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="documents, of other text")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--calibration-sizes", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--forms", nargs="+", default=["mix", "gain", "offset"])
    parser.add_argument("--seconds", type=float, default=470.0, help="for all of it")
    parser.add_argument("--most", type=float, default=300.0, help="seconds of training of a form")
    parser.add_argument("--reserve", type=float, default=60.0, help="seconds kept for what is timed at the end")
    parser.add_argument("--judging", type=float, default=25.0, help="seconds kept for judging a form")
    parser.add_argument("--shares", type=float, nargs="+", default=[], help="of each form in the time; default: equal")
    parser.add_argument("--far", type=int, nargs="+", default=[], help="sizes beyond, judged with the best form")
    parser.add_argument("--other-k", type=int, nargs="+", default=[], help="neighbours, likewise")
    parser.add_argument("--rate", type=float, help="of the calibration; default: its own")
    parser.add_argument("--text-weight", type=float, help="likewise")
    parser.add_argument("--lesson-steps", type=int, help="likewise")
    parser.add_argument("--no-times", dest="times", action="store_false", help="leave out what is timed at the end")
    parser.add_argument("--steps", type=int, default=100000)
    parser.add_argument("--segment", type=int, default=512)
    parser.add_argument("--context", type=int, default=3500, help="tokens before a question")
    parser.add_argument("--together", type=int, default=4, help="documents that are read at once")
    parser.add_argument("--search", action="store_true", help="segments look at what was read before them")
    parser.add_argument("--untrained", action="store_true", help="also judge a memory that has learned nothing")
    parser.add_argument("--save", type=Path, required=True, help="directory for what was learned, by form")
    return parser.parse_args()


def main() -> None:
    options = asked_for()
    clock = Clock(options.seconds)
    bench = Bench(options, clock)
    if options.untrained:
        with part_of(clock, "untrained"), bench.memory() as memory:
            bench.judge(memory, "untrained", options.sizes)
    found: dict[str, float] = {}
    shares = options.shares or [1.0] * len(options.forms)
    for place, form in enumerate(options.forms):
        free = clock.left - options.reserve - options.judging * (len(options.forms) - place)
        seconds = free * shares[place] / sum(shares[place:])
        if seconds <= 0:
            clock.say("no time for", form)
            continue
        with part_of(clock, form):
            found[form] = bench.calibrated(form, min(seconds, options.most))
    for form in sorted(found, key=lambda form: found[form])[:1]:
        with part_of(clock, "otherwise"):
            bench.otherwise(form)
        if options.times:
            with part_of(clock, "times"), bench.memory(options.save / form) as memory:
                bench.timed(memory, form)
    if options.times:
        with part_of(clock, "untrained times"), bench.memory() as memory:
            bench.timed(memory, "untrained")
    with part_of(clock, "in context"):
        bench.in_context()
    clock.say("done")


if __name__ == "__main__":
    main()
