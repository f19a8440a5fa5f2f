"""A model without a vocabulary: embeddings in, what is before the logits out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.checks import SAME_GRAPH, assert_close
from helpers.devices import DEVICE, seeded

from memtrans import MemorizingTransformer, generate

SMALL = {"dim": 16, "depth": 3, "dim_head": 8, "heads": 2, "memorizing_layers": (2,), "max_knn_memories": 40}
EMBEDS = torch.randn(3, 2, 8, 16, generator=seeded(0))


def build(**options) -> MemorizingTransformer:
    torch.manual_seed(0)
    return MemorizingTransformer(**{**SMALL, "num_tokens": None, **options})


def test_22_4_it_gives_what_a_model_with_a_vocabulary_gives_before_its_logits() -> None:
    model, other = build(), build(num_tokens=30)
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
    assert set(missing) == {"token_emb.weight", "to_logits.1.weight", "to_logits.1.bias"} and not unexpected
    memories, others = (m.create_knn_memories(batch_size=2, device=DEVICE) for m in (model, other))
    for x in EMBEDS:
        expected = other(inputs_embeds=x, knn_memories=others, return_embeddings=True)
        assert_close(model(inputs_embeds=x, knn_memories=memories), expected, SAME_GRAPH)
    assert memories[0].lengths.tolist() == [24, 24]


def test_22_4_it_is_trained_through_and_every_parameter_has_a_gradient() -> None:
    model, x = build(), EMBEDS[0].clone().requires_grad_()
    model(inputs_embeds=x, knn_memories=model.create_knn_memories(batch_size=2)).square().mean().backward()
    assert x.grad is not None and all(parameter.grad is not None for parameter in model.parameters())
    assert not any("token_emb" in name for name, _ in model.named_parameters())


def test_22_4_xl_caches_and_checkpointing_are_as_in_any_model() -> None:
    model = build(xl_max_memories=4, activation_checkpointing=True)
    memories, cache = model.create_knn_memories(batch_size=2), None
    for x in EMBEDS:
        hidden, cache = model(inputs_embeds=x, knn_memories=memories, xl_memories=cache)
    hidden.sum().backward()
    assert memories[0].lengths.tolist() == [20, 20]


def test_22_4_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model = build(memorizing_layers=()).eval()
    model.save_pretrained(tmp_path)
    loaded = MemorizingTransformer.from_pretrained(tmp_path, device=DEVICE)
    assert loaded.num_tokens is None and loaded.config == model.config
    assert torch.equal(loaded(inputs_embeds=EMBEDS[0]), model(inputs_embeds=EMBEDS[0]))


TOKENS = torch.zeros(2, 8, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(TOKENS), ValueError, "num_tokens must be given to a model that reads tokens, got None: it ta"),
        (lambda m: m(inputs_embeds=EMBEDS[0], labels=TOKENS), ValueError, "labels must be None in a model without a v"),
        (lambda m: m(inputs_embeds=EMBEDS[0][..., :7]), ValueError, r"inputs_embeds must have shape \(B, N, 16\), got"),
        (lambda m: m(inputs_embeds=EMBEDS[0].double()), TypeError, "inputs_embeds must be torch.float32 like the weig"),
        (
            lambda m: generate(m, "a", 3),
            ValueError,
            "num_tokens must be given to a model that reads tokens",
        ),
        (lambda m: m.resize_token_embeddings(9), ValueError, "new_num_tokens must be given to a model whose token_e"),
    ],
)
def test_22_4_what_needs_a_vocabulary_says_so(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(build(memorizing_layers=()))


def test_22_4_no_token_can_clear_its_memory() -> None:
    with pytest.raises(ValueError, match=r"clear_memories_on_eos_token_id must be None without a vocabulary .*, got 3"):
        build(clear_memories_on_eos_token_id=3)
