"""Attention to all that a memory holds: what a search of more neighbours than entries gives, without a search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.checks import ATTENTION, SAME_FORMULA, SAME_GRAPH, assert_close
from helpers.devices import seeded
from torch import Tensor

from memtrans import KNNAttention, KNNMemory, KNNMemoryList, MemorizingTransformer
from memtrans.generation.decoder import Decoder
from memtrans.memory import whole
from memtrans_kernels import StaleMemoryError, whole_attention

B, N, DIM, H, D, E, M = 2, 6, 16, 4, 4, 3, 15


def layer(attend_to: str, **options: Any) -> KNNAttention:
    torch.manual_seed(0)
    options = {"dim": DIM, "heads": H, "dim_head": D, "num_retrieved_memories": M, "attend_to": attend_to, **options}
    made = KNNAttention(**options).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made


def memory(kv_heads: int = 1, documents: int = B, value_dim: int = D, **options: Any) -> KNNMemory:
    options = {"dtype": torch.float64, "value_dtype": torch.float64, "spare": N, **options}
    return KNNMemory(
        dim=D, max_memories=M, num_indices=documents, kv_heads=kv_heads, value_dim=value_dim, device="cpu", **options
    )


def hidden(seed: int, length: int = N, rows: int = B) -> Tensor:
    return torch.randn(rows, length, DIM, dtype=torch.float64, generator=seeded(seed))


MASK = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 1, 1, 1, 1]]).bool()
TABLE = torch.randn(H, 7, dtype=torch.float64, generator=seeded(7))
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "groups": {"kv_heads": 2},
    "gate": {"combine": "gate"},
    "offset": {"memory_offset": -0.7},
    "cap and sink": {"soft_cap": 0.8, "sink": True, "memory_offset": 0.3},
    "gate, cap and sink": {"soft_cap": 0.8, "sink": True, "combine": "gate", "kv_heads": 2},
    "products, values of their own width": {"similarity": "product", "value_dim_head": E},
    "cache": {"xl_max_memories": 4, "kv_heads": 2},
    "both ways": {"causal": False},
}
CALLS: dict[str, dict[str, Any]] = {
    "all": {},
    "query mask": {"query_mask": MASK},
    "padding": {"mask": MASK},
    "tails": {"lengths": torch.tensor([2, N])},
}


def read(attend_to: str, options: dict[str, Any], call: dict[str, Any]) -> dict[str, Tensor]:
    """Five segments, more than the memory holds, of which a document is cleared before the third and an entry removed
    before the fourth; then all gradients."""
    attention = layer(attend_to, **options)
    of = memory(attention.kv_heads, value_dim=attention.value_dim_head, spare=5 * N)
    cache, found, inputs = None, {}, []
    for number in range(5):
        if number == 2:
            of.clear_rows(torch.tensor([True, False]))
        if number == 3:
            of.remove(of.entries().mask & (torch.arange(M) == 1))
        inputs.append(hidden(number).requires_grad_())
        cached = {} if cache is None else {"xl_memory": cache, "local_length": torch.tensor([N + 1, N + 4])}
        out, cache = attention(inputs[-1], knn_memory=of, rel_pos_bias=TABLE, **cached, **call)
        found[f"out {number}"] = out
    weights = [torch.randn(B, N, DIM, dtype=torch.float64, generator=seeded(9 + number)) for number in range(5)]
    sum((out * weight).sum() for out, weight in zip(found.values(), weights, strict=True)).backward()
    gradients = {name: p.grad for name, p in attention.named_parameters() if p.grad is not None}
    return {**found, **gradients, **{f"input {n}": x.grad for n, x in enumerate(inputs)}}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_all_is_more_neighbours_than_there_are_entries(options: dict[str, Any], call: dict[str, Any]) -> None:
    """In float64, over a memory that fills, is cleared, loses an entry and wraps: results and every gradient."""
    expected, actual = read("neighbours", options, call), read("all", options, call)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(actual[name], tensor, SAME_FORMULA, name)


@pytest.mark.parametrize("combine", ["softmax", "gate"])
def test_an_empty_memory_leaves_local_attention(combine: str) -> None:
    out, _ = layer("all", combine=combine)(hidden(0), knn_memory=memory())
    expected, _ = layer("neighbours", combine=combine)(hidden(0), knn_memory=memory())
    assert_close(out, expected, SAME_FORMULA)


@pytest.mark.parametrize("learning", [True, False])
def test_keys_that_are_not_finite_are_not_seen_then_or_when_hidden(learning: bool) -> None:
    """Nor do hidden entries of whatever numbers reach a result or a gradient."""
    with torch.set_grad_enabled(learning):
        results = []
        for attend_to in ("neighbours", "all"):
            attention, of = layer(attend_to), memory(documents=1)
            pairs = torch.randn(1, 9, 2, D, dtype=torch.float64, generator=seeded(3))
            pairs[0, 2, 0, 1], pairs[0, 5, 0] = torch.nan, torch.inf
            of.add(pairs[:, :4])
            of.clear()
            of.add(pairs[:, 4:])
            x = hidden(0, rows=1).requires_grad_(learning)
            out, _ = attention(x, knn_memory=of)
            if learning:
                out.sum().backward()
            results.append((out, x.grad if learning else out))
        for expected, actual in zip(*results, strict=True):
            assert actual.isfinite().all()
            assert_close(actual, expected, SAME_FORMULA)


def test_a_scope_and_a_view_are_attended_to_in_their_order() -> None:
    """Rows that are not all of the ring in order are gathered; those of a view repeat."""
    of = memory()
    of.add(torch.randn(B, N, 2, D, dtype=torch.float64, generator=seeded(3)))
    with of.at_batch_indices([1]):
        read_only = {"knn_memory": of, "add_knn_memory": False}
        results = [layer(kind)(hidden(0, rows=1), **read_only)[0] for kind in ("neighbours", "all")]
    assert_close(results[1], results[0], SAME_FORMULA)
    read_only = {"knn_memory": of.expand(4), "add_knn_memory": False}
    results = [layer(kind)(hidden(0, rows=4), **read_only)[0] for kind in ("neighbours", "all")]
    assert_close(results[1], results[0], SAME_FORMULA)


def test_the_ring_is_read_where_it_lies() -> None:
    from memtrans.memory.whole import entries_seen

    of, query = memory(kv_heads=2), torch.zeros(B, H, N, D, dtype=torch.float64)
    keys, values, seen = entries_seen(of.snapshot(), query, learning=False)
    assert keys.data_ptr() == of.snapshot().keys.data_ptr() and values.data_ptr() == of.snapshot().values.data_ptr()
    assert keys.shape == (B, 2, M + N, D) and seen.shape == (B, M + N) and not seen.any()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("attend", [whole.attend_to_entries, whole.attend_at_once])
def test_a_snapshot_whose_entries_were_overwritten_is_refused(attend: Callable[..., Any], compiled: bool) -> None:
    of, query, scale = memory(spare=N), torch.zeros(B, H, N, D, dtype=torch.float64), torch.ones(H)
    segment = torch.randn(B, N, 2, D, dtype=torch.float64, generator=seeded(3))
    of.add(segment)
    snapshot = of.snapshot()
    of.add(segment)
    attend(snapshot, query, scale)
    of.add(segment)
    if compiled:
        attend = torch.compile(attend, fullgraph=True, backend="eager")
    with pytest.raises(StaleMemoryError, match=f"spare={N} "):
        attend(snapshot, query, scale)


def test_what_the_kernel_cannot_do_is_not_asked_of_it() -> None:
    scale, query = torch.ones(H), torch.zeros(B, H, whole.MANY, D)
    narrow, widest, wider = (
        KNNMemory(D, M, B, value_dim=width, device="cpu", backend="triton").snapshot() for width in (D, 256, 257)
    )
    assert whole.has_kernel(narrow, query, scale) and whole.has_kernel(widest, query, scale)
    assert not whole.has_kernel(wider, query, scale)

    def not_asked(scale: Tensor) -> Tensor:
        assert not whole.has_kernel(narrow, query, scale)
        return scale.sum()

    torch.func.jvp(not_asked, (scale,), (scale,))
    torch.func.grad(not_asked)(scale)
    torch.func.grad(lambda scales: torch.func.vmap(not_asked)(scales).sum())(torch.ones(2, H))


def test_the_rows_in_scope_alone_are_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A view of four rows reads the ring of three."""
    of = KNNMemory(D, M, 3, device="cpu", spare=N, dtype=torch.bfloat16, value_dtype=torch.bfloat16)
    of.add(torch.randn(3, N, 2, D, generator=seeded(3)))
    sizes: list[int] = []

    def counted(query: Tensor, keys: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor]:
        sizes.append(len(keys))
        return whole_attention(query, keys, *others, **options)

    monkeypatch.setattr(whole, "whole_attention", counted)
    with of.at_batch_indices([2, 0]):
        for snapshot in (of.snapshot(), of.expand(4).snapshot()):
            query = torch.randn(snapshot.documents, H, N, D, generator=seeded(4))
            expected = whole.attend_to_entries(snapshot, query, torch.ones(H))
            for actual, wanted in zip(whole.attend_at_once(snapshot, query, torch.ones(H)), expected, strict=True):
                assert_close(actual, wanted, ATTENTION[torch.float32])
    assert sizes == [2, 3]


def test_a_segment_may_be_longer_than_the_ring_that_is_only_read() -> None:
    attention, of = layer("all"), memory(spare=1)
    of.add(torch.randn(B, 1, 2, D, dtype=torch.float64, generator=seeded(3)))
    read_only = {"knn_memory": of.expand(B), "add_knn_memory": False, "query_mask": torch.rand(B, 40) < 0.7}
    long = layer("neighbours")(hidden(0, 40), **read_only)[0]
    assert_close(attention(hidden(0, 40), **read_only)[0], long, SAME_FORMULA)


def test_the_ring_grows_for_a_backward_pass_that_comes_late() -> None:
    def gradient(of: KNNMemory) -> Tensor:
        attention, x = layer("all"), hidden(0).requires_grad_()
        torch.stack([attention(x + number, knn_memory=of)[0].sum() for number in range(4)]).sum().backward()
        assert x.grad is not None
        return x.grad

    with pytest.warns(UserWarning, match="spare"):
        grown = gradient(memory())
    assert_close(grown, gradient(memory(spare=4 * N)), SAME_FORMULA)


def test_dropout_drops_weights_of_the_memory_too() -> None:
    attention, of = layer("all", dropout=0.5), memory()
    attention(hidden(0), knn_memory=of)
    torch.manual_seed(1)
    first = attention(hidden(1), knn_memory=of, add_knn_memory=False)[0]
    torch.manual_seed(1)
    again = attention(hidden(1), knn_memory=of, add_knn_memory=False)[0]
    other = attention(hidden(1), knn_memory=of, add_knn_memory=False)[0]
    assert torch.equal(first, again) and not torch.equal(first, other)
    kept = attention.eval()(hidden(1), knn_memory=of, add_knn_memory=False)[0]
    expected = layer("neighbours").eval()(hidden(1), knn_memory=of, add_knn_memory=False)[0]
    assert_close(kept, expected, SAME_FORMULA)


# --------------------------------------------------------------------------------------------------------- the model


def model(attend_to: str, **options: Any) -> MemorizingTransformer:
    torch.manual_seed(0)
    sizes = {"num_tokens": 30, "dim": DIM, "depth": 2, "heads": H, "dim_head": D, "memorizing_layers": (1, 2)}
    memories = {"max_knn_memories": M, "num_retrieved_memories": M, "pad_id": -1}
    return MemorizingTransformer(**sizes, **memories, attend_to=attend_to, **options)


@pytest.mark.parametrize("options", [{"xl_max_memories": 5}, {"clear_memories_on_sos_token_id": 0, "combine": "gate"}])
def test_a_model_reads_and_its_decoder_reads_the_same(options: dict[str, Any]) -> None:
    ids = torch.randint(0, 30, (1, 4 * N), generator=seeded(5))
    results = []
    for kind in ("neighbours", "all"):
        reading = model(kind, **options).double()
        memories, caches, logits = reading.create_knn_memories(batch_size=1, spare=4 * N), None, []
        for segment in ids.split(N, dim=1):
            out = reading(segment, memories, xl_memories=caches) if caches else reading(segment, memories)
            out, caches = out if isinstance(out, tuple) else (out, None)
            logits.append(out[0])
        results.append(torch.cat(logits).detach())
    assert_close(results[1], results[0], SAME_GRAPH)  # the memories are in float32
    decoder = Decoder(reading, 1, segment=N)
    assert_close(decoder.read([ids[0, :8]])[0], results[1][7], SAME_GRAPH)
    for place in range(8, 4 * N):
        assert_close(decoder.step(ids[:, place])[0], results[1][place], SAME_GRAPH, f"token {place}")


def test_a_saved_model_says_what_it_attends_to(tmp_path: Any) -> None:
    model("all").save_pretrained(tmp_path)
    loaded = MemorizingTransformer.from_pretrained(tmp_path)
    assert loaded.config["attend_to"] == "all"
    assert {part.attend_to for part in loaded.modules() if isinstance(part, KNNAttention)} == {"all"}


def test_tracing_is_refused_by_name() -> None:
    reading = model("all")
    memories = reading.create_knn_memories(batch_size=1)
    assert isinstance(memories, KNNMemoryList)
    refused = pytest.raises(RuntimeError, match="attend_to must be 'neighbours' in a layer that is traced")
    with memories.tracing(), refused:
        reading(torch.zeros(1, N, dtype=torch.long), memories)


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match="attend_to must be one of neighbours, all, got 'some'"):
        layer("some")
