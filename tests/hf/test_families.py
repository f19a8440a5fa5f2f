"""A memory that has nothing to say leaves every family's model what it was; what cannot have one is refused by name."""

from __future__ import annotations

import pytest
import torch
from helpers.checks import PARITY, assert_close
from helpers.hf_families import FAMILIES, ORACLE, REFUSED, left_padded, made, tokens
from torch import Tensor
from transformers import PreTrainedModel, T5Config, T5EncoderModel, T5ForConditionalGeneration

from memtrans.hf import add_memory

SIZES = {"max_memories": 100, "k": 8, "segment": 24}


def logits_of(model: PreTrainedModel) -> Tensor:
    """Of the real tokens of two rows."""
    mask = left_padded()
    with torch.no_grad():
        return model(tokens(), attention_mask=mask).logits[mask.bool()]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_closed_or_absent_memory_changes_nothing(family: str) -> None:
    model = made(family)
    plain = logits_of(model)
    memory = add_memory(model, offset=-torch.inf, **SIZES)
    memory.reset(2)
    assert_close(logits_of(model), plain, PARITY, "with an empty memory")
    memory.read(tokens(seed=1))
    assert memory.lengths.tolist() == [23, 23]
    assert_close(logits_of(model), plain, PARITY, "with a closed memory")
    with memory.off():
        assert torch.equal(logits_of(model), plain)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.zero_()
    assert not torch.equal(logits_of(model), plain), "the memory is never looked at"
    memory.remove()
    assert torch.equal(logits_of(model), plain)
    assert not any("memtrans" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gate_that_is_closed_changes_no_bit(family: str) -> None:
    model = made(family)
    plain = logits_of(model)
    memory = add_memory(model, combine="gate", offset=-torch.inf, **SIZES)
    memory.reset(2)
    assert torch.equal(logits_of(model), plain)
    memory.read(tokens(seed=1))
    assert torch.equal(logits_of(model), plain)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.zero_()
    assert not torch.equal(logits_of(model), plain), "the memory is never looked at"


@pytest.mark.parametrize("family", ORACLE)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_memory_of_everything_is_one_pass_over_both_segments(family: str, attention: str) -> None:
    model = made(family)
    if attention == "sdpa" and not model._supports_sdpa:
        attention = "eager"  # capped logits, sinks
    model.set_attn_implementation(attention)
    both = tokens(length=48)
    with torch.no_grad():
        whole = model(both).logits[:, 24:]
        memory = add_memory(model, offset=0.0, **{**SIZES, "k": 24}, sink=0)
        memory.read(both[:, :24])
        assert memory.lengths.tolist() == [24, 24]
        assert_close(model(both[:, 24:]).logits, whole, PARITY, "the second segment")


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_have_a_memory_is_refused_by_name(family: str) -> None:
    model = made(family)
    before = logits_of(model)
    with pytest.raises(ValueError, match=rf"(?i)model must .*{family.replace('_', '')}"):
        add_memory(model, **SIZES)
    assert torch.equal(logits_of(model), before)
    assert not any("memtrans" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("kind", [T5ForConditionalGeneration, T5EncoderModel])
def test_encoders_are_refused_with_decoders_or_without(kind: type[PreTrainedModel]) -> None:
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    with pytest.raises(ValueError, match=f"model must .*{kind.__name__[:2]}"):
        add_memory(kind(config).eval(), **SIZES)
