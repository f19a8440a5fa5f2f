"""What is made of values before they are stored: the same in a calibration's lessons as when they are written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.byte_tokenizers import bytes_tokenizer
from helpers.checks import PARITY, assert_close
from helpers.hf_families import made, tokens
from torch import Tensor

from memtrans.hf import ModelMemory, add_memory, calibrate, load_memory, memory_of
from memtrans.hf.calibrate import PACES
from memtrans.hf.entries import bytes_per_document
from memtrans.hf.layer_memory import LayerMemory, spoken

SIZES: dict[str, Any] = {"max_memories": 100, "k": 8, "segment": 16}
QUESTION = tokens(length=6, seed=2)
OF_VALUES = ("memory_value", "memory_next")


def values_of(memory: ModelMemory) -> list[torch.nn.Parameter]:
    """What is learned of values, in all layers."""
    named = (named for layer in memory.layers.values() for named in layer.learned.named_parameters())
    return [parameter for name, parameter in named if name in OF_VALUES]


def learn(memory: ModelMemory, form: str, scale: float = 0.3) -> None:
    """Gives a memory a form, with random numbers on what is said."""
    torch.manual_seed(1)
    for layer in memory.layers.values():
        layer.learned.learn_to_ask(form)
    for parameter in values_of(memory):
        parameter.data.normal_(std=scale)


def held(memory: ModelMemory, layer: int) -> Tensor:
    """The values of a layer (B, G, entries, E), old to new."""
    assert memory._entries is not None
    entries = memory._entries.memories[layer].entries().values
    return entries if entries.dim() == 4 else entries[:, None]


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(QUESTION).logits
    return logits


def lesson_and_written(
    model: Any, memory: ModelMemory, form: str, ids: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits behind documents that were read as in a lesson, and as they are read otherwise."""
    found = []
    for in_lesson in (True, False):
        memory.reset()
        if in_lesson:
            with memory.learning(form):
                memory.read(ids, mask, search=False, progress=False)
                found.append(logits_of(model))
                memory.reset()
        else:
            memory.read(ids, mask, search=False, progress=False)
            found.append(logits_of(model))
    return found[0], found[1]


@pytest.mark.parametrize("form", ["value", "next"])
@pytest.mark.parametrize("combine", ["softmax", "gate"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "deepseek_v3", "gpt_oss"])
def test_a_lesson_sees_what_writing_with_the_same_numbers_would_store(family: str, combine: str, form: str) -> None:
    model = made(family)
    memory = add_memory(model, **SIZES, combine=combine)
    ids = tokens(length=40)
    memory.read(ids, search=False, progress=False)
    plain = logits_of(model)
    learn(memory, form)
    lesson, written = lesson_and_written(model, memory, form, ids)
    assert_close(lesson, written, PARITY, "logits")
    assert not torch.allclose(written, plain, atol=1e-2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_the_end_of_a_segment_have_nothing_behind_them(side: str) -> None:
    model = made("llama")
    memory, ids, mask = add_memory(model, **SIZES), tokens(length=40), torch.ones(2, 40, dtype=torch.int64)
    mask[1, slice(None, 7) if side == "left" else slice(-7, None)] = 0
    memory.read(ids, mask, search=False, progress=False)
    plain = held(memory, 1)
    learn(memory, "next")
    for layer in memory.layers.values():
        assert layer.learned.memory_value is not None and layer.learned.memory_next is not None
        layer.learned.memory_value.data.zero_()
        layer.learned.memory_next.data.copy_(torch.eye(8))
    lesson, written = lesson_and_written(model, memory, "next", ids, mask)
    assert_close(lesson, written, PARITY, "logits")
    added = held(memory, 1) - plain
    wanted = torch.cat((plain[:, :, 1:], torch.zeros_like(plain[:, :, :1])), 2)
    for row, lengths in ((0, (15, 15, 7)), (1, (15, 15, 1))):
        wanted[row, :, sum(lengths) - 1 :] = 0.0
        wanted[row, :, [lengths[0] - 1, lengths[0] + lengths[1] - 1]] = 0.0
    assert_close(added, wanted, PARITY, "what was added")


def test_what_writes_with_gradients_stores_the_same_without_one() -> None:
    model = made("llama").train()
    memory = add_memory(model, **SIZES, keep_ids=False)
    learn(memory, "next")
    memory.read(tokens(length=16), search=False, progress=False)
    wanted = held(memory, 1)
    memory.reset()
    with memory.writing():
        model(tokens(length=16)).logits.sum().backward()
    assert_close(held(memory, 1), wanted, PARITY, "values")
    assert all(parameter.grad is None for parameter in values_of(memory))


@pytest.mark.parametrize("combine", ["softmax", "gate"])
def test_gradients_of_a_lesson_are_those_of_its_loss(combine: str) -> None:
    model = made("starcoder2", torch.float64).requires_grad_(False)  # which computes nothing in float32
    memory = add_memory(model, **{**SIZES, "k": 100}, combine=combine)  # all of it: what is found does not jump
    learn(memory, "next")
    torch.manual_seed(2)
    weight, step = torch.randn(2, 6, 64, dtype=torch.float64), 2.0**-14
    with memory.learning("next"):
        memory.reset()
        memory.read(tokens(length=40), search=False, progress=False)

        def loss() -> Tensor:
            return (model(QUESTION).logits * weight).sum()

        parameters = values_of(memory)
        for parameter in parameters:
            parameter.data.mul_(2**10).round_().div_(2**10)  # so that float32 numbers take the steps exactly
            parameter.requires_grad_(True)
        loss().backward()
        for parameter in parameters:
            assert parameter.grad is not None
            way = torch.randn(parameter.shape).sign()
            wanted, sides = float((parameter.grad.double() * way).sum()), []
            for sign in (1.0, -1.0):
                parameter.data.add_(way, alpha=sign * step)
                sides.append(float(loss().detach()))
                parameter.data.sub_(way, alpha=sign * step)
            assert (sides[0] - sides[1]) / (2.0 * step) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("form", ["value", "next"])
def test_zeros_store_values_as_they_are(form: str) -> None:
    model = made("llama")
    memory = add_memory(model, **SIZES)
    memory.read(tokens(length=40), progress=False)
    plain = [held(memory, layer) for layer in memory.layers]
    learn(memory, form, scale=0.0)
    memory.reset()
    memory.read(tokens(length=40), progress=False)
    assert all(torch.equal(held(memory, layer), wanted) for layer, wanted in zip(memory.layers, plain, strict=True))


@pytest.mark.parametrize(("form", "learned"), [("value", 1), ("next", 2)])
def test_a_calibration_learns_what_is_said_and_leaves_nothing_behind(form: str, learned: int) -> None:
    model = made("llama", vocab_size=260)
    memory = add_memory(model, max_memories=700, k=8, segment=32)
    text = "It was a bright cold day in the hills, and all the clocks were being wound again. " * 12
    found = calibrate(model, memory, bytes_tokenizer(), [text], steps=4, facts=4, batch=1, rate=0.5, form=form)
    assert found["after"]["steps"] == 4
    parameters = values_of(memory)
    assert len(parameters) == 2 * learned and set(OF_VALUES) <= set(PACES)
    assert all(float(parameter.detach().abs().max()) > 0.005 for parameter in parameters)
    assert not any(parameter.requires_grad for parameter in parameters)
    ids = torch.tensor([bytes_tokenizer()(text)["input_ids"][:100]])
    memory.read(ids, progress=False)
    assert memory._entries is not None and not memory._entries.as_they_are
    assert held(memory, 0).shape[-1] == 8


def test_what_is_saved_and_copied_amid_a_calibration_holds_no_lesson(tmp_path: Path) -> None:
    """Its values are no others' values: a memory of any other time could not take them up."""
    model = made("llama", vocab_size=260)
    memory, copies = add_memory(model, max_memories=700, k=8, segment=32), []

    def report(line: str) -> None:
        memory.save(tmp_path)
        copies.append(copy.deepcopy(model))

    text = "It was a bright cold day in the hills, and all the clocks were being wound again. " * 12
    calibrate(model, memory, bytes_tokenizer(), [text], steps=2, facts=4, batch=1, form="next", report=report)
    loaded = load_memory(made("llama", vocab_size=260), tmp_path)
    copied = memory_of(copies[-1])
    for one in (memory, loaded, copied):
        assert one.lengths.tolist() == []
        one.read(tokens(length=40), progress=False)
    for one in (loaded, copied):
        assert torch.equal(held(one, 1), held(memory, 1))


def test_a_model_that_was_saved_whole_before_there_were_forms_of_values(tmp_path: Path) -> None:
    """What is pickled of its memory has neither what is learned of values nor their sizes."""
    model = made("llama")
    memory = add_memory(model, **SIZES)
    learn(memory, "mix")
    memory.read(tokens(length=40), progress=False)
    wanted = logits_of(model)
    assert memory._entries is not None
    del memory._entries.__dict__["as_they_are"]
    for learned in [layer.learned for layer in memory.layers.values()]:
        del learned.__dict__["kv_heads"], learned.__dict__["value_width"]
        for name in OF_VALUES:
            del learned._parameters[name]
    torch.save(model, tmp_path / "whole.pt")
    loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(logits_of(loaded), wanted)
    again = memory_of(loaded)
    assert [again.layers[1].learned.saying(), again.bytes_per_document] == [None, memory.bytes_per_document]
    learn(again, "next")
    assert [tuple(parameter.shape) for parameter in values_of(again)] == [(2, 8, 8)] * 4
    again.reset()
    again.read(tokens(length=40), progress=False)
    assert logits_of(loaded).isfinite().all()


def test_a_lesson_takes_the_room_that_the_next_values_need() -> None:
    memory = add_memory(made("llama"), **SIZES)
    learn(memory, "next")
    assert bytes_per_document(memory.layers, memory.settings, as_they_are=True) * 2 == memory.bytes_per_document * 3


def test_values_of_each_group_are_its_heads() -> None:
    layer = LayerMemory(4, 3, "auto", torch.device("cpu"), kv_heads=2, value_width=5)
    assert layer.saying() is None
    layer.learn_to_ask("next")
    torch.manual_seed(0)
    for name in OF_VALUES:
        getattr(layer, name).data.normal_()
    saying = layer.saying()
    assert saying is not None and saying.shape == (2, 10, 5)
    values = torch.randn(3, 4, 7, 10)
    found = spoken(values, saying)
    for head in range(4):
        own, then = values[:, head, :, :5], values[:, head, :, 5:]
        wanted = own + own @ layer.memory_value[head // 2] + then @ layer.memory_next[head // 2]
        assert_close(found[:, head], wanted, PARITY, f"head {head}")
