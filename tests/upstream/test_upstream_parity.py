"""With `legacy=True` the model is upstream's: the same logits, loss and gradients, from the same parameters.

Upstream's approximate index is replaced by an exact one, and its memory stays below its capacity and unscoped, where it
is right.
"""

from __future__ import annotations

import faiss
import memorizing_transformers_pytorch as upstream
import memorizing_transformers_pytorch.knn_memory as upstream_memory
import memorizing_transformers_pytorch.memorizing_transformers_pytorch as upstream_model
import pytest
import torch
from helpers.checks import PARITY, assert_close

import memtrans

BATCH, SEGMENT, VOCABULARY = 2, 20, 40
SMALL = {"num_tokens": VOCABULARY, "dim": 24, "depth": 4, "dim_head": 8, "heads": 3, "num_retrieved_memories": 5}

CONFIGURATIONS = {
    "one memory layer": {},
    "two memory layers": {"memorizing_layers": (2, 3)},
    "memory layers given as an int": {"memorizing_layers": 4},
    "no memory layer": {"memorizing_layers": ()},
    "xl cache in every layer": {"xl_max_memories": 20},
    "xl cache shorter than a segment": {"xl_max_memories": 7},
    "xl cache longer than a segment": {"xl_max_memories": 33},
    "xl cache in two layers": {"xl_max_memories": 20, "xl_memory_layers": (3, 4)},
    "xl cache outside the memory layer": {"xl_max_memories": 20, "xl_memory_layers": (1, 4), "memorizing_layers": (2,)},
    "memory shift": {"memorizing_layers": (2, 3, 4), "shift_knn_memories_down": 1},
    "xl shift": {"xl_max_memories": 16, "shift_xl_memories_down": 1},
    "both shifts": {
        "memorizing_layers": (2, 4),
        "shift_knn_memories_down": 1,
        "xl_max_memories": 16,
        "shift_xl_memories_down": 2,
    },
    "read-only memory": {"memorizing_layers": (2, 3), "read_only_after": 2},
    "many neighbours": {"num_retrieved_memories": 64},
    "narrow feed-forward": {"ff_mult": 2, "pad_id": 3},
    "memory in layer one": {"memorizing_layers": (1,), "xl_max_memories": 5},
}


@pytest.fixture(autouse=True)
def exact_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_memory.faiss, "IndexHNSWFlat", lambda dim, *_: faiss.IndexFlatIP(dim))


def read_document(model, memories, tokens, read_only_after: int) -> dict[str, torch.Tensor]:
    """Five segments in a row, one backward: logits, losses and every parameter's gradient."""
    xl_memories, results, total = None, {}, torch.zeros(())
    for segment in range(5):
        here = tokens[:, segment * SEGMENT : (segment + 1) * SEGMENT]
        labels = tokens[:, segment * SEGMENT + 1 : (segment + 1) * SEGMENT + 1]
        arguments = {"knn_memories": memories, "xl_memories": xl_memories}
        logits = model(here, add_knn_memory=False, **arguments)
        outcome = model(here, labels=labels, add_knn_memory=segment < read_only_after, **arguments)
        if model.num_xl_memory_layers:
            (logits, _), (outcome, xl_memories) = logits, outcome
        results[f"logits of segment {segment}"] = logits.detach()
        results[f"loss of segment {segment}"] = outcome.detach()
        total = total + outcome
    model.zero_grad()
    total.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return results | {f"gradient of {name}": grad for name, grad in gradients.items() if grad is not None}


@pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_logits_loss_and_gradients_equal_upstreams(configuration, tmp_path):
    configuration = {**SMALL, **configuration}
    read_only_after = configuration.pop("read_only_after", 5)
    torch.manual_seed(0)
    theirs = upstream.MemorizingTransformer(
        **configuration, max_knn_memories=500, knn_memories_directory=str(tmp_path), knn_memory_multiprocessing=False
    )
    ours = memtrans.MemorizingTransformer(**configuration, max_knn_memories=500, legacy=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    tokens = torch.randint(0, VOCABULARY, (BATCH, 5 * SEGMENT + 1))

    expected = read_document(theirs, theirs.create_knn_memories(batch_size=BATCH), tokens, read_only_after)
    memories = ours.create_knn_memories(batch_size=BATCH, spare=5 * SEGMENT)
    actual = read_document(ours, memories, tokens, read_only_after)

    assert actual.keys() >= expected.keys()
    assert not any(actual[name].any() for name in actual.keys() - expected.keys())  # of biases that no layer uses
    for name, tensor in expected.items():
        assert_close(actual[name], tensor, PARITY, name)


@pytest.mark.parametrize("gate_output", [False, True])
@pytest.mark.parametrize("dense_bias", [False, True])
@pytest.mark.parametrize("xl_max_memories", [0, 6])
def test_the_layer_equals_upstreams(gate_output, dense_bias, xl_max_memories, tmp_path):
    torch.manual_seed(1)
    options = {
        "dim": 24,
        "heads": 3,
        "dim_head": 8,
        "num_retrieved_memories": 5,
        "xl_max_memories": xl_max_memories,
        "gate_output": gate_output,
    }
    theirs, ours = upstream.KNNAttention(**options), memtrans.KNNAttention(**options)
    if gate_output:
        torch.nn.init.constant_(theirs.output_gate, 0.7)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    memory = upstream.KNNMemory(8, 100, BATCH, memmap_filename=str(tmp_path / "memory"), multiprocessing=False)
    our_memory = memtrans.KNNMemory(8, 100, BATCH)
    inputs = torch.randn(3, BATCH, SEGMENT, 24)
    bias = torch.randn(1, 3, SEGMENT, SEGMENT + xl_max_memories) if dense_bias else None

    for module, knn_memory, seen in ((theirs, memory, expected := {}), (ours, our_memory, actual := {})):
        xl_memory = None
        for segment, x in enumerate(inputs):
            x = x.clone().requires_grad_()
            out, xl_memory = module(x, knn_memory=knn_memory, xl_memory=xl_memory, rel_pos_bias=bias)
            out.square().sum().backward()
            seen[f"output {segment}"], seen[f"gradient of input {segment}"] = out.detach(), x.grad
            if xl_memory is not None:
                seen[f"cache {segment}"] = xl_memory
        seen |= {name: parameter.grad for name, parameter in module.named_parameters()}

    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(actual[name], tensor, PARITY, name)


def test_the_relative_position_bias_equals_upstreams():
    theirs = upstream_model.T5RelativePositionBias(scale=3.0, heads=4)
    ours = memtrans.T5RelativePositionBias(scale=3.0, heads=4)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    causal = torch.ones(300, 300).tril().bool()
    expected = theirs(300, 300, device="cpu")[..., causal]
    assert torch.equal(ours(300, 300, device="cpu")[..., causal], expected)
