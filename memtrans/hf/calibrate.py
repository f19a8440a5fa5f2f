"""Calibration: how much each head is to trust a memory of which size, learned in minutes, and nothing else.

On running text a memory helps a little nearly everywhere; a fact is found by a part of the heads. So both are trained
on, in one document, at several sizes of its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from memtrans.hf.facts import facts as made_facts
from memtrans.hf.model_memory import ModelMemory
from memtrans.hf.planted import Planted, plant, questions
from memtrans_kernels import checks

SIZES = (4096, 16384, 65536, 262144)
ASKED = 32  # questions of a step
TEXTS = 64  # segments of running text behind the document: half to train on, half to report
ROWS = 4  # of them in a step
FEWEST = 8  # segments, in a short document
TEXT = 1.0  # weight of a token's nats of text beside an answer's
OFFSETS, ASKING = ("memory_offset", "memory_slope"), 0.2  # and how much slower the others are learned


def calibrate(
    model: nn.Module,
    memory: ModelMemory,
    tokenizer: Any,
    documents: Sequence[str],
    steps: int = 120,
    sizes: Sequence[int] | None = None,
    facts: int = 256,
    search: bool = False,
    rate: float = 0.15,
    seed: int = 0,
    report: Callable[[str], None] | None = None,
) -> dict[str, dict[str, float]]:
    """Trains the offsets and slopes of a memory's heads on planted facts and on running text.

    The documents are read as one, with made-up facts in it; each step asks for some and reads a segment of what
    follows, with as much of the memory as one of the sizes. The memory is empty afterwards.

    Args:
        model: with the memory, in any mode. memory: of `add_memory`.
        tokenizer: the model's; called with a text and add_special_tokens=False.
        documents: texts, together longer than the largest size.
        steps: of Adam. sizes: numbers of entries to calibrate for. Default: those of 4,096, 16,384, 65,536 and
            262,144 that the memory has room for and the documents fill, or else what there is.
        facts: planted, a quarter of them to report. search: as in `ModelMemory.read`; the document is then read a
            second time half way, with what was learned by then. rate: of Adam, falling to 0. seed: of the facts and
            the order.
        report: called with a line of text now and then.

    Returns:
        For "before" and "after", and each size n: `facts_n` nats of an answer, `right_n` share of answers whose first
        token is the likeliest, `text_n` nats of a token of running text; and `text`, that without the memory. Of facts
        and text that were not trained on.

    Raises:
        ValueError, TypeError: too little text for the sizes, a size beyond the memory's, a number out of range.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from memtrans.hf import add_memory
    >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=64, **sizes)).eval()
    >>> memory = add_memory(model, max_memories=400, segment=32)
    >>> class Bytes:
    ...     def __call__(self, text, add_special_tokens):
    ...         return {"input_ids": list(text.encode())}
    >>> learned = calibrate(model, memory, Bytes(), ["word " * 200], steps=2, facts=4)
    >>> sorted(learned["after"])
    ['facts_400', 'right_400', 'text', 'text_400']
    """
    steps, facts = checks.integer("steps", steps, low=1), checks.integer("facts", facts, low=4)
    course = _Course.of(memory, tokenizer, documents, sizes, facts, seed)
    with _alone(model, memory):
        try:
            course.read(model, memory, search)
            before = course.judged(model, memory)
            _train(model, memory, course, Plan(steps, rate, seed, search), report)
            return {"before": before, "after": course.judged(model, memory)}
        finally:
            memory.reset()


@dataclass(frozen=True)
class _Course:
    """What is learned from: a document, facts in it for each size, and segments (T, N) that follow it."""

    document: Planted
    sizes: tuple[int, ...]
    segments: Tensor
    encode: Callable[[str], list[int]]

    @staticmethod
    def of(
        memory: ModelMemory,
        tokenizer: Any,
        documents: Sequence[str],
        sizes: Sequence[int] | None,
        count: int,
        seed: int,
    ) -> _Course:
        def encode(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        ids = [token for document in documents for token in encode(document)]
        length = min(memory.settings.segment, len(ids) // 4 // FEWEST)
        if length < 2:
            raise ValueError(f"documents must have at least {8 * FEWEST} tokens, got {len(ids)}")
        number = min(TEXTS, len(ids) // 4 // length)
        text, rest = ids[: len(ids) - number * length], ids[len(ids) - number * length :]
        segments = torch.tensor(rest, dtype=torch.int64).unflatten(0, (number, length))
        chosen = _sizes(sizes, len(text), memory.settings.max_memories)
        return _Course(plant(text, made_facts(count, seed), chosen, encode), chosen, segments, encode)

    def read(self, model: Any, memory: ModelMemory, search: bool) -> None:
        """Fills the memory anew."""
        memory.reset()
        memory.read(self.document.ids.to(model.device), search=search, progress=False)

    def asked(self, size: int, reported: bool) -> list[Any]:
        """The facts within a size that are trained on, or those that are reported: every fourth."""
        within = self.document.within(size)
        return within[::4] if reported else [fact for place, fact in enumerate(within) if place % 4]

    @torch.no_grad()
    def judged(self, model: Any, memory: ModelMemory) -> dict[str, float]:
        """See `calibrate`."""
        texts = self.segments[1::2].to(model.device).split(ROWS)
        found: dict[str, float] = {}
        with memory.off():
            found["text"] = float(torch.stack([text_loss(model, text) for text in texts]).mean())
        for size in self.sizes:
            losses = torch.stack([text_losses(model, memory, text, size) for text in texts])
            nats, right = fact_losses(model, memory, self.asked(size, True), self.encode, size)
            found[f"facts_{size}"], found[f"right_{size}"] = float(nats.mean()), float(right.float().mean())
            found[f"text_{size}"] = float(losses.mean())
        return found


def _sizes(asked: Sequence[int] | None, tokens: int, most: int) -> tuple[int, ...]:
    if asked is None:
        fitting = tuple(size for size in SIZES if size <= min(tokens, most))
        return fitting or (min(tokens, most),)
    sizes = tuple(sorted(checks.integer("sizes", size, low=1) for size in asked))
    if not sizes or sizes[-1] > min(tokens, most):
        raise ValueError(
            f"sizes must be numbers of entries up to max_memories={most} and the {tokens} tokens of the documents, "
            f"got {list(sizes)}"
        )
    return sizes


def text_loss(model: Any, ids: Tensor) -> Tensor:
    """Nats of a token of segments (B, N)."""
    logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def text_losses(model: Any, memory: ModelMemory, ids: Tensor, size: int) -> Tensor:
    """The same behind the newest so many entries of the one document."""
    with memory.newest(size), memory.expand(len(ids)):
        return text_loss(model, ids)


def fact_losses(
    model: Any, memory: ModelMemory, facts: Sequence[Any], encode: Callable[[str], list[int]], size: int
) -> tuple[Tensor, Tensor]:
    """Nats of each fact's answer, with the newest so many entries of the one document, and whether it comes first."""
    asked = questions(facts, encode).to(model.device)
    with memory.newest(size), memory.expand(len(facts)):
        return asked.losses(model(input_ids=asked.ids, use_cache=False).logits)


@dataclass(frozen=True)
class Plan:
    """How it is trained; see `calibrate`."""

    steps: int
    rate: float
    seed: int
    search: bool

    def optimizer(self, memory: ModelMemory) -> torch.optim.Adam:
        """Of offsets, and, slower, of what the memory is asked with: those numbers are logarithms of factors."""
        named = [pair for layer in memory.layers.values() for pair in layer.learned.named_parameters()]
        offsets = [tensor for name, tensor in named if name in OFFSETS]
        asking = [tensor for name, tensor in named if name not in OFFSETS]
        groups = [{"params": offsets, "lr": self.rate}, {"params": asking, "lr": ASKING * self.rate}]
        return torch.optim.Adam(groups, betas=(0.9, 0.98))


def _train(model: Any, memory: ModelMemory, course: _Course, plan: Plan, report: Any) -> None:
    """Adam on the memory's parameters: at each step one size, some of its facts and some segments."""
    draw = torch.Generator("cpu").manual_seed(plan.seed)
    optimizer = plan.optimizer(memory)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / plan.steps)
    texts = course.segments[::2].to(model.device).split(ROWS)
    for step in range(plan.steps):
        if plan.search and step == plan.steps // 2 > 0:
            course.read(model, memory, True)
        size = course.sizes[step % len(course.sizes)]
        known = course.asked(size, False)
        chosen = torch.randperm(len(known), generator=draw, device="cpu")[:ASKED].tolist()
        nats, _ = fact_losses(model, memory, [known[index] for index in chosen], course.encode, size)
        nats.mean().backward()
        text = text_losses(model, memory, texts[step // len(course.sizes) % len(texts)], size)
        (TEXT * text).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if report is not None and (step + 1) % 20 == 0:
            report(
                f"step {step + 1}/{plan.steps}: {size} entries, {float(nats.detach().mean()):.2f} nats an answer, "
                f"{float(text.detach()):.3f} a token of text"
            )


@contextmanager
def _alone(model: nn.Module, memory: ModelMemory) -> Iterator[None]:
    """The model in `eval()` mode, and no parameter but the memory's asks for a gradient."""
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training = [module for module in model.modules() if module.training]
    model.eval()
    for parameter in asked:
        parameter.requires_grad_(False)
    for parameter in memory.parameters():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, wanted in asked.items():
            parameter.requires_grad_(wanted)
        for module in training:
            module.training = True
