"""Calibration: how each head is to ask a memory of which size and trust it, and what it is told, learned in minutes.

On running text a memory helps a little nearly everywhere; a fact is found by a part of the heads. So both are trained
on, at several sizes of the memory, with facts and text that are not seen twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from memtrans.checks import check_number
from memtrans.cuda_graph import Replay
from memtrans.hf.facts import Words
from memtrans.hf.layer_memory import FORMS
from memtrans.hf.lessons import Course, Drawn, Lesson
from memtrans.hf.model_memory import ModelMemory
from memtrans.hf.planted import Questions
from memtrans.layers import evaluating
from memtrans_kernels import checks
from memtrans_kernels.backends import ATTENTION_MOST


class Pace(NamedTuple):
    """How fast a kind of parameter is learned, beside offsets, and how fast what does not help returns to nothing."""

    rate: float = 1.0
    decay: float = 0.0


PACES = {
    "memory_sharpness": Pace(0.2, 0.1),
    "memory_gain": Pace(0.2, 0.1),
    "memory_mix": Pace(0.01, 1.0),  # matrices have room to learn every name of a lesson by heart
    "memory_across": Pace(0.006, 1.0),
    "memory_value": Pace(0.03, 1.0),
    "memory_next": Pace(0.03, 1.0),
}
TEXT_EVERY = 4  # steps: it is learned sooner than facts are


def calibrate(
    model: nn.Module,
    memory: ModelMemory,
    tokenizer: Any,
    documents: Sequence[str],
    steps: int = 2000,
    sizes: Sequence[int] | None = None,
    facts: int | None = None,
    batch: int = 4,
    lesson_steps: int = 50,
    rate: float = 0.05,
    text_weight: float = 0.25,
    form: str | None = None,
    seconds: float = math.inf,
    seed: int = 0,
    report: Callable[[str], None] | None = None,
    words: Words | None = None,
) -> dict[str, dict[str, float]]:
    """Trains how heads ask a memory and trust it, and what it holds for them, on planted facts and on running text.

    The documents are taken as one text. A lesson reads pieces of it with made-up facts in them, without a search. Each
    step asks for some of the facts, half of them behind a full stop, and for how passages of the pieces go on; every
    fourth one also reads a segment of each piece again with what was read before it. Both see as much of the memory as
    one of the sizes. Every lesson has facts and pieces of its own. On a GPU a step replays a captured graph. The memory
    is empty afterwards.

    Args:
        model: with the memory, in any mode. memory: of `add_memory`.
        tokenizer: the model's; called with a text and add_special_tokens=False.
        documents: texts, together longer than the largest size.
        steps: of AdamW. sizes: numbers of entries to calibrate for. Default: those of 4,096, 16,384, 65,536 and 262,144
            that the memory has room for and the documents fill, or else what there is.
        facts: planted in a piece, equally many for each size, and for none more than fill half of the smallest size.
            Default: 256, or as many as words have places for.
        batch: pieces that are read at once; each takes the memory of a document, and is asked 32 questions a step.
        lesson_steps: after how many the memory is filled anew. rate: of AdamW for offsets, falling to 0.
        text_weight: of a token's nats of text beside an answer's, on average over steps.
        form: what is learned, one of `offset`, `gain`, `mix`, `across`, `value` and `next`; see `LayerMemory`. With
            `next` the values that the memory holds take twice the room meanwhile. Default: `next`, or `value` where
            values are wider than 128: two of them, side by side, have no kernel.
        seconds: of training, after which it ends: the rate falls with both.
        seed: of pieces, facts and the order.
        report: called with a line of text after each lesson.
        words: what facts are of, for a model of another language or texts of another kind. Default: `Words()`.

    Returns:
        For "before" and "after", and each size n: `facts_n` nats of an answer, `right_n` share of answers whose first
        token is the likeliest, `text_n` nats of a token of running text; and `text`, that without the memory. Of facts
        that were not trained on, and of the end of the text, which is kept for this where there is enough. And `steps`,
        those that there was time for, of "after".

    Raises:
        ValueError, TypeError: too little text for the sizes, a size beyond the memory's, a number out of range, words
            of fewer places than facts of a piece, a model that the memory is not of.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from memtrans.hf import add_memory
    >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=64, **sizes)).eval()
    >>> memory = add_memory(model, max_memories=400, segment=32)
    >>> class Bytes:
    ...     def __call__(self, text, add_special_tokens):
    ...         return {"input_ids": list(text.encode())}
    >>> learned = calibrate(model, memory, Bytes(), ["word " * 200], steps=2, facts=4, batch=1)
    >>> sorted(learned["after"])
    ['facts_400', 'right_400', 'steps', 'text', 'text_400']
    """
    if form is None:
        form = _best_form(memory)
    if form not in tuple(FORMS):
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if all(module is not memory.decoder for module in model.modules()):
        raise ValueError(f"model must be the one that the memory is of, got another {type(model).__name__}")
    plan = Plan.of(steps, lesson_steps, rate, text_weight, seed, seconds)
    made = None if facts is None else checks.integer("facts", facts, low=1)
    batch = checks.integer("batch", batch, low=1)
    course = Course.of(memory, tokenizer, documents, sizes, made, batch, words)
    judge = course.lesson(plan.seed, len(course.ids) - course.tokens).to(model.device)  # type: ignore[arg-type]
    with memory.learning(form), _alone(model, memory), memory.reading_again():
        try:
            memory.reset(batch)
            before = _judged(model, memory, course, judge)
            done = _train(model, memory, course, plan, report)
            return {"before": before, "after": {**_judged(model, memory, course, judge), "steps": float(done)}}
        finally:
            memory.reset()


def _best_form(memory: ModelMemory) -> str:
    """See `calibrate`."""
    return "next" if 2 * max(layer.value_width for layer in memory.layers.values()) <= ATTENTION_MOST else "value"


@dataclass(frozen=True)
class Plan:
    """How it is trained; see `calibrate`."""

    steps: int
    each: int
    rate: float
    text_weight: float
    seed: int
    seconds: float = math.inf

    @staticmethod
    def of(steps: int, each: int, rate: float, text_weight: float, seed: int, seconds: float) -> Plan:
        """Raises ValueError or TypeError for a number out of range."""
        check_number("rate", rate, above=0)
        check_number("text_weight", text_weight)
        if text_weight < 0:
            raise ValueError(f"text_weight must be at least 0, got {text_weight!r}")
        if seconds != math.inf:
            check_number("seconds", seconds, above=0)
        steps, each = checks.integer("steps", steps, low=1), checks.integer("lesson_steps", each, low=1)
        seed = checks.integer("seed", seed)
        return Plan(steps, min(steps, each), float(rate), float(text_weight), seed, float(seconds))

    def passed(self, steps: int, seconds: float) -> float:
        """The share of the calibration that is over after so many steps and seconds."""
        return min(1.0, max(steps / self.steps, seconds / self.seconds))

    def optimizer(self, memory: ModelMemory) -> torch.optim.Optimizer:
        """Of offsets, and, slower, of what the memory is asked with: those numbers are factors and their logarithms.

        Its rates are on the device, and a captured graph can hold it.
        """
        kinds: dict[str, list[nn.Parameter]] = {}
        for layer in memory.layers.values():
            for name, tensor in layer.learned.named_parameters():
                kinds.setdefault(name, []).append(tensor)
        groups = []
        for name, tensors in kinds.items():
            pace = PACES.get(name, Pace())
            highest = pace.rate * self.rate
            rate = torch.tensor(highest, device=tensors[0].device)
            groups.append({"params": tensors, "lr": rate, "highest": highest, "weight_decay": pace.decay})
        on_gpu = memory.parameters()[0].is_cuda
        return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True, capturable=on_gpu)


@torch.no_grad()
def _judged(model: Any, memory: ModelMemory, course: Course, lesson: Lesson) -> dict[str, float]:
    """See `calibrate`."""
    fill(memory, lesson)
    texts = lesson.behind.unbind(1)
    found: dict[str, float] = {}
    with memory.off():
        found["text"] = float(torch.stack([text_loss(model, text) for text in texts]).mean())
    for size in course.sizes:
        with memory.newest(size):
            losses = torch.stack([text_loss(model, text) for text in texts])
            asked = [lesson.asked(size, course.asked, place) for place in range(lesson.rounds(size, course.asked))]
            answers = [fact_losses(model, memory, rows, len(lesson.ids)) for rows in asked]
        nats, right = (torch.cat(part).float().mean() for part in zip(*answers, strict=True))
        found.update(
            {f"facts_{size}": float(nats), f"right_{size}": float(right), f"text_{size}": float(losses.mean())}
        )
    return found


def fill(memory: ModelMemory, lesson: Lesson) -> None:
    """The memory holds the lesson's documents and nothing else; its tensors stay where they are."""
    memory.clear_rows(torch.ones(len(lesson.ids), dtype=torch.bool, device=lesson.ids.device))
    memory.read(lesson.ids, search=False, progress=False)


def text_loss(model: Any, ids: Tensor) -> Tensor:
    """Nats of a token of segments (B, N)."""
    logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def fact_losses(model: Any, memory: ModelMemory, asked: Questions, documents: int) -> tuple[Tensor, Tensor]:
    """Nats of each answer, and whether it comes first; equally many questions of each document."""
    with memory.expand(len(asked.ids) // documents):
        return asked.losses(model(input_ids=asked.ids, use_cache=False).logits)


def _train(model: Any, memory: ModelMemory, course: Course, plan: Plan, report: Any) -> int:
    """AdamW on the memory's parameters, a lesson after the other; how many steps there was time for."""
    step, done, begin = Step(model, memory, course, plan), 0, time.perf_counter()
    with ThreadPoolExecutor(1) as aside:  # the host makes a lesson while the device learns from the one before
        coming = aside.submit(course.lesson, plan.seed + 1)
        for number in range(-(-plan.steps // plan.each)):
            lesson = coming.result().to(model.device)
            coming = aside.submit(course.lesson, plan.seed + 2 + number)
            fill(memory, lesson)
            step.take_up(lesson, lesson.draw(plan.each, course.asked, course.sizes, plan.seed + number))
            first = done
            while done < min(first + plan.each, plan.steps) and plan.passed(done, time.perf_counter() - begin) < 1.0:
                step.run(1.0 - plan.passed(done, time.perf_counter() - begin))
                done += 1
            if report is not None:
                nats, text = step.seen_on_average()
                of_text = "" if text is None else f", {text:.3f} a token of text"
                report(f"step {done}/{plan.steps}: {nats:.2f} nats an answer{of_text}")
            if plan.passed(done, time.perf_counter() - begin) >= 1.0:
                break
    step.release()
    return done


class Step:
    """A step of a calibration: some facts, now and then a segment of each document, and AdamW.

    It works on buffers that stay where they are and never asks for a value, so that a GPU replays it as one graph, or
    one of two.

    Attributes:
        seen: (2,), nats of an answer and of a token of text, the sums over the steps since `take_up`.
    """

    def __init__(self, model: Any, memory: ModelMemory, course: Course, plan: Plan) -> None:
        self.model, self.memory, self.course, self.plan = model, memory, course, plan
        self.seen = torch.zeros(2, device=model.device)
        self.optimizer = plan.optimizer(memory)
        self.at = torch.zeros(1, dtype=torch.int64, device=model.device)
        self.bank: Questions | None = None
        self.replays = [Replay(partial(self._step, reads), model.device) for reads in (False, True)]
        self.done, self.counts = 0, [0, 0]

    def take_up(self, lesson: Lesson, drawn: Drawn) -> None:
        """Puts what the next steps are about into the buffers."""
        new = (*(lesson.bank.ids, lesson.bank.answers, lesson.segments), *drawn)
        if self.bank is None:
            self.bank = Questions(lesson.bank.ids.clone(), lesson.bank.answers.clone())
            self.segments = lesson.segments.clone()
            self.drawn = Drawn(*(tensor.to(self.seen.device) for tensor in drawn))
        for mine, its in zip((self.bank.ids, self.bank.answers, self.segments, *self.drawn), new, strict=True):
            mine.copy_(its)
        self.at.zero_()
        self.seen.zero_()
        self.counts = [0, 0]

    def run(self, rate: float) -> None:
        """One step; rate: the share of the highest rate."""
        for group in self.optimizer.param_groups:
            group["lr"].fill_(rate * group["highest"])
        reads = self.done % TEXT_EVERY == 0
        self.replays[reads]()
        self.done += 1
        self.counts[0] += 1
        self.counts[1] += reads

    def seen_on_average(self) -> tuple[float, float | None]:
        """Nats of an answer and of a token of text, since `take_up`; None where no text was read."""
        asked, read = self.counts
        nats, text = self.seen.tolist()
        return nats / max(1, asked), text / read if read else None

    def release(self) -> None:
        """Lets captured graphs go."""
        for replay in self.replays:
            replay.release()

    def _step(self, reads: bool) -> None:
        assert self.bank is not None
        rows, place, size, behind = (tensor[self.at] for tensor in self.drawn)
        with self.memory.newest(size[0]):
            nats = fact_losses(self.model, self.memory, self.bank.rows(rows[0]), self.course.batch)[0].mean()
        nats.backward()
        self.seen[0] += nats.detach()
        if reads:
            with self.memory.newest(size[0], behind[0]):
                text = text_loss(self.model, self.segments.index_select(1, place)[:, 0])
            (TEXT_EVERY * self.plan.text_weight * text).backward()
            self.seen[1] += text.detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.at += 1


@contextmanager
def _alone(model: nn.Module, memory: ModelMemory) -> Iterator[None]:
    """The model in `eval()` mode, and no parameter but the memory's asks for a gradient."""
    asked = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    for parameter in asked:
        parameter.requires_grad_(False)
    for parameter in memory.parameters():
        parameter.requires_grad_(True)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter, (wanted, gradient) in asked.items():
            parameter.requires_grad_(wanted)
            parameter.grad = gradient
