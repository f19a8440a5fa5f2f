"""Calibration: how each head is to ask a memory of which size and trust it, learned in minutes, and nothing else.

On running text a memory helps a little nearly everywhere; a fact is found by a part of the heads. So both are trained
on, at several sizes of the memory, with facts and text that are not seen twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from memtrans.checks import check_number
from memtrans.hf.lessons import SEGMENTS, Course, Lesson
from memtrans.hf.model_memory import ModelMemory
from memtrans.hf.planted import Questions
from memtrans_kernels import checks

SLOWER = {"memory_sharpness": 0.2, "memory_gain": 0.2, "memory_mix": 0.02}  # than offsets these are learned


def calibrate(
    model: nn.Module,
    memory: ModelMemory,
    tokenizer: Any,
    documents: Sequence[str],
    steps: int = 240,
    sizes: Sequence[int] | None = None,
    facts: int = 96,
    batch: int = 4,
    lessons: int = 8,
    rate: float = 0.15,
    text_weight: float = 4.0,
    seed: int = 0,
    report: Callable[[str], None] | None = None,
) -> dict[str, dict[str, float]]:
    """Trains how the heads of a memory ask it and trust it, on planted facts and on running text; see `LayerMemory`.

    The documents are taken as one text. A lesson reads pieces of it with made-up facts in them, without a search; each
    step asks for some of the facts and reads segments of what follows, with as much of the memory as one of the sizes.
    Every lesson has facts and pieces of its own. The memory is empty afterwards.

    Args:
        model: with the memory, in any mode. memory: of `add_memory`.
        tokenizer: the model's; called with a text and add_special_tokens=False.
        documents: texts, together longer than the largest size.
        steps: of Adam. sizes: numbers of entries to calibrate for. Default: those of 4,096, 16,384, 65,536 and 262,144
            that the memory has room for and the documents fill, or else what there is.
        facts: planted in a piece. batch: pieces that are read at once; each takes the memory of a document.
        lessons: how often the memory is filled anew; at most steps. rate: of Adam for offsets, falling to 0.
        text_weight: of a token's nats of text beside an answer's. seed: of pieces, facts and the order.
        report: called with a line of text now and then.

    Returns:
        For "before" and "after", and each size n: `facts_n` nats of an answer, `right_n` share of answers whose first
        token is the likeliest, `text_n` nats of a token of running text; and `text`, that without the memory. Of facts
        that were not trained on, and of the end of the text, which is kept for this where there is enough.

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
    >>> learned = calibrate(model, memory, Bytes(), ["word " * 200], steps=2, facts=4, batch=1)
    >>> sorted(learned["after"])
    ['facts_400', 'right_400', 'text', 'text_400']
    """
    check_number("rate", rate, above=0)
    check_number("text_weight", text_weight)
    steps, lessons = checks.integer("steps", steps, low=1), checks.integer("lessons", lessons, low=1)
    plan = Plan(steps, min(steps, lessons), float(rate), float(text_weight), seed)
    made, batch = checks.integer("facts", facts, low=1), checks.integer("batch", batch, low=1)
    course = Course.of(memory, tokenizer, documents, sizes, made, batch)
    judge = course.lesson(seed, len(course.ids) - course.tokens).to(model.device)  # type: ignore[arg-type]
    for layer in memory.layers.values():
        layer.learned.learn_to_ask()
    with _alone(model, memory):
        memory.reset(batch)
        try:
            before = _judged(model, memory, course, judge)
            _train(model, memory, course, plan, report)
            return {"before": before, "after": _judged(model, memory, course, judge)}
        finally:
            memory.reset()


@dataclass(frozen=True)
class Plan:
    """How it is trained; see `calibrate`."""

    steps: int
    lessons: int
    rate: float
    text_weight: float
    seed: int

    def optimizer(self, memory: ModelMemory) -> torch.optim.Adam:
        """Of offsets, and, slower, of what the memory is asked with: those numbers are factors and their logarithms."""
        groups: dict[float, list[nn.Parameter]] = {}
        for layer in memory.layers.values():
            for name, tensor in layer.learned.named_parameters():
                groups.setdefault(SLOWER.get(name, 1.0), []).append(tensor)
        return torch.optim.Adam(
            [{"params": tensors, "lr": slower * self.rate} for slower, tensors in groups.items()], betas=(0.9, 0.98)
        )


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


def _train(model: Any, memory: ModelMemory, course: Course, plan: Plan, report: Any) -> None:
    """Adam on the memory's parameters: at each step one size, some of its facts and some segments."""
    optimizer = plan.optimizer(memory)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / plan.steps)
    each = -(-plan.steps // plan.lessons)
    for step in range(plan.steps):
        if step % each == 0:
            lesson = course.lesson(plan.seed + 1 + step // each).to(model.device)
            fill(memory, lesson)
        size, place = course.sizes[step % len(course.sizes)], step // len(course.sizes)
        with memory.newest(size):
            nats = fact_losses(model, memory, lesson.asked(size, course.asked, place), course.batch)[0].mean()
            nats.backward()
            text = text_loss(model, lesson.behind[:, place % SEGMENTS])
            (plan.text_weight * text).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if report is not None and (step + 1) % 20 == 0:
            report(
                f"step {step + 1}/{plan.steps}: {size} entries, {float(nats.detach()):.2f} nats an answer, "
                f"{float(text.detach()):.3f} a token of text"
            )


@contextmanager
def _alone(model: nn.Module, memory: ModelMemory) -> Iterator[None]:
    """The model in `eval()` mode, and no parameter but the memory's asks for a gradient."""
    asked = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    training = [module for module in model.modules() if module.training]
    model.eval()
    for parameter in asked:
        parameter.requires_grad_(False)
    for parameter in memory.parameters():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, (wanted, gradient) in asked.items():
            parameter.requires_grad_(wanted)
            parameter.grad = gradient
        for module in training:
            module.training = True
