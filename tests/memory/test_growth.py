"""A backward pass may come any time later: the ring grows for it, as long as it is outstanding."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from helpers.checks import SAME_FORMULA, assert_close
from helpers.devices import seeded
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memtrans import KNNAttention, KNNMemory
from memtrans.memory.snapshot import MemorySnapshot
from memtrans_kernels import StaleMemoryError

DIM, WIDTH, LENGTH, CAPACITY = 8, 4, 4, 6
GROWS = "a memory of .* bytes grows to"


def layer() -> KNNAttention:
    torch.manual_seed(0)
    return KNNAttention(dim=DIM, heads=2, dim_head=WIDTH, num_retrieved_memories=3, attn_scale_init=5).double()


def memory_of(spare: int | str) -> KNNMemory:
    return KNNMemory(WIDTH, CAPACITY, 2, spare=spare, dtype=torch.float64)


def losses(
    attention: KNNAttention, memory: KNNMemory, segments: int, checkpointed: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """The input of each segment, and its loss."""
    generator = seeded(3)
    inputs = [
        torch.randn(2, LENGTH, DIM, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(segments)
    ]
    results = []
    for x in inputs:
        snapshot = memory.snapshot(like=x, longest=LENGTH)
        if checkpointed:
            out, _ = checkpoint(attention, x, use_reentrant=False, knn_memory=snapshot)
        else:
            out, _ = attention(x, knn_memory=snapshot)
        results.append(out.square().sum())
    return inputs, results


def gradients(segments: int, spare: int | str, checkpointed: bool = False) -> list[Tensor]:
    attention, memory = layer(), memory_of(spare)
    inputs, results = losses(attention, memory, segments, checkpointed)
    torch.stack(results).sum().backward()
    return [x.grad for x in inputs] + [parameter.grad for parameter in attention.parameters()]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_21_8_a_late_backward_has_the_gradient_of_one_with_room_enough(checkpointed: bool) -> None:
    expected = gradients(8, spare=8 * LENGTH)
    with pytest.warns(UserWarning, match=GROWS) as told:
        actual = gradients(8, spare=0, checkpointed=checkpointed)
    assert len(told) == 1, "once"
    for grad, wanted in zip(actual, expected, strict=True):
        assert_close(grad, wanted, SAME_FORMULA)


def test_21_8_the_warning_names_the_bytes_and_the_spare_that_avoids_it() -> None:
    message = r"a memory of 1,280 bytes grows to 2,560, .* spare=8 or more avoids it"
    with pytest.warns(UserWarning, match=message):
        gradients(2, spare=LENGTH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(2, spare=8)


@pytest.mark.filterwarnings(f"ignore:{GROWS}")
def test_21_8_what_the_memory_holds_is_what_it_would_hold_otherwise() -> None:
    memories = [memory_of("grow"), memory_of(100)]
    kept = [losses(layer(), memory, 9) for memory in memories]
    del kept
    states = [memory.state_dict() for memory in memories]
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


def test_21_8_several_segments_in_one_recomputation_find_what_they_found() -> None:
    """Each reads the state that the one before it left, in a ring that is laid out anew between them."""

    def gradients_of(spare: int | str, checkpointed: bool) -> list[Tensor]:
        attention, memory = layer(), memory_of(spare)
        losses(attention, memory, 2)
        inputs = [torch.randn(2, LENGTH, DIM, generator=seeded(9), dtype=torch.float64) for _ in range(6)]
        x = torch.stack(inputs).requires_grad_()

        def read(x: Tensor, state: MemorySnapshot) -> Tensor:
            total = x.new_zeros(())
            for segment in x:
                out, _, state = attention(segment, knn_memory=state, return_memory=True)
                total = total + out.square().sum()
            return total

        state = memory.snapshot(like=x, longest=LENGTH)
        loss = checkpoint(read, x, state, use_reentrant=False) if checkpointed else read(x, state)
        del state
        loss.backward()
        return [x.grad, *(parameter.grad for parameter in attention.parameters())]

    expected = gradients_of(100, checkpointed=False)
    with pytest.warns(UserWarning, match=GROWS):
        actual = gradients_of(0, checkpointed=True)
    for grad, wanted in zip(actual, expected, strict=True):
        assert_close(grad, wanted, SAME_FORMULA)


def test_21_8_a_snapshot_that_is_kept_holds_nothing_once_its_backward_is_done() -> None:
    attention, memory, kept = layer(), memory_of(LENGTH), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(9):
            x = torch.randn(2, LENGTH, DIM, dtype=torch.float64)
            kept.append(memory.snapshot(like=x, longest=LENGTH))
            attention(x, knn_memory=kept[-1])[0].sum().backward()
    assert memory._ring.spare == LENGTH


@pytest.mark.parametrize("how", ["dropped", "backward", "no gradient"])
def test_21_8_a_loss_that_is_gone_holds_nothing(how: str) -> None:
    """Dropped, or with a backward pass behind it although the loss itself is kept."""
    attention, memory, kept = layer(), memory_of(LENGTH), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            with torch.set_grad_enabled(how != "no gradient"):
                _, (loss,) = losses(attention, memory, 1)
            if how == "backward":
                loss.backward()
            if how != "dropped":
                kept.append(loss)
            del loss
    assert memory._ring.spare == LENGTH


def test_21_8_a_ring_ends_at_eight_times_its_first_size_before_it_is_allocated() -> None:
    attention, memory = layer(), memory_of(LENGTH)
    first = CAPACITY + LENGTH
    message = r"spare must be \d+ or more, or 'grow', .* got 74: the memory would grow to 20,480 bytes"
    with pytest.warns(UserWarning, match=GROWS), pytest.raises(StaleMemoryError, match=message):
        losses(attention, memory, 100)
    assert memory._ring.keys.shape[1] == 8 * first


def test_21_8_dropping_the_losses_lets_a_ring_at_its_end_go_on() -> None:
    attention, memory = layer(), memory_of(LENGTH)
    with pytest.warns(UserWarning, match=GROWS), pytest.raises(StaleMemoryError, match="or let go of losses"):
        losses(attention, memory, 100)
    inputs, results = losses(attention, memory, 2)
    torch.stack(results).sum().backward()
    assert all(x.grad is not None for x in inputs)


def test_21_8_a_spare_of_grow_has_no_such_end(tmp_path: Path) -> None:
    expected = gradients(60, spare=60 * LENGTH)
    with pytest.warns(UserWarning, match=GROWS):
        actual = gradients(60, spare="grow")
    for grad, wanted in zip(actual, expected, strict=True):
        assert_close(grad, wanted, SAME_FORMULA)
    memory_of("grow").save(tmp_path / "memory")
    assert KNNMemory.load(tmp_path / "memory").grows


@pytest.mark.filterwarnings(f"ignore:{GROWS}")
def test_21_8_a_ring_that_was_laid_out_anew_leaves_older_passes_what_they_read() -> None:
    """However much is added behind it by passes that nothing can make it grow for."""

    def gradient(between: bool) -> Tensor:
        attention, memory = layer(), memory_of(LENGTH)
        losses(attention, memory, 3)
        (x,), (loss,) = losses(attention, memory, 1)
        if between:
            memory.snapshot(like=x, longest=50)
            with torch.no_grad():
                losses(attention, memory, 40)
        loss.backward()
        return x.grad

    assert torch.equal(gradient(True), gradient(False))


def test_21_8_a_compiled_step_raises_and_names_the_number_that_is_enough() -> None:
    attention, memory = layer(), memory_of(LENGTH)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    _, results = losses(compiled, memory, 5)
    with pytest.raises(RuntimeError, match=r"spare=4 .* comes after 8: create the memory with spare=20 or more"):
        torch.stack(results).sum().backward()
