"""One token behind a memory: what it sees of it, and what every layer runs for it.

A GPU pays for each kernel of a token; an operator that is no view is at least one.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers.checks import PARITY, assert_close
from helpers.hf_families import FAMILIES, made, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, StaticCache

from memtrans.hf import ModelMemory, add_memory
from memtrans.hf.layer_memory import LayerMemory, asking_of
from memtrans.memory.snapshot import MemorySnapshot
from memtrans_kernels import checks

SIZES: dict[str, Any] = {"max_memories": 100, "k": 8, "segment": 16}
PROMPT, ROOM = 9, 16
FREE = {"view", "_unsafe_view", "expand", "slice", "select", "unsqueeze", "transpose"}
FREE |= {"unbind", "diagonal", "detach", "alias"}
WITH_STATIC_CACHES = {
    "llama",
    "qwen2_windows",
    "qwen3",
    "gemma2",
    "gemma3",
    "gpt_oss",
    "smollm3",
}  # older versions lack some


class Kernels(TorchDispatchMode):
    """Counts operators that a GPU would launch something for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name not in FREE:
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))


def prompted(model: PreTrainedModel, batch: int = 1) -> StaticCache:
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    model(tokens(batch, length=PROMPT, seed=2), past_key_values=cache, use_cache=True)
    return cache


def token(model: PreTrainedModel, cache: StaticCache, at: Tensor) -> Tensor:
    """Logits of one more token for each document, at these positions (B,)."""
    mask = (torch.arange(ROOM) <= at[:, None])[:, None, None]
    said = {"position_ids": at[:, None], "attention_mask": mask, "past_key_values": cache, "use_cache": True}
    return model(tokens(len(at), length=1, seed=4), **said).logits[:, 0]


@torch.no_grad()
def kernels(layers: int, form: str | None) -> Counter[str]:
    """Of one token of a model of so many layers; form: None for a memory that is off."""
    model = made("llama", torch.bfloat16, num_hidden_layers=layers, hidden_size=36, head_dim=64, num_attention_heads=9,
                 num_key_value_heads=3)  # fmt: skip
    memory = add_memory(model, **SIZES)
    memory.read(tokens(1, length=40))
    for layer in memory.layers.values():
        layer.learned.learn_to_ask(form or "offset")
    with memory.off() if form is None else nullcontext():
        cache = prompted(model)
        with Kernels() as counted:
            token(model, cache, torch.tensor([PROMPT]))
    return counted.seen


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks at numbers there looks at those on the host alone, which launches nothing."""
    monkeypatch.setattr(checks, "may_look", lambda *_: False)
    monkeypatch.setattr(MemorySnapshot, "check_current", lambda _: None)


def beside(form: str) -> tuple[dict[str, int], int]:
    """What a token runs with a memory and not without one: in each layer, where the model's attention is left out, and
    how much once."""
    (two, plain_two), (four, plain_four) = ((kernels(layers, form), kernels(layers, None)) for layers in (2, 4))
    both = {*four, *plain_four}
    of_layers = {name: four[name] - two[name] - (plain_four[name] - plain_two[name]) for name in both}
    once = sum(two[name] - plain_two[name] for name in both) - sum(of_layers.values())
    return {name: count // 2 for name, count in of_layers.items() if count > 0}, once


@pytest.mark.parametrize(
    ("form", "asking", "once"),
    [
        ("offset", {}, 13),
        ("gain", {"mul": 1}, 17),
        ("mix", {"bmm": 1}, 20),
        ("across", {"mm": 1}, 23),
        ("next", {"bmm": 1}, 20),
    ],
)
def test_a_layer_asks_searches_and_attends_once_and_runs_nothing_else(
    form: str, asking: dict[str, int], once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(monkeypatch)
    assert beside(form) == ({"knn_search": 1, "memory_attention": 1, **asking}, once)


def remembering(combine: str, batch: int = 1) -> tuple[PreTrainedModel, ModelMemory]:
    model = made("llama")
    memory = add_memory(model, combine=combine, offset=1.0, **SIZES)
    memory.read(tokens(batch, length=40))
    return model, memory


@pytest.mark.parametrize("combine", ["softmax", "gate"])
@torch.no_grad()
def test_a_token_that_is_the_first_of_all_looks_at_no_memory(combine: str) -> None:
    model, memory = remembering(combine)
    for place, looks in ((0, False), (PROMPT, True)):
        at = torch.tensor([place])
        caches = [prompted(model) for _ in range(3)]
        seen = token(model, caches[0], at)
        with memory.off():
            assert torch.allclose(token(model, caches[1], at), seen, atol=1e-3) is not looks
        with memory.tracing() as trace:
            assert_close(token(model, caches[2], at), seen, PARITY, "a token that is watched")
        assert bool((trace.positions(0, layer=1) >= 0).any()) is looks


@torch.no_grad()
def test_documents_whose_tokens_are_first_look_at_nothing_beside_others_that_do() -> None:
    model, memory = remembering("softmax", batch=2)
    cache, at = prompted(model, 2), torch.tensor([0, PROMPT])
    together = token(model, cache, at)
    with memory.off():
        plain = token(model, prompted(model, 2), at)
    assert_close(together[0], plain[0], PARITY, "the first token")
    assert not torch.allclose(together[1], plain[1], atol=1e-3)


@pytest.mark.parametrize("entries", [500, 40000])
def test_layers_of_several_forms_are_asked_as_each_of_them_would_be(entries: int) -> None:
    layers = {number: LayerMemory(3, 8, "auto", torch.device("cpu")) for number in range(8)}
    generator = torch.Generator().manual_seed(0)
    for number, form in enumerate(("across", "mix", "gain", "offset") * 2):
        layers[number].learn_to_ask(form)
        for parameter in layers[number].parameters():
            parameter.data.normal_(std=0.5, generator=generator)
    found = asking_of(layers, torch.tensor(entries))
    beyond = torch.tensor(max(1.0, entries / 1024)).double().log()
    query = torch.randn(2, 3, 5, 8, generator=generator)
    for number, layer in layers.items():
        has = {name: tensor.double() for name, tensor in layer.named_parameters()}
        assert_close(found[number].offset, has["memory_offset"] + has["memory_slope"] * beyond, PARITY, "offset")
        wanted = query.double()
        if "memory_gain" in has:
            sharpness = (has["memory_sharpness"] * beyond)[:, None, None]
            wanted = wanted * (has["memory_gain"][:, None] + sharpness).exp()
        if "memory_mix" in has:
            own = wanted
            wanted = own + own @ has["memory_mix"]
        if "memory_across" in has:
            together = own.transpose(1, 2).flatten(2) @ has["memory_across"]
            wanted = wanted + together.view(2, 5, 3, 8).transpose(1, 2)
        assert_close(found[number].asked(query), wanted, PARITY, "what is asked")


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(WITH_STATIC_CACHES & FAMILIES.keys()))
def test_generate_with_a_static_cache_gives_the_logits_of_any_other(family: str) -> None:
    """`generate` prepares one mask then, or one for each type of layer; here of rows of which one is padded."""
    model = made(family)
    memory = add_memory(model, segment=16)
    memory.read(tokens(2, 40))
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, :3] = 0

    def logits(**options: Any) -> Tensor:
        found = model.generate(
            tokens(2, 7, seed=1), attention_mask=mask, max_new_tokens=4, do_sample=False, output_logits=True,
            return_dict_in_generate=True, **options,
        )  # fmt: skip
        return torch.stack(found.logits)

    assert_close(logits(cache_implementation="static"), logits(), PARITY, "logits")


def test_a_memory_that_was_begun_in_inference_is_read_on_outside() -> None:
    memory = add_memory(made("llama"), segment=16)
    with torch.inference_mode():
        memory.read(tokens(1, 20))
    memory.read(tokens(1, 20))
    assert memory.lengths.tolist() == [36]  # two passes a read, each without its sink
