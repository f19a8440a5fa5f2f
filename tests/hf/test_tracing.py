"""What a trace says of a pretrained model's memory, against the attention of one pass over everything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checks import PARITY, assert_close
from helpers.hf_families import made, tokens
from safetensors.torch import load, save
from torch import Tensor

from memtrans.hf import add_memory, load_memory

LENGTH, ASKED = 24, 12
EXACT: dict[str, Any] = {"max_memories": 100, "k": LENGTH, "segment": LENGTH, "sink": 0, "offset": 0.0}


def dense(positions: Tensor, weights: Tensor) -> Tensor:
    """Weights (H, Q, K) by position (H, Q, LENGTH)."""
    by_position = torch.zeros(*weights.shape[:2], LENGTH + 1, dtype=weights.dtype)
    return by_position.scatter_add(2, positions + 1, weights)[..., 1:]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
@torch.no_grad()
def test_weights_are_those_of_one_pass_over_document_and_question(family: str) -> None:
    """Every entry is a neighbour, so attention to them and to the local keys is the model's own over both."""
    model, ids = made(family, torch.float64), tokens(length=LENGTH + ASKED)
    model.set_attn_implementation("eager")
    attentions = model(ids, output_attentions=True).attentions
    memory = add_memory(model, **EXACT)
    memory.read(ids[:, :LENGTH])
    with memory.tracing(local=True) as trace:
        model(ids[:, LENGTH:])
    for layer, expected in enumerate(attentions):
        for row in range(2):
            to_memory, to_local = expected[row, :, LENGTH:].split([LENGTH, ASKED], dim=2)
            assert_close(dense(trace.positions(row, layer), trace.weights(row, layer)), to_memory, PARITY, "memory")
            assert_close(trace.local_weights(row, layer)[0], to_local, PARITY, "local")
    found = trace.tokens(1)
    assert [found[at] for at in range(LENGTH)] == ids[1, :LENGTH].tolist()


@torch.no_grad()
def test_a_pass_that_is_interrupted_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    model, question = made("llama"), tokens(length=6, seed=2)
    memory = add_memory(model, max_memories=100, k=8, segment=16)
    memory.read(tokens(length=30))
    with memory.tracing() as trace:
        with monkeypatch.context() as patched:
            patched.setattr(model.model.layers[1].self_attn, "forward", interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(question)
        model(question)
    assert [trace.positions(0, layer).shape[1] for layer in (0, 1)] == [6, 6]


@torch.no_grad()
def test_generating_is_traced_as_a_pass_over_the_same_text() -> None:
    model, ids, question = made("llama", torch.float64), tokens(length=60), tokens(length=6, seed=2)
    memory = add_memory(model, max_memories=100, k=8, segment=16)
    memory.read(ids)
    with memory.tracing() as trace:
        text = model.generate(question, max_new_tokens=5, do_sample=False, eos_token_id=None)
    with memory.tracing() as expected:
        model(text[:, :-1])
    for row in range(2):
        assert torch.equal(trace.positions(row, 1), expected.positions(row, 1))
        assert_close(trace.weights(row, 1), expected.weights(row, 1), PARITY, "weights")
        assert trace.weights(row, 1).shape == (4, 10, 8)
        assert not trace.weights(row, 1)[:, 0].any()  # the first token looks at no memory


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_positions_are_those_of_the_document_and_stay_with_the_entries(side: str, tmp_path: Path) -> None:
    """Through segments whose first token is not stored, padding, a full memory, a row that begins anew, and files."""
    model, ids, mask = made("llama"), tokens(length=40), torch.ones(2, 40, dtype=torch.int64)
    mask[1, slice(None, 7) if side == "left" else slice(-7, None)] = 0
    memory = add_memory(model, max_memories=21, k=21, segment=16, offset=0.0)
    documents = [ids[0], ids[1][mask[1].bool()]]
    memory.read(ids, mask)
    memory.clear_rows(torch.tensor([True, False]))
    more = tokens(length=18, seed=5)
    memory.read(more)
    documents = [more[0], torch.cat((documents[1], more[1]))]
    memory.save(tmp_path)
    memory.remove()
    memory = load_memory(model, tmp_path)
    for _ in range(2):
        with memory.tracing() as trace:
            model(tokens(length=4, seed=3))
        for row, document in enumerate(documents):
            found = trace.tokens(row)
            assert set(found.values()) <= set(document.tolist()) and len(found) == len(memory.ids(row))
            assert all(document[position] == token for position, token in found.items())
        again = tokens(length=5, seed=6)
        memory.read(again)  # goes on counting behind what a file held
        documents = [torch.cat((document, new)) for document, new in zip(documents, again, strict=True)]


@torch.no_grad()
def test_a_file_that_says_no_positions_is_read_and_counts_from_its_oldest_entry(tmp_path: Path) -> None:
    model = made("llama")
    memory = add_memory(model, max_memories=50, segment=16)
    memory.read(tokens(length=16))
    memory.save(tmp_path)
    path = tmp_path / "memories.safetensors"
    before = path.read_bytes()
    state = load(before)
    state["ids.values"] = state["ids.keys"].clone()
    del state["read"]
    size = int.from_bytes(before[:8], "little")
    metadata = json.loads(before[8 : 8 + size])["__metadata__"]
    path.write_bytes(save(state, metadata))
    memory.load(tmp_path)
    with memory.tracing() as trace:
        model(tokens(length=4, seed=3))
    assert trace.tokens(0) == dict(enumerate(tokens(length=16)[0, 1:].tolist()))


@torch.no_grad()
def test_a_gate_shares_the_weights_out() -> None:
    model, ids = made("llama", torch.float64), tokens(length=30)
    memory = add_memory(model, max_memories=100, k=8, segment=16, combine="gate", offset=-1.0)
    memory.read(ids)
    with memory.tracing() as trace:
        model(ids[:, :5])
    share = torch.tensor(-1.0).sigmoid().double()
    assert_close(trace.weights(0, 1).sum(-1)[:, 1:], share.expand(4, 4), PARITY, "shares")
    with pytest.raises(ValueError, match="local must be False"), memory.tracing(local=True):
        model(ids[:, :5])


@torch.no_grad()
def test_without_ids_positions_count_what_is_stored() -> None:
    model, ids = made("llama"), tokens(length=20)
    memory = add_memory(model, max_memories=100, k=50, segment=16, keep_ids=False, offset=0.0)
    memory.read(ids)
    with memory.tracing() as trace:
        model(ids[:, :3])
    assert trace.tokens(0) == {} and set(trace.positions(0, 0).flatten().tolist()) == {-1, *range(18)}
    assert trace.citations(0)[2].best[0].token is None


def test_a_pass_that_is_run_again_for_its_gradients_is_noted_once() -> None:
    model = made("llama")
    model.gradient_checkpointing_enable()
    memory = add_memory(model, max_memories=100, segment=16)
    memory.read(tokens(length=16))
    with memory.tracing() as trace:
        model.train()
        model(tokens(length=6, seed=1), use_cache=False).logits.sum().backward()
    assert trace.weights(0, 0).shape[1] == 6
    with pytest.raises(ValueError, match="one trace at a time"), memory.tracing(), memory.tracing():
        pass
