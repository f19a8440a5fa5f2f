"""Eager calls go straight to their implementation, and nobody who watches, transforms or compiles misses them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import DIFFERENTIABLE, attention_inputs, ring
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from memtrans_kernels import (
    checks,
    cosine,
    eager,
    knn_add_,
    knn_search,
    ledger_advance_,
    ledger_ticket,
    local_attention,
    memory_attention,
)
from memtrans_kernels.eager import kept


class Watching(TorchDispatchMode):
    """Writes down the names of the operators that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


class Labelled(Tensor):
    """A tensor of one's own."""


def gradients(inputs: dict[str, Any], function: Any = memory_attention) -> dict[str, Tensor]:
    leaves = {name: inputs[name].detach().requires_grad_() for name in DIFFERENTIABLE if name in inputs}
    out, lse = function(**{**inputs, **leaves})
    (out.square().sum() + lse.sum()).backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


def test_both_ways_give_the_same_bits() -> None:
    torch.manual_seed(0)
    inputs = {**attention_inputs(local_length=True), "dropout_p": 0.3, "seed": torch.tensor(5)}
    straight = gradients(inputs)
    with Watching() as watching:
        watched = gradients(inputs)
    assert {"memtrans::memory_attention", "memtrans::memory_attention_backward"} <= set(watching.seen)
    assert all(torch.equal(straight[name], watched[name]) for name in straight)


def test_a_mode_sees_every_operator() -> None:
    state = ring()
    new = torch.randn(2, 2, 3, 8)
    with Watching() as watching:
        cosine(new.requires_grad_(), new)[0].sum().backward()
        knn_search(torch.randn(2, 2, 3, 8), state["keys"], state["rows"], state["start"], state["cursor"], 4, 2)
        start = state.pop("start")
        knn_add_(**state, new_keys=new, new_values=new)
        ledger_advance_(start, ledger_ticket(start, [0]), 3)
    names = ("cosine", "cosine_backward", "knn_search", "knn_add_", "ledger_ticket", "ledger_advance_")
    assert {f"memtrans::{name}" for name in names} <= set(watching.seen)


def test_a_tensor_of_another_class_goes_through_the_dispatcher() -> None:
    unit, _ = cosine(torch.ones(2, 4).as_subclass(Labelled), torch.ones(1, 4))
    assert type(unit) is Labelled


def test_writes_count_in_autograds_versions() -> None:
    state = ring()
    start, new = state.pop("start"), torch.randn(2, 2, 3, 8)
    versions = [state[name]._version for name in ("keys", "values", "cursor")] + [start._version]
    knn_add_(**state, new_keys=new, new_values=new)
    ledger_advance_(start, ledger_ticket(start, [0]), 3)
    after = [state[name]._version for name in ("keys", "values", "cursor")] + [start._version]
    assert all(now > before for now, before in zip(after, versions, strict=True))
    weights = state["keys"].clone().requires_grad_()
    product = weights * state["keys"]
    knn_add_(**state, new_keys=new, new_values=new)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_a_memory_made_in_inference_mode_is_written_in_it() -> None:
    with torch.inference_mode():
        state = ring()
        del state["start"]
        knn_add_(**state, new_keys=torch.ones(2, 2, 3, 8), new_values=torch.ones(2, 2, 3, 8))
    assert state["cursor"].tolist() == [21, 21, 0, 21, 21]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_the_same_gradients(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    inputs = attention_inputs()

    def recomputed(**given: Any) -> Any:
        names, tensors = zip(*given.items(), strict=True)
        return checkpoint(
            lambda *tensors: memory_attention(**dict(zip(names, tensors, strict=True))),
            *tensors,
            use_reentrant=use_reentrant,
        )

    straight, again = gradients(inputs), gradients(inputs, recomputed)
    assert all(torch.equal(straight[name], again[name]) for name in straight)


def test_what_was_checked_once_is_not_checked_again_and_the_rest_is() -> None:
    looked = []
    check = checks.remembered(lambda *arguments: looked.append(arguments))
    for argument in (torch.zeros(2), torch.ones(2), torch.zeros(2, 1), torch.zeros(2).double(), 1, True, 1.0, [1], [1]):
        check(argument)
    assert len(looked) == 8, "the second tensor alone is like one before it; a list cannot be remembered"


def test_a_refused_shape_is_refused_again() -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="query and key must have shape"):
            cosine(torch.ones(2, 4), torch.ones(2, 3))


def ones(device: torch.device, *sizes: int) -> Tensor:
    return torch.ones(sizes, device=device)


def test_what_is_kept_is_made_once_for_each_device_and_arguments() -> None:
    device = torch.ones(1).device
    first = kept(ones, device, 2, 3)
    assert kept(ones, device, 2, 3) is first
    assert kept(ones, device, 3, 2) is not first and kept(ones, torch.device("meta"), 2, 3).is_meta
    with Watching():
        assert kept(ones, device, 2, 3) is not first  # a mode sees that it is made


def test_what_was_kept_in_inference_can_be_read_in_training() -> None:
    device = torch.ones(1).device
    with torch.inference_mode():
        factor = kept(ones, device, 7)
    x = torch.ones(7, requires_grad=True)
    (x * factor).sum().backward()
    assert x.grad is not None


def test_few_things_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "_KEPT", {})
    monkeypatch.setattr(eager, "MOST_KEPT", 4)
    for size in range(9):
        kept(ones, torch.ones(1).device, size)
    assert len(eager._KEPT) <= 4


def test_another_thread_may_clear_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cleared(dict[Any, Any]):
        """As if another thread cleared it after each question."""

        def __contains__(self, key: object) -> bool:
            held = super().__contains__(key)
            self.clear()
            return held

    monkeypatch.setattr(eager, "_KEPT", Cleared())
    for _ in range(2):
        assert kept(ones, torch.ones(1).device, 3).shape == (3,)


def test_attention_without_a_memory_makes_none_in_its_place_again() -> None:
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8)
    local_attention(query, key, key, torch.ones(4))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        local_attention(query, key, key, torch.ones(4))
    assert not [event for event in found.key_averages() if event.key == "aten::zeros"]
