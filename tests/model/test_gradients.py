"""Gradients equal those of a memory that was cloned at every search, whatever was stored or cleared since."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.checks import SAME_FORMULA, assert_close
from helpers.devices import seeded
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memtrans import KNNAttention, KNNMemory
from memtrans_kernels import knn_add_, knn_search, memory_attention

pytestmark = pytest.mark.device

BATCH, HEADS, WIDTH, DIM, CAPACITY, NEIGHBOURS = 2, 4, 5, 6, 7, 3


class ClonedMemory:
    """Keys and values (B, G, C, D) of every document in ordinary tensors; what a search returns is a copy."""

    def __init__(self, kv_heads: int) -> None:
        empty = torch.zeros(kv_heads, 0, WIDTH)
        self.documents = [(empty, empty) for _ in range(BATCH)]

    def add(self, key: Tensor, value: Tensor) -> None:
        for b, (keys, values) in enumerate(self.documents):
            longer = torch.cat((keys, key[b]), dim=1), torch.cat((values, value[b]), dim=1)
            self.documents[b] = longer[0][:, -CAPACITY:].clone(), longer[1][:, -CAPACITY:].clone()

    def clear(self, mask: list[bool]) -> None:
        for b, cleared in enumerate(mask):
            if cleared:
                self.documents[b] = tuple(tensor[:, :0] for tensor in self.documents[b])

    def search(self, query: Tensor, b: int, head: int, group: int) -> tuple[Tensor, Tensor]:
        """The nearest keys and values (N, K, D) of one head's queries (N, D); K is less while it holds less."""
        keys, values = (tensor[group] for tensor in self.documents[b])
        nearest = (query.detach() @ keys.T).topk(min(NEIGHBOURS, len(keys)), dim=-1).indices
        return keys[nearest].clone(), values[nearest].clone()


def attend_plainly(
    layer: KNNAttention, x: Tensor, memory: ClonedMemory, xl_memory: Any, table: Tensor
) -> tuple[Tensor, Any]:
    """`KNNAttention` written out: one head of one document at a time."""
    groups, length = layer.kv_heads, x.shape[1]
    query = F.normalize(layer.to_q(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2), dim=-1)
    key, value = layer.to_kv(x).unflatten(-1, (2, groups, WIDTH)).permute(2, 0, 3, 1, 4)
    key = F.normalize(key, dim=-1)
    if xl_memory is not None:
        key, value = torch.cat((xl_memory[0], key), dim=2), torch.cat((xl_memory[1], value), dim=2)
    local = key.shape[2]
    distance = torch.arange(local - length, local)[:, None] - torch.arange(local)
    out = torch.zeros(BATCH, HEADS, length, WIDTH)
    for b in range(BATCH):
        for head in range(HEADS):
            group, scale = head * groups // HEADS, layer.scale[head].exp()
            bias = table[head, distance.clamp(0, table.shape[1] - 1)]
            logits = (scale * query[b, head] @ key[b, group].T + bias).masked_fill(distance < 0, -torch.inf)
            keys, values = memory.search(query[b, head], b, head, group)
            retrieved = scale * torch.einsum("nd,nkd->nk", query[b, head], keys)
            if layer.memory_offset is not None:
                retrieved = retrieved + layer.memory_offset[head]
            if layer.memory_gate is None:
                weights = torch.cat((retrieved, logits), dim=-1).softmax(dim=-1)
                to_memory, to_local = weights.split([keys.shape[1], local], dim=-1)
            else:
                gate = layer.memory_gate[head].sigmoid() if keys.shape[1] else 0.0
                to_memory, to_local = gate * retrieved.softmax(dim=-1), (1.0 - gate) * logits.softmax(dim=-1)
            out[b, head] = torch.einsum("nk,nkd->nd", to_memory, values) + to_local @ value[b, group]
    leaving = max(0, local - layer.xl_max_memories)
    memory.add(key[:, :, :leaving].detach(), value[:, :, :leaving].detach())
    kept = (key[:, :, leaving:].detach(), value[:, :, leaving:].detach()) if layer.xl_max_memories else None
    return layer.to_out(out.transpose(1, 2).flatten(2)), kept


@dataclass
class Story:
    """Segments of one length after each other; some documents cleared before some of them."""

    length: int = 4
    segments: int = 5
    cleared: tuple[tuple[int, tuple[bool, bool]], ...] = ()
    kv_heads: int = 1
    xl: int = 0
    offset: float | None = None
    gate: bool = False
    before_backward: int = 1  # segments


STORIES = {
    "wrap around": Story(),
    "a segment longer than the memory": Story(length=9, segments=3),
    "clear": Story(cleared=((2, (True, False)), (4, (True, True)))),
    "several segments before one backward": Story(segments=6, before_backward=3),
    "all segments before one backward, with a clear": Story(before_backward=5, cleared=((3, (False, True)),)),
    "key value heads": Story(kv_heads=2, before_backward=2, segments=4),
    "XL cache": Story(xl=3, before_backward=5),
    "offset": Story(offset=-0.5),
    "gate": Story(gate=True, cleared=((2, (True, False)),)),
    "gate, XL cache, key value heads": Story(gate=True, xl=3, kv_heads=2, before_backward=5),
}
in_every_story = pytest.mark.parametrize("story", STORIES.values(), ids=STORIES.keys())

Attend = Callable[[Tensor, Any], tuple[Tensor, Any]]


@pytest.fixture(autouse=True)
def _float64() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def tell(
    story: Story, layer: KNNAttention, table: Tensor, attend: Attend, clear: Callable[[list[bool]], None]
) -> dict[str, Tensor]:
    """Runs a story: what came out, and the gradient of every parameter, input and bias."""
    generator = seeded(7)
    result, pending, xl_memory = {}, [], None
    inputs, parameters = [], {**dict(layer.named_parameters()), "bias": table}
    for parameter in parameters.values():
        parameter.grad = None
    for number in range(story.segments):
        for when, mask in story.cleared:
            if when == number:
                clear(list(mask))
        x = torch.randn(BATCH, story.length, DIM, generator=generator).requires_grad_()
        out, xl_memory = attend(x, xl_memory)
        inputs.append(x)
        result[f"out {number}"] = out.detach()
        pending.append((out * torch.randn(out.shape, generator=generator)).sum())
        if len(pending) == story.before_backward or number == story.segments - 1:
            sum(pending).backward()
            pending = []
    result |= {f"gradient of input {number}": x.grad for number, x in enumerate(inputs)}
    return result | {f"gradient of {name}": p.grad.clone() for name, p in parameters.items()}


def make(story: Story) -> tuple[KNNAttention, Tensor, KNNMemory]:
    torch.manual_seed(3)
    layer = KNNAttention(
        dim=DIM,
        heads=HEADS,
        dim_head=WIDTH,
        num_retrieved_memories=NEIGHBOURS,
        xl_max_memories=story.xl,
        attn_scale_init=5,
        kv_heads=story.kv_heads,
        memory_offset=story.offset,
        combine="gate" if story.gate else "softmax",
    )
    if story.gate:
        layer.memory_gate.data = torch.tensor([-2.0, -0.5, 0.5, 2.0])
    memory = KNNMemory(
        WIDTH,
        CAPACITY,
        BATCH,
        kv_heads=story.kv_heads,
        spare=story.length * story.before_backward,
        dtype=torch.float64,
    )
    return layer, torch.randn(HEADS, story.length, requires_grad=True), memory


def told_plainly(story: Story) -> dict[str, Tensor]:
    layer, table, _ = make(story)
    memory = ClonedMemory(story.kv_heads)
    return tell(story, layer, table, lambda x, xl: attend_plainly(layer, x, memory, xl, table), memory.clear)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(actual[name], tensor, SAME_FORMULA, name)


def clearing(memory: KNNMemory) -> Callable[[list[bool]], None]:
    return lambda mask: memory.clear_rows(torch.tensor(mask))


@in_every_story
def test_gradients_equal_those_of_a_cloned_memory(story: Story) -> None:
    layer, table, memory = make(story)

    def attend(x: Tensor, xl_memory: Any) -> tuple[Tensor, Any]:
        return layer(x, knn_memory=memory, xl_memory=xl_memory, rel_pos_bias=table)

    assert_same(tell(story, layer, table, attend, clearing(memory)), told_plainly(story))


@in_every_story
def test_activation_checkpointing_through_snapshots_changes_nothing(story: Story) -> None:
    layer, table, memory = make(story)

    def attend(x: Tensor, xl_memory: Any) -> tuple[Tensor, Any]:
        snapshot = memory.snapshot(like=x, longest=x.shape[1])
        arguments = {"knn_memory": snapshot, "xl_memory": xl_memory, "rel_pos_bias": table}
        return checkpoint(layer, x, use_reentrant=False, **arguments)

    assert_same(tell(story, layer, table, attend, clearing(memory)), told_plainly(story))
    once = make(story)[2]
    tell(story, layer, table, lambda x, xl: layer(x, knn_memory=once, xl_memory=xl, rel_pos_bias=table), clearing(once))
    for name, tensor in once.state_dict().items():  # the recomputed forward stored nothing twice
        assert torch.equal(memory.state_dict()[name], tensor), name


def test_a_dense_bias_has_its_gradient_too() -> None:
    layer, _, memory = make(STORIES["wrap around"])
    dense = torch.randn(1, HEADS, 4, 4, requires_grad=True)
    position = torch.arange(4)
    for _ in range(3):
        x = torch.randn(BATCH, 4, DIM)
        layer(x, knn_memory=memory, rel_pos_bias=dense)[0].sum().backward()
    future = position > position[:, None]
    assert (dense.grad[0][:, future] == 0).all()
    assert (dense.grad[0][:, ~future] != 0).any()


# -------------------------------------------------------------------------------------------------- too late, or not


@pytest.mark.filterwarnings("ignore:a memory of .* bytes grows to")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("spare", [4, 11, 15, 16])
def test_four_segments_before_one_backward_have_the_gradients_of_a_cloned_memory(
    checkpointed: bool, spare: int
) -> None:
    story = Story(segments=4, before_backward=4)
    layer, table, _ = make(story)
    memory = KNNMemory(WIDTH, CAPACITY, BATCH, spare=spare, dtype=torch.float64)

    def attend(x: Tensor, _: Any) -> tuple[Tensor, Any]:
        arguments = {"knn_memory": memory.snapshot(like=x, longest=4), "rel_pos_bias": table}
        return checkpoint(layer, x, use_reentrant=False, **arguments) if checkpointed else layer(x, **arguments)

    assert_same(tell(story, layer, table, attend, clearing(memory)), told_plainly(story))


def test_rows_out_of_scope_do_not_make_a_backward_late() -> None:
    layer, _, memory = make(Story())
    x = torch.randn(BATCH, 4, DIM, requires_grad=True)
    layer(torch.randn(BATCH, 4, DIM), knn_memory=memory)
    with memory.at_batch_indices([0]):
        out, _ = layer(x[:1], knn_memory=memory)
    with memory.at_batch_indices([1]):
        for _ in range(10):
            layer(x[1:], knn_memory=memory)
    out.sum().backward()
    assert x.grad[0].abs().sum() > 0


def retrieved_gradient(between: Callable[[KNNAttention, KNNMemory], None], spare: int = 4) -> Tensor:
    """The gradient of a checkpointed segment over a full memory, something else happening before its backward."""
    layer, _, _ = make(Story())
    memory = KNNMemory(WIDTH, CAPACITY, BATCH, spare=spare, dtype=torch.float64)
    generator = seeded(11)
    for _ in range(3):
        layer(torch.randn(BATCH, 4, DIM, generator=generator), knn_memory=memory)
    x = torch.randn(BATCH, 4, DIM, generator=generator).requires_grad_()
    snapshot = memory.snapshot(like=x, longest=4)
    out, _ = checkpoint(layer, x, use_reentrant=False, knn_memory=snapshot)
    between(layer, memory)
    out.square().sum().backward()
    return x.grad


def test_a_ring_laid_out_again_for_a_longer_segment_keeps_what_a_recomputed_forward_searches() -> None:
    def read_a_longer_segment(layer: KNNAttention, memory: KNNMemory) -> None:
        layer(torch.randn(BATCH, 50, DIM), knn_memory=memory, add_knn_memory=False)
        assert memory.spare == 50

    assert torch.equal(retrieved_gradient(read_a_longer_segment), retrieved_gradient(lambda *_: None))


def test_what_is_added_after_a_ring_was_laid_out_again_makes_no_recomputed_forward_late() -> None:
    def read_a_longer_segment_then_add(layer: KNNAttention, memory: KNNMemory) -> None:
        layer(torch.randn(BATCH, 50, DIM), knn_memory=memory, add_knn_memory=False)
        with torch.no_grad():
            for _ in range(30):
                layer(torch.randn(BATCH, 4, DIM), knn_memory=memory)

    assert torch.equal(retrieved_gradient(read_a_longer_segment_then_add), retrieved_gradient(lambda *_: None))


def test_clearing_and_cleaning_up_before_the_backward_change_no_gradient() -> None:
    def clear_and_clean_up(layer: KNNAttention, memory: KNNMemory) -> None:
        memory.clear()
        memory.cleanup()

    assert torch.equal(retrieved_gradient(clear_and_clean_up), retrieved_gradient(lambda *_: None))


# ---------------------------------------------------------------------------------------------------------- operators


def test_the_loss_of_a_segment_reaches_no_earlier_one_through_the_memory() -> None:
    layer, _, memory = make(Story())
    first, second = (torch.randn(BATCH, 4, DIM, requires_grad=True) for _ in range(2))
    layer(first, knn_memory=memory)
    layer(second, knn_memory=memory)[0].sum().backward()
    assert first.grad is None
    assert second.grad is not None


def wrapped_ring() -> dict[str, Tensor]:
    """A ring of M = 7 and S = 2 that is full and wrapped, for two documents."""
    keys, values = torch.zeros(2, 2, CAPACITY + 2, WIDTH)
    cursor, rows = torch.zeros(2, dtype=torch.int64), torch.tensor([1, 0])
    generator = seeded(5)
    new_keys, new_values = torch.randn(2, 2, 1, 12, WIDTH, generator=generator)
    knn_add_(keys, values, cursor, rows, new_keys, new_values)
    return {"keys": keys, "values": values, "cursor": cursor, "rows": rows, "start": torch.tensor([0, 7])}


def test_no_gradient_goes_into_the_memory() -> None:
    ring = wrapped_ring()
    keys, values = (ring[name].clone().requires_grad_() for name in ("keys", "values"))
    query, local = torch.randn(2, HEADS, 3, WIDTH, requires_grad=True), torch.randn(2, 1, 3, WIDTH)
    scores, slots = knn_search(query, keys, ring["rows"], ring["start"], ring["cursor"], CAPACITY, NEIGHBOURS)
    out, _ = memory_attention(query, local, local, keys, values, ring["rows"], scores, slots, torch.ones(HEADS))
    out.sum().backward()
    assert query.grad is not None
    assert keys.grad is None
    assert values.grad is None


def test_gradcheck_of_search_followed_by_attention() -> None:
    """The scores are handed in, and yet the query has its gradient through them. Away from ties."""
    ring = wrapped_ring()
    generator = seeded(2)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    query, key, value = leaf(2, 2, 2, WIDTH), leaf(2, 1, 3, WIDTH), leaf(2, 1, 3, WIDTH)
    scale, table, offset = leaf(2), leaf(2, 3), leaf(2)

    def search(query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return knn_search(query, ring["keys"], ring["rows"], ring["start"], ring["cursor"], CAPACITY, k)

    def function(query: Tensor, key: Tensor, value: Tensor, scale: Tensor, table: Tensor, offset: Tensor) -> Any:
        found = search(query, NEIGHBOURS)
        return memory_attention(
            query, key, value, ring["keys"], ring["values"], ring["rows"], *found, scale, table, memory_offset=offset
        )

    scores, _ = search(query, NEIGHBOURS + 1)
    assert (scores[..., NEIGHBOURS - 1] - scores[..., NEIGHBOURS]).min() > 1e-3, "a tie would make the check fail"
    assert torch.autograd.gradcheck(function, (query, key, value, scale, table, offset))
