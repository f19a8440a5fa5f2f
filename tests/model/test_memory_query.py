"""A memory that is asked with a query of its own: one softmax in float64 over what each of two queries looks at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.checks import ATTENTION, SAME_FORMULA, SAME_GRAPH, assert_close
from helpers.devices import seeded
from torch import Tensor

from memtrans import KNNAttention, KNNMemory, MemorizingTransformer

B, N, DIM, H, D, K, M = 2, 6, 16, 4, 4, 3, 15
TABLE = torch.randn(H, 7, dtype=torch.float64, generator=seeded(7))
OWN = ("memory_mix", "memory_sharpness")
LAYERS: dict[str, dict[str, Any]] = {
    "cosines": {},
    "products and an offset": {"similarity": "product", "memory_offset": -0.7},
    "groups": {"kv_heads": 2, "memory_offset": 0.3},
    "a memory for each head": {"kv_heads": H},
    "gate": {"combine": "gate"},
    "cap and sink": {"soft_cap": 0.8, "sink": True, "memory_offset": 0.3},
    "gate, cap and sink": {"soft_cap": 0.8, "sink": True, "combine": "gate"},
    "values of their own width": {"value_dim_head": 3},
    "both ways": {"causal": False},
}
MASKS = {"all see": None, "some see": torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 1, 1, 1, 1]]).bool()}


def layer(**options: Any) -> KNNAttention:
    torch.manual_seed(0)
    sizes = {"dim": DIM, "heads": H, "dim_head": D, "num_retrieved_memories": K, "memory_query": "own"}
    made = KNNAttention(**{**sizes, **options}).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made


def memory(of: KNNAttention, entries: int = 9) -> KNNMemory:
    """A document with so many entries, and one with none."""
    options = {"kv_heads": of.kv_heads, "dtype": torch.float64, "value_dtype": torch.float64, "device": "cpu"}
    made = KNNMemory(D, M, B, value_dim=of.value_dim_head, spare=N, **options)
    if entries:
        keys, values = (
            torch.randn(B, of.kv_heads, entries, width, dtype=torch.float64, generator=seeded(width))
            for width in (D, of.value_dim_head)
        )
        made.snapshot(like=keys, longest=entries).append(keys, values)
        made.clear_rows(torch.tensor([False, True]))
    return made


def hidden(seed: int = 1) -> Tensor:
    return torch.randn(B, N, DIM, dtype=torch.float64, generator=seeded(seed))


def capped(of: KNNAttention, products: Tensor) -> Tensor:
    return products if of.soft_cap is None else of.soft_cap * (products / of.soft_cap).tanh()


def defined(of: KNNAttention, x: Tensor, held: KNNMemory, mask: Tensor | None) -> Tensor:
    """The layer, one document and head at a time."""
    query, key, value = of.project(x)
    if of.similarity == "cosine":
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    assert of.memory_mix is not None and of.memory_sharpness is not None
    distance = torch.arange(N)[:, None] - torch.arange(N)
    entries, out = held.entries(), []
    for b in range(B):
        keys, values = (kept[b].reshape(of.kv_heads, M, -1) for kept in (entries.keys, entries.values))
        for h in range(H):
            g, scale = h * of.kv_heads // H, of.temperature()[h]
            asked = query[b, h] + query[b, h] @ of.memory_mix[h]
            found = (asked @ keys[g].T).masked_fill(~entries.mask[b], -torch.inf)
            seen = found >= found.topk(K, dim=-1).values[:, -1:]
            seen = seen & entries.mask[b] & (torch.ones(N, 1).bool() if mask is None else mask[b][:, None])
            if of.attend_to == "all":
                seen = entries.mask[b] & (torch.ones(N, 1).bool() if mask is None else mask[b][:, None])
            to_memory = capped(of, scale * of.memory_sharpness[h].exp() * (asked @ keys[g].T))
            if of.memory_offset is not None:
                to_memory = to_memory + of.memory_offset[h]
            to_memory = to_memory.masked_fill(~seen, -torch.inf)
            apart = distance if of.causal else distance.abs()
            to_local = capped(of, scale * query[b, h] @ key[b, g].T) + TABLE[h, apart.clamp(0, TABLE.shape[1] - 1)]
            if of.causal:
                to_local = to_local.masked_fill(distance < 0, -torch.inf)
            if of.sink is not None:
                to_local = torch.cat((to_local, of.sink[h].expand(N, 1)), dim=1)
            local_value = value[b, g] if of.sink is None else F.pad(value[b, g], (0, 0, 0, 1))
            if of.memory_gate is None:
                weights = torch.cat((to_memory, to_local), dim=1).softmax(dim=1)
                out.append(weights @ torch.cat((values[g], local_value)))
                continue
            share = torch.where(seen.any(dim=1, keepdim=True), of.memory_gate[h].sigmoid(), 0.0)
            retrieved = to_memory.masked_fill(~seen.any(dim=1, keepdim=True), 0.0).softmax(dim=1) @ values[g]
            out.append(share * retrieved + (1.0 - share) * (to_local.softmax(dim=1) @ local_value))
    return of.to_out(torch.stack(out).unflatten(0, (B, H)).transpose(1, 2).flatten(2))


def gradients(of: KNNAttention, out: Tensor, x: Tensor) -> dict[str, Tensor]:
    """The result, and every gradient of it, which are left behind."""
    of.zero_grad()
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    assert x.grad is not None
    found = {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **found}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("attend_to", ["neighbours", "all"])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_two_queries_share_one_softmax(options: dict[str, Any], attend_to: str, mask: Tensor | None) -> None:
    """Results and all gradients, those of the memory's own query among them."""
    of = layer(attend_to=attend_to, **options)
    held = memory(of)
    x, again = (hidden().requires_grad_() for _ in range(2))
    expected = gradients(of, defined(of, again, held, mask), again)
    out, _ = of(x, knn_memory=held, rel_pos_bias=TABLE, query_mask=mask, add_knn_memory=False)
    actual = gradients(of, out, x)
    assert actual.keys() == expected.keys() >= set(OWN)
    for name, tensor in expected.items():
        assert_close(actual[name], tensor, SAME_FORMULA, name)
    assert all(actual[name].abs().sum() > 0 for name in OWN)


@pytest.mark.parametrize("attend_to", ["neighbours", "all"])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_it_is_the_shared_one_at_first(options: dict[str, Any], attend_to: str) -> None:
    of, shared = (layer(attend_to=attend_to, memory_query=kind, **options) for kind in ("own", "shared"))
    assert set(of.state_dict()) - set(shared.state_dict()) == set(OWN)
    with torch.no_grad():
        for name, parameter in of.named_parameters():
            parameter.copy_(torch.zeros(()) if name in OWN else shared.get_parameter(name))
    results = []
    for one in (of, shared):
        x = hidden().requires_grad_()
        results.append(gradients(one, one(x, knn_memory=memory(one), rel_pos_bias=TABLE)[0], x))
    for name, tensor in results[1].items():
        assert_close(results[0][name], tensor, SAME_FORMULA, name)


@pytest.mark.parametrize("attend_to", ["neighbours", "all"])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_of_an_empty_memory_it_learns_nothing(options: dict[str, Any], attend_to: str) -> None:
    of, x = layer(attend_to=attend_to, **options), hidden().requires_grad_()
    found = gradients(of, of(x, knn_memory=memory(of, entries=0), rel_pos_bias=TABLE)[0], x)
    assert all(torch.equal(found[name], torch.zeros_like(found[name])) for name in OWN)
    assert all(tensor.isfinite().all() for tensor in found.values())


# --------------------------------------------------------------------------------------------------------- the model


def model(**options: Any) -> MemorizingTransformer:
    torch.manual_seed(0)
    sizes = {"num_tokens": 30, "dim": DIM, "depth": 2, "heads": H, "dim_head": D, "memorizing_layers": (1, 2)}
    memories = {"max_knn_memories": M, "num_retrieved_memories": K, "pad_id": -1, "memory_query": "own"}
    made = MemorizingTransformer(**{**sizes, **memories, **options})
    for name, parameter in made.named_parameters():
        if name.endswith(OWN):
            torch.nn.init.normal_(parameter, std=0.4)
    return made


def test_a_pass_that_is_run_again_learns_the_same() -> None:
    found = []
    for recomputed in (False, True):
        reading = model(activation_checkpointing=recomputed, kv_heads=2)
        ids = torch.randint(0, 30, (B, 3 * N), generator=seeded(5))
        memories = reading.create_knn_memories(batch_size=B, spare=3 * N)
        torch.stack([reading(part, memories, labels=part) for part in ids.split(N, dim=1)]).sum().backward()
        found.append({name: p.grad for name, p in reading.named_parameters() if p.grad is not None})
    for name, tensor in found[0].items():
        assert_close(found[1][name], tensor, SAME_GRAPH, name)


@pytest.mark.parametrize("combine", ["softmax", "gate"])
@torch.no_grad()
def test_in_bfloat16_it_is_what_it_is_in_float32(combine: str) -> None:
    """With what was stored before, whichever way the numbers got there."""
    of = layer(combine=combine).float()
    held, x = memory(of), hidden().float()
    read_only = {"knn_memory": held, "add_knn_memory": False}
    expected, _ = of(x, **read_only)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = of(x, **read_only)
    assert found.dtype == torch.bfloat16
    assert_close(found, expected, 2 * ATTENTION[torch.bfloat16], "under autocast")
    found, _ = of.bfloat16()(x.bfloat16(), **read_only)
    assert_close(found, expected, 2 * ATTENTION[torch.bfloat16], "in bfloat16")


def test_a_saved_model_says_so_and_one_of_before_asks_as_it_did(tmp_path: Path) -> None:
    saved, ids = model().eval(), torch.randint(0, 30, (1, N), generator=seeded(5))
    saved.save_pretrained(tmp_path)
    loaded = MemorizingTransformer.from_pretrained(tmp_path)
    assert loaded.config["memory_query"] == "own"
    with torch.no_grad():
        logits = [one(ids, one.create_knn_memories(batch_size=1)) for one in (saved, loaded)]
    assert torch.equal(*logits)
    before = model(memory_query="shared")
    del before.config["memory_query"]
    again = MemorizingTransformer(**before.config)
    again.load_state_dict(before.state_dict())
    assert again.config["memory_query"] == "shared"


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match="memory_query must be one of shared, own, got 'mine'"):
        layer(memory_query="mine")
