"""Layers and models whose values are of another width than their keys."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.checks import SAME_FORMULA, SAME_GRAPH, assert_close
from torch import Tensor

from memtrans import Attention, KNNAttention, KNNMemory, MemorizingTransformer, generate
from memtrans.generation.decoder import Decoder

D, E, DIM, H = 4, 6, 12, 4
GROUPS = [1, 2]
pytestmark = pytest.mark.device


def layer(kind: type, groups: int, **arguments: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"dim": DIM, "heads": H, "dim_head": D, "kv_heads": groups}
    return kind(**{**sizes, "value_dim_head": E, **arguments}).double()


def with_wide_keys(narrow: Any, kind: type, groups: int, **arguments: Any) -> Any:
    """The same function in a layer of one width: zeros behind queries and keys add nothing to their products."""
    wide = kind(dim=DIM, heads=H, dim_head=E, kv_heads=groups, **arguments).double()
    state = narrow.state_dict()
    keys, values = state["to_kv.weight"].split((groups * D, groups * E))
    state["to_q.weight"] = filled_up(state["to_q.weight"], H)
    state["to_kv.weight"] = torch.cat((filled_up(keys, groups), values))
    wide.load_state_dict(state)
    wide.scale = narrow.scale
    return wide


def filled_up(weight: Tensor, heads: int) -> Tensor:
    return F.pad(weight.unflatten(0, (heads, D)), (0, 0, 0, E - D)).flatten(0, 1)


def memories(groups: int) -> list[KNNMemory]:
    sizes: dict[str, Any] = {"max_memories": 9, "num_indices": 2, "kv_heads": groups, "dtype": torch.float64}
    return [KNNMemory(D, value_dim=E, **sizes), KNNMemory(E, **sizes)]


FORMS: list[dict[str, Any]] = [{}, {"combine": "gate"}, {"xl_max_memories": 3}, {"sink": True, "soft_cap": 2.0}]


@pytest.mark.parametrize("arguments", FORMS, ids=str)
@pytest.mark.parametrize("groups", GROUPS)
def test_a_memorizing_layer_is_one_of_wider_keys_that_are_zero_there(groups: int, arguments: dict[str, Any]) -> None:
    arguments = {"num_retrieved_memories": 3, **arguments}
    mine = layer(KNNAttention, groups, **arguments)
    layers = [mine, with_wide_keys(mine, KNNAttention, groups, **arguments)]
    x, lengths = torch.randn(2, 10, DIM, dtype=torch.float64), torch.tensor([5, 3])
    results = []
    for of_one, memory in zip(layers, memories(groups), strict=True):
        first, cache = of_one(x[:, :5], knn_memory=memory)
        second, cache = of_one(x[:, 5:], knn_memory=memory, xl_memory=cache, lengths=lengths)
        results.append((first, second, memory.entries().values))
        held = arguments.get("xl_max_memories", 0)
        pair = (1, D + E) if of_one is mine else (2, E)
        assert (cache is None) if not held else cache.shape == (2, *((groups,) if groups > 1 else ()), held, *pair)
    for name, x, y in zip(("first", "second", "values"), *results, strict=True):
        assert_close(x, y, SAME_FORMULA, name)


@pytest.mark.parametrize("groups", GROUPS)
def test_a_plain_layer_with_a_cache_and_padding_and_its_gradients(groups: int) -> None:
    arguments: dict[str, Any] = {"xl_max_memories": 4}
    mine = layer(Attention, groups, **arguments)
    layers = [mine, with_wide_keys(mine, Attention, groups, **arguments)]
    x, mask = torch.randn(2, 10, DIM, dtype=torch.float64), torch.ones(2, 5, dtype=torch.bool)
    mask[1, :2] = mask[0, 3] = False
    results = []
    for of_one in layers:
        of_one.zero_grad()
        first, cache = of_one(x[:, :5])
        second, cache = of_one(x[:, 5:], xl_memory=cache, mask=mask)
        (first.square().sum() + second.square().sum()).backward()
        results.append((first, second, of_one.to_out.weight.grad))
    assert cache.shape[-2:] == (2, E)
    for x, y in zip(*results, strict=True):
        assert_close(x, y, SAME_FORMULA)


@pytest.mark.cpu
def test_copies_pickles_and_layers_of_old() -> None:
    attention = layer(KNNAttention, 1)
    for again in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert again.widths == (D, E)
    plain = Attention(dim=DIM, heads=H, dim_head=D)
    state = plain.__getstate__()
    del state["value_dim_head"]  # as before there was one
    old = Attention.__new__(Attention)
    old.__setstate__(state)
    assert old.widths == (D, D)


@pytest.mark.cpu
def test_errors_name_argument_value_and_expectation() -> None:
    attention = layer(KNNAttention, 2, xl_max_memories=3)
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    narrow = KNNMemory(D, 9, 2, kv_heads=2)
    with pytest.raises(ValueError, match=r"knn_memory must have .* dim=4, value_dim=6, got .*kv_heads=2 and dim=4"):
        attention(x, knn_memory=narrow)
    fitting = memories(2)[0]
    with pytest.raises(ValueError, match=r"xl_memory must have shape \(2, 2, 3, 1, 10\), got \(2, 2, 3, 2, 4\)"):
        attention(x, knn_memory=fitting, xl_memory=torch.zeros(2, 2, 3, 2, D, dtype=torch.float64))
    with pytest.raises(ValueError, match="value_dim_head must be at least 1, got 0"):
        Attention(dim=DIM, value_dim_head=0)
    assert fitting.lengths.tolist() == [0, 0]


# ------------------------------------------------------------------------------------------------------------- model

SIZES: dict[str, Any] = {"num_tokens": 50, "dim": DIM, "depth": 3, "dim_head": D, "heads": H, "memorizing_layers": 2,
                         "max_knn_memories": 40, "num_retrieved_memories": 3, "value_dim_head": E}  # fmt: skip


def model_of(**arguments: Any) -> MemorizingTransformer:
    torch.manual_seed(0)
    return MemorizingTransformer(**{**SIZES, **arguments}).eval()


@pytest.mark.parametrize("arguments", [{}, {"xl_max_memories": 4, "kv_heads": 2}], ids=str)
def test_a_model_reads_token_by_token_what_it_reads_in_segments(arguments: dict[str, Any]) -> None:
    model, tokens = model_of(**arguments), torch.randint(0, 50, (2, 23))
    memories, caches, logits = model.create_knn_memories(batch_size=2), None, []
    assert memories[0].value_dim == E
    for segment in tokens.split(8, dim=1):
        result = model(segment, knn_memories=memories, xl_memories=caches)
        of_segment, caches = result if model.num_xl_memory_layers else (result, None)
        logits.append(of_segment)
    decoder = Decoder(model, batch=2, segment=8)
    read = decoder.read(list(tokens[:, :5]))
    assert_close(read, torch.cat(logits, dim=1)[:, 4], SAME_GRAPH)
    for place in range(5, 23):
        read = decoder.step(tokens[:, place])
        assert_close(read, torch.cat(logits, dim=1)[:, place], SAME_GRAPH)
    assert decoder.memories[0].entries().values.shape[-1] == E


@pytest.mark.cpu
def test_a_model_is_saved_and_loaded_with_its_memories(tmp_path: Any) -> None:
    model = model_of(xl_max_memories=4)
    memories = model.create_knn_memories(batch_size=2)
    model(torch.randint(0, 50, (2, 9)), knn_memories=memories)
    model.save_pretrained(tmp_path, memories=memories)
    again = MemorizingTransformer.from_pretrained(tmp_path)
    assert (again.value_dim_head, again.config["value_dim_head"]) == (E, E)
    held = again.load_memories(tmp_path)
    assert torch.equal(held[0].entries().values, memories[0].entries().values)
    other = model_of(value_dim_head=None)
    with pytest.raises(ValueError, match="must hold memories of dim=4 and kv_heads=1, got dim=4, value_dim=6 and kv"):
        other.load_memories(tmp_path)
    assert generate(again, torch.randint(0, 50, (2, 5)), tokens=3, memories=held).shape == (2, 3)


@pytest.mark.cpu
def test_checkpointing_changes_nothing() -> None:
    tokens, labels = torch.randint(0, 50, (2, 2, 9)), torch.randint(1, 50, (2, 9))
    results = []
    for arguments in ({}, {"activation_checkpointing": True}):
        model = model_of(xl_max_memories=4, **arguments).train()
        memories = model.create_knn_memories(batch_size=2)
        _, caches = model(tokens[0], knn_memories=memories)
        loss, _ = model(tokens[1], knn_memories=memories, xl_memories=caches, labels=labels)
        loss.backward()
        results.append([loss, *(weight.grad for weight in model.parameters() if weight.grad is not None)])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@pytest.mark.slow
def test_a_compiled_model_is_the_same() -> None:
    tokens, model = torch.randint(0, 50, (2, 2, 9)), model_of()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = []
    for of_one in (model, compiled):
        memories = model.create_knn_memories(batch_size=2)
        model(tokens[0], knn_memories=memories)
        outputs.append(of_one(tokens[1], knn_memories=memories))
    assert_close(*outputs, SAME_GRAPH)
