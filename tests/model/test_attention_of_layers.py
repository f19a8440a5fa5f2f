"""What layers and the model make of the attention's arguments: padding, both directions, caps, sinks, products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.checks import SAME_FORMULA, SAME_GRAPH, assert_close
from torch import Tensor

from memtrans import Attention, KNNAttention, KNNMemory, MemorizingTransformer
from memtrans.generation.decoder import Decoder

B, N, DIM, H, G, D, X = 2, 6, 16, 4, 2, 4, 5


def layer(kind: type = Attention, **options: Any) -> Any:
    torch.manual_seed(0)
    made = kind(**{"dim": DIM, "heads": H, "kv_heads": G, "dim_head": D, **options}).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made


def memory(dtype: torch.dtype = torch.float64) -> KNNMemory:
    return KNNMemory(dim=D, max_memories=40, num_indices=B, kv_heads=G, dtype=dtype, value_dtype=dtype)


def hidden(length: int = N, seed: int = 1) -> Tensor:
    return torch.randn(B, length, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


MASKS = {
    "padding before": [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
    "padding behind": [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]],
    "on both sides": [[0, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]],
    "inside": [[1, 0, 1, 1, 0, 1], [1, 1, 0, 0, 1, 1]],
    "nothing else": [[0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 1, 1]],
}
TABLE = torch.randn(H, 7, dtype=torch.float64, device="cpu", generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("cached", [0, X])
@pytest.mark.parametrize("kind", [Attention, KNNAttention])
def test_masked_tokens_are_as_if_they_were_not_there(kind: type, cached: int, rows: list[list[int]]) -> None:
    """Each row alone, without its padding, in two segments: outputs, caches, what is stored."""
    mask = torch.tensor(rows).bool()
    options = {"num_retrieved_memories": 3} if kind is KNNAttention else {}
    attention = layer(kind, xl_max_memories=cached, **options)
    together, first, second = memory(), hidden(), hidden(seed=2)

    def run(x: Tensor, of: KNNMemory, cache: Tensor | None, **given: Any) -> tuple[Tensor, Tensor | None]:
        if kind is KNNAttention:
            given["knn_memory"] = of
        return attention(x, xl_memory=cache, rel_pos_bias=TABLE, **given)

    _, cache = run(first, together, None, mask=mask)
    full = mask.sum(1).clamp(max=cached)
    out, _ = run(second, together, cache, mask=mask.flip(1), local_length=full + N if cached else None)
    for row in range(B):
        alone = KNNMemory(dim=D, max_memories=40, num_indices=1, kv_heads=G, dtype=torch.float64)
        real, later = mask[row], mask[row].flip(0)
        own = None
        if real.any():
            _, own = run(first[row : row + 1, real], alone, None)
            expected, _ = run(second[row : row + 1, later], alone, own)
            assert_close(out[row, later], expected[0], SAME_FORMULA, f"row {row}")
        if kind is KNNAttention:
            assert int(together.lengths[row]) == int(alone.lengths), f"row {row}"


def test_a_masked_token_sees_nothing() -> None:
    attention = layer(xl_max_memories=0)
    torch.nn.init.zeros_(attention.to_out.bias)
    mask = torch.tensor(MASKS["inside"]).bool()
    out, _ = attention(hidden(), mask=mask)
    assert (out[~mask] == 0.0).all() and (out[mask] != 0.0).all()


def test_of_a_model_masked_tokens_are_as_if_they_were_not_there() -> None:
    model = build(xl_max_memories=X, clear_memories_on_sos_token_id=0)
    ids = torch.randint(1, 30, (B, 2 * N), generator=torch.Generator().manual_seed(5))
    ids[1, 9] = 0
    mask = torch.tensor(MASKS["inside"]).bool()
    mask = torch.cat((mask, mask.flip(1)), dim=1)
    memories, caches, logits = model.create_knn_memories(batch_size=B), None, []
    for segment, real in zip(ids.split(N, dim=1), mask.split(N, dim=1), strict=True):
        out, caches = model(segment, memories, xl_memories=caches, mask=real)
        logits.append(out)
    found = torch.cat(logits, dim=1)
    for row in range(B):
        alone, cache, expected = model.create_knn_memories(batch_size=1), None, []
        for segment, real in zip(ids[row].split(N), mask[row].split(N), strict=True):
            out, cache = model(segment[real][None], alone, xl_memories=cache)
            expected.append(out[0])
        assert_close(found[row, mask[row]], torch.cat(expected), SAME_GRAPH, f"row {row}")
        assert int(memories[0].lengths[row]) == int(alone[0].lengths)


def build(**options: Any) -> MemorizingTransformer:
    torch.manual_seed(0)
    arguments = {
        "num_tokens": 30, "dim": DIM, "depth": 3, "dim_head": D, "heads": H, "kv_heads": G, "memorizing_layers": 2,
        "max_knn_memories": 64, "num_retrieved_memories": 3,
    }  # fmt: skip
    return MemorizingTransformer(**{**arguments, **options}).eval()


def projected(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = attention.project(x)
    return query, key.repeat_interleave(H // G, dim=1), value.repeat_interleave(H // G, dim=1)


def test_not_causal_it_is_pytorchs_attention_with_a_bias_by_distance_on_either_side() -> None:
    attention, x = layer(causal=False), hidden()
    query, key, value = projected(attention, x)
    place = torch.arange(N)
    bias = TABLE[:, (place[:, None] - place).abs().clamp(max=TABLE.shape[1] - 1)]
    expected = F.scaled_dot_product_attention(query, key, value, bias[None], scale=attention.scale)
    out, cache = attention(x, rel_pos_bias=TABLE)
    assert cache is None
    assert_close(out, attention.to_out(expected.transpose(1, 2).flatten(2)), SAME_FORMULA)


LENGTHS = torch.tensor([4, 0], device="cpu")


@pytest.mark.parametrize(
    ("kind", "options"),
    [(Attention, {}), *((KNNAttention, options) for options in ({}, {"combine": "gate"}, {"attend_to": "all"}))],
)
def test_not_causal_no_token_sees_the_padding_that_lengths_put_behind_it(kind: type, options: dict[str, Any]) -> None:
    """Outputs, what is stored and gradients are those of each row alone, in two segments."""
    attention = layer(kind, causal=False, **options)
    together, inputs = memory(), [hidden().requires_grad_(), hidden(seed=2).requires_grad_()]

    def run(x: Tensor, of: KNNMemory, **given: Any) -> Tensor:
        out, _ = attention(x, rel_pos_bias=TABLE, **given, **({"knn_memory": of} if kind is KNNAttention else {}))
        return out

    def gradients(loss: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(loss, [*inputs, *attention.parameters()], allow_unused=True)

    counts = [LENGTHS, LENGTHS.flip(0)]
    found, expected = [run(x, together, lengths=real) for x, real in zip(inputs, counts, strict=True)], []
    for row in range(B):
        alone = KNNMemory(dim=D, max_memories=40, num_indices=1, kv_heads=G, dtype=torch.float64)
        for out, x, real in zip(found, inputs, counts, strict=True):
            if real[row]:
                expected.append((out[row, : real[row]], run(x[row : row + 1, : real[row]], alone)[0]))
        if kind is KNNAttention:
            assert int(together.lengths[row]) == int(alone.lengths) == 4
    for of_both, of_alone in expected:
        assert_close(of_both, of_alone, SAME_FORMULA)
    sides = (gradients(sum(side.square().sum() for side in pair)) for pair in zip(*expected, strict=True))
    for of_both, of_alone in zip(*sides, strict=True):
        assert (of_both is None) == (of_alone is None)
        if of_both is not None:
            assert_close(of_both, of_alone, SAME_FORMULA)


def test_a_model_that_is_not_causal_sees_no_padding_that_lengths_put_behind_a_text() -> None:
    model = build(causal=False)
    ids = torch.randint(1, 30, (B, N), generator=torch.Generator().manual_seed(5))
    memories = model.create_knn_memories(batch_size=B)
    logits = model(ids, memories, lengths=LENGTHS)
    alone = model(ids[:1, :4], model.create_knn_memories(batch_size=1))
    assert_close(logits[0, :4], alone[0], SAME_GRAPH)
    assert memories[0].lengths.tolist() == LENGTHS.tolist() and logits.isfinite().all()


def test_a_cap_and_a_sink_are_in_the_softmax() -> None:
    attention, x = layer(soft_cap=0.7, sink=True), hidden()
    query, key, value = projected(attention, x)
    logits = 0.7 * (query @ key.transpose(-1, -2) * attention.scale / 0.7).tanh()
    logits = logits.masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf)
    logits = torch.cat((logits, attention.sink[:, None, None].expand(B, -1, N, 1)), dim=-1)
    expected = logits.softmax(-1)[..., :-1] @ value
    out, _ = attention(x)
    assert_close(out, attention.to_out(expected.transpose(1, 2).flatten(2)), SAME_FORMULA)
    out.sum().backward()
    assert attention.sink.grad is not None and (attention.sink.grad != 0.0).all()


def test_cosines_of_a_plain_layer_are_scaled_by_what_each_head_learned_and_cached_as_unit_keys() -> None:
    attention, first, second = layer(similarity="cosine", xl_max_memories=N), hidden(), hidden(seed=2)
    _, cache = attention(first)
    out, _ = attention(second, xl_memory=cache)
    out.sum().backward()
    given = attention.scale.grad.clone(), attention.to_q.weight.grad.clone()
    attention.zero_grad()
    _, old_key, old_value = (tensor.detach() for tensor in projected(attention, first))
    query, key, value = projected(attention, second)
    keys = F.normalize(torch.cat((old_key, key), dim=-2), dim=-1)
    logits = attention.scale.exp() * (F.normalize(query, dim=-1) @ keys.transpose(-1, -2))
    hidden_keys = torch.ones(N, 2 * N).triu(N + 1).bool()
    expected = logits.masked_fill(hidden_keys, -torch.inf).softmax(-1) @ torch.cat((old_value, value), dim=-2)
    expected = attention.to_out(expected.transpose(1, 2).flatten(2))
    expected.sum().backward()
    assert_close(out, expected, SAME_FORMULA)
    assert_close(given[0], attention.scale.grad, SAME_FORMULA, "gradient of the scale")
    assert_close(given[1], attention.to_q.weight.grad, SAME_FORMULA, "gradient of the queries' projection")
    assert_close(cache[..., 0, :].norm(dim=-1), torch.ones(B, G, N).double(), SAME_FORMULA, "cached keys")


@pytest.mark.parametrize("combine", ["softmax", "gate"])
def test_products_are_plain_attention_over_retrieved_and_local_keys(combine: str) -> None:
    """All that was stored is retrieved, so that a joint softmax is attention to both segments without a bias."""
    options = {"similarity": "product", "learn_scale": False, "bias_out": True, "num_retrieved_memories": N}
    attention, of_memory = layer(KNNAttention, combine=combine, **options), memory()
    torch.nn.init.constant_(attention.scale, torch.log(torch.tensor(D**-0.5, dtype=torch.float64)))
    first, second = hidden(), hidden(seed=2)
    attention(first, knn_memory=of_memory)
    out, _ = attention(second, knn_memory=of_memory)
    _, old_key, old_value = projected(attention, first)
    query, key, value = projected(attention, second)
    hide = torch.ones(N, N).triu(1).bool()
    far, near = query @ old_key.transpose(-1, -2) / D**0.5, query @ key.transpose(-1, -2) / D**0.5
    near = near.masked_fill(hide, -torch.inf)
    if combine == "softmax":
        expected = torch.cat((far, near), -1).softmax(-1) @ torch.cat((old_value, value), -2)
    else:
        gate = attention.memory_gate.sigmoid()[:, None, None]
        expected = gate * (far.softmax(-1) @ old_value) + (1 - gate) * (near.softmax(-1) @ value)
    assert_close(out, attention.to_out(expected.transpose(1, 2).flatten(2)), SAME_FORMULA)
    assert attention.to_out.bias is not None and not attention.scale.requires_grad


def test_a_query_mask_takes_the_neighbours_of_a_query_alone() -> None:
    attention, of_memory = layer(KNNAttention, num_retrieved_memories=3), memory()
    attention(hidden(), knn_memory=of_memory)
    mask = torch.tensor(MASKS["inside"]).bool()
    x, read_only = hidden(seed=2), {"add_knn_memory": False}
    some, _ = attention(x, knn_memory=of_memory, query_mask=mask, **read_only)
    with_all, _ = attention(x, knn_memory=of_memory, **read_only)
    without, _ = attention(x, knn_memory=memory(), **read_only)
    assert_close(some, torch.where(mask[..., None], with_all, without), SAME_FORMULA)


def test_the_defaults_of_products_are_those_of_plain_layers() -> None:
    attention = KNNAttention(dim=DIM, dim_head=D, similarity="product")
    assert_close(attention.temperature(), torch.full((8,), D**-0.5), SAME_GRAPH)
    assert_close(KNNAttention(dim=DIM, dim_head=D).temperature(), torch.full((8,), 20.0), SAME_GRAPH)


def test_cosines_of_plain_layers_start_with_logits_that_vary_as_those_of_products() -> None:
    model = build(plain_similarity="cosine")
    plain, of_memory = (
        [attention.fn.scale.exp().flatten() for attention, _ in model.layers if isinstance(attention.fn, kind)]
        for kind in (Attention, KNNAttention)
    )
    assert plain and of_memory
    assert_close(torch.cat(plain), torch.full_like(torch.cat(plain), D**0.5), SAME_GRAPH)
    assert_close(torch.cat(of_memory), torch.full_like(torch.cat(of_memory), 20.0), SAME_GRAPH)


@pytest.mark.parametrize(
    "options",
    [{"soft_cap": 3.0, "sink": True, "similarity": "product"}, {"plain_similarity": "cosine"}],
    ids=["everything", "cosines in all layers"],
)
def test_what_a_model_reads_its_decoder_reads_the_same(options: dict[str, Any]) -> None:
    model = build(xl_max_memories=X, **options)
    for module in model.modules():
        if getattr(module, "sink", None) is not None:
            torch.nn.init.normal_(module.sink)
    ids = torch.randint(1, 30, (1, 3 * N), generator=torch.Generator().manual_seed(5))
    memories, caches, logits = model.create_knn_memories(batch_size=1), None, []
    for segment in ids.split(N, dim=1):
        out, caches = model(segment, memories, xl_memories=caches)
        logits.append(out[0])
    expected, decoder = torch.cat(logits), Decoder(model, 1, segment=N)
    assert_close(decoder.read([ids[0, :8]])[0], expected[7], SAME_GRAPH)
    for place in range(8, 3 * N):
        assert_close(decoder.step(ids[:, place])[0], expected[place], SAME_GRAPH, f"token {place}")


def test_a_model_that_is_not_causal_sees_both_ways() -> None:
    model = build(causal=False)
    ids = torch.randint(1, 30, (1, N), generator=torch.Generator().manual_seed(5))
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % 30
    first, second = (model(x, model.create_knn_memories(batch_size=1)) for x in (ids, other))
    assert (first[0, 0] != second[0, 0]).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build(causal=False, xl_max_memories=4), "xl_max_memories must be 0 with causal=False, got 4"),
        (lambda: build(causal=False, clear_memories_on_sos_token_id=1), "causal must be True with clear_memories_on"),
        (lambda: Decoder(build(causal=False), 1), "model must be causal to be read by the token"),
        (lambda: layer(causal=False)(hidden(), xl_memory=torch.zeros(B, G, 3, 2, D)), "xl_memory must be None with"),
        (lambda: layer(soft_cap=-1.0), "soft_cap must be a finite number above 0, or None, got -1.0"),
        (lambda: layer(KNNAttention, similarity="dot"), "similarity must be one of cosine, product, got 'dot'"),
        (lambda: layer()(hidden(), mask=torch.ones(B, N + 1).bool()), r"mask must have shape \(B, N\) with B=2, N=6"),
        (
            lambda: layer()(hidden(), mask=torch.ones(B, N).bool(), rel_pos_bias=torch.zeros(1, H, N, N).double()),
            r"rel_pos_bias must be by distance, \(H, distances\), beside a mask",
        ),
        (
            lambda: layer(causal=False)(hidden(), lengths=LENGTHS, rel_pos_bias=torch.zeros(1, H, N, N).double()),
            r"rel_pos_bias must be by distance, \(H, distances\), beside lengths with causal=False, got a dense one",
        ),
    ],
)  # fmt: skip
def test_errors_name_argument_value_and_expectation(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_mask_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match=r"mask must be torch.bool, got torch.int64"):
        layer()(hidden(), mask=torch.ones(B, N).long())
