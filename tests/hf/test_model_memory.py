"""What a memory holds after reading and writing, and what a pass sees of it."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checks import ATTENTION, PARITY, assert_close
from helpers.hf_families import made, tokens
from torch import Tensor
from transformers import PreTrainedModel

from memtrans.hf import ModelMemory, add_memory, load_memory, memory_of

SIZES: dict[str, Any] = {"max_memories": 100, "k": 8, "segment": 16}


@pytest.fixture
def model() -> PreTrainedModel:
    return made("llama")


def logits_of(model: PreTrainedModel, ids: Tensor, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **arguments).logits


def held(memory: ModelMemory) -> list[list[int]]:
    return [memory.ids(document).tolist() for document in range(len(memory.lengths))]


def test_reading_stores_all_but_the_first_token_of_each_segment(model: PreTrainedModel) -> None:
    memory, ids = add_memory(model, **SIZES), tokens(length=40)
    memory.read(ids)
    kept = [*range(1, 16), *range(17, 32), *range(33, 40)]
    assert memory.lengths.tolist() == [37, 37]
    assert held(memory) == ids[:, kept].tolist()


def test_reading_goes_on_where_it_stopped_and_forgets_the_oldest(model: PreTrainedModel) -> None:
    memory = add_memory(model, **{**SIZES, "max_memories": 20, "sink": 0})
    memory.read(tokens(length=16))
    memory.read(tokens(length=16, seed=1))
    assert held(memory) == torch.cat((tokens(length=16), tokens(length=16, seed=1)), 1)[:, -20:].tolist()


def test_what_is_read_without_a_search_depends_on_its_own_segment_alone(model: PreTrainedModel) -> None:
    memory, ids = add_memory(model, offset=2.0, **SIZES), tokens(length=32)

    def last(search: bool, begin: int) -> Tensor:
        memory.reset()
        memory.read(ids[:, begin:], search=search)
        assert memory._entries is not None
        return memory._entries.memories[1].state_dict()["keys"][:, -15:]

    assert torch.equal(last(False, 0), last(False, 16))
    assert not torch.allclose(last(True, 0), last(True, 16))


def test_what_heads_have_learned_to_ask_is_saved(model: PreTrainedModel, tmp_path: Path) -> None:
    memory, question = add_memory(model, **SIZES), tokens(length=6, seed=2)
    memory.read(tokens(length=30))
    for layer in memory.layers.values():
        layer.learned.learn_to_ask()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.normal_(std=0.3)
    memory.save(tmp_path)
    again = made("llama")
    load_memory(again, tmp_path)
    assert torch.equal(logits_of(again, question), logits_of(model, question))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_read_as_if_it_were_alone(model: PreTrainedModel, side: str) -> None:
    ids, question = tokens(length=40), tokens(length=6, seed=3)
    mask = torch.ones_like(ids)
    real = slice(7, None) if side == "left" else slice(None, -7)
    mask[1, : 7 if side == "left" else None] = 0 if side == "left" else 1
    if side == "right":
        mask[1, -7:] = 0
    memory = add_memory(model, **SIZES)
    memory.read(ids, mask)
    together, lengths = logits_of(model, question)[1:], memory.lengths.tolist()
    memory.reset()
    memory.read(ids[1:, real])
    assert lengths == [37, int(memory.lengths)]
    assert_close(together, logits_of(model, question[1:]), PARITY, "the padded row")


def test_writing_passes_count_the_real_tokens_of_a_padded_row(model: PreTrainedModel) -> None:
    memory, mask = add_memory(model, **SIZES), torch.ones(2, 16, dtype=torch.int64)
    mask[1, :5] = 0
    ids, question = tokens(length=16), tokens(length=6, seed=3)
    with memory.writing():
        logits_of(model, ids, attention_mask=mask)
    together = logits_of(model, question)[1:]
    memory.reset()
    with memory.writing():
        logits_of(model, ids[1:, 5:])
    assert_close(together, logits_of(model, question[1:]), PARITY, "the padded row")


def test_only_reading_and_writing_add(model: PreTrainedModel) -> None:
    memory, ids = add_memory(model, **SIZES), tokens(length=8)
    logits_of(model, ids)
    assert memory.lengths.tolist() == []
    memory.read(ids)
    logits_of(model, ids)
    model.generate(ids, max_new_tokens=3, do_sample=False)
    assert memory.lengths.tolist() == [7, 7]
    with memory.writing():
        logits_of(model, ids)
    assert memory.lengths.tolist() == [14, 14]


def test_the_first_token_of_a_pass_looks_at_no_memory(model: PreTrainedModel) -> None:
    memory, ids = add_memory(model, **SIZES), tokens(length=8)
    plain = logits_of(model, ids)
    memory.read(tokens(length=16, seed=1))
    assert_close(logits_of(model, ids)[:, 0], plain[:, 0], PARITY, "the first token")
    assert not torch.allclose(logits_of(model, ids)[:, 1], plain[:, 1], atol=1e-3)


def test_a_document_that_begins_finds_nothing_of_the_one_before(model: PreTrainedModel) -> None:
    memory, ids = add_memory(model, **SIZES), tokens(length=16, seed=1)
    memory.read(tokens(length=16))
    with memory.writing():
        cleared = logits_of(model, ids, new_document=torch.tensor([False, True]))
        assert memory.lengths.tolist() == [30, 15]
        memory.reset()
        assert torch.equal(cleared[1], logits_of(model, ids)[1])
    memory.clear_rows(torch.tensor([True, False]))
    assert memory.lengths.tolist() == [0, 15]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda memory: memory.ids(2), ValueError, "document must be one that was read, got 2 of 2"),
        (lambda memory: memory.ids(-1), ValueError, "document must be one that was read, got -1 of 2"),
        (lambda memory: memory.ids([0]), TypeError, r"document must be an integer, got \[0\]"),
        (lambda memory: memory.clear_rows([True, False]), TypeError, "mask must be a torch.Tensor, got list"),
        (lambda memory: memory.clear_rows(torch.tensor([0])), ValueError, "mask must be a bool tensor of shape"),
    ],
)
def test_documents_that_it_does_not_hold_are_refused(
    model: PreTrainedModel, call: Any, error: type[Exception], message: str
) -> None:
    memory = add_memory(model, **SIZES)
    memory.read(tokens(length=8))
    with pytest.raises(error, match=message):
        call(memory)
    assert memory.lengths.tolist() == [7, 7]


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ([True, False], TypeError, "new_document must be a torch.Tensor, got list"),
        (torch.tensor([True]), ValueError, r"new_document must be a bool tensor of shape \(2,\), got .* \(1,\)"),
        (torch.tensor([0, 2]), ValueError, r"new_document must be 1 where a document begins and else 0, got \[0, 2\]"),
    ],
)
def test_flags_of_another_kind_are_refused_and_nothing_is_forgotten(
    model: PreTrainedModel, flags: Any, error: type[Exception], message: str
) -> None:
    memory = add_memory(model, **SIZES)
    memory.read(tokens(length=8))
    with memory.writing(), pytest.raises(error, match=message):
        logits_of(model, tokens(length=8), new_document=flags)
    assert memory.lengths.tolist() == [7, 7]


def test_a_view_of_the_newest_entries_is_a_smaller_memory(model: PreTrainedModel) -> None:
    ids, question, small = tokens(length=16), tokens(length=6, seed=1), made("llama")
    memory = add_memory(model, **{**SIZES, "sink": 0})
    add_memory(small, **{**SIZES, "sink": 0, "max_memories": 5}).read(ids)
    memory.read(ids)
    with memory.newest(5):
        assert_close(logits_of(model, question), logits_of(small, question), PARITY, "logits")
    assert not torch.allclose(logits_of(model, question), logits_of(small, question), atol=1e-3)


def test_a_pass_that_writes_inside_a_view_of_the_newest_adds_behind_all_of_them(model: PreTrainedModel) -> None:
    memory, ids, more = add_memory(model, **{**SIZES, "sink": 0}), tokens(length=16), tokens(length=6, seed=1)
    memory.read(ids)
    with memory.newest(5, behind=3):
        seen = logits_of(model, more)
        with memory.writing():
            assert_close(logits_of(model, more), seen, PARITY, "logits")
    assert held(memory) == torch.cat((ids, more), 1).tolist()


def test_one_document_serves_several_questions(model: PreTrainedModel) -> None:
    memory, questions = add_memory(model, **SIZES), tokens(batch=6, length=7, seed=2)
    memory.read(tokens(length=30))
    with memory.expand(3):
        together = logits_of(model, questions)
        with memory.writing(), pytest.raises(ValueError, match="must not be inside expand"):
            model(questions)
    for question in range(3):
        alone = logits_of(model, questions[[question, 3 + question]])
        assert_close(together[[question, 3 + question]], alone, PARITY, f"question {question} of each document")


@pytest.mark.parametrize("arguments", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}])
def test_beams_and_return_sequences_share_a_document(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    memory, prompt = add_memory(model, **SIZES), tokens(length=7, seed=2)
    memory.read(tokens(length=30))
    torch.manual_seed(0)
    with memory.expand(3):
        written = model.generate(
            prompt, max_new_tokens=5, output_logits=True, return_dict_in_generate=True, **arguments
        )
        rows = written.sequences if "num_beams" not in arguments else written.sequences.repeat_interleave(3, 0)
        whole = logits_of(model, rows[:, :-1])[:, 6:]
    if "num_beams" not in arguments:
        assert_close(torch.stack(written.logits, 1), whole, PARITY, "logits")
    assert written.sequences.shape[1] == 12


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_written_token_has_the_logits_of_one_pass(cache: str, attention: str, padded: bool) -> None:
    model = made("llama", attn_implementation=attention)
    memory, prompt = add_memory(model, **SIZES), tokens(length=9, seed=2)
    memory.read(tokens(length=30))
    mask = torch.ones_like(prompt)
    if padded:
        mask[1, :4] = 0
    said = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    implementation = {} if cache == "dynamic" else {"cache_implementation": "static"}
    written = model.generate(prompt, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, **said, **implementation)
    whole = torch.cat((mask, torch.ones(2, 4, dtype=torch.int64)), 1)
    positions = (whole.cumsum(-1) - 1).clamp(min=0)
    once = logits_of(model, written.sequences[:, :-1], attention_mask=whole, position_ids=positions)
    assert_close(torch.stack(written.logits, 1), once[:, 8:], PARITY, "logits")


def test_what_is_saved_comes_back(model: PreTrainedModel, tmp_path: Path) -> None:
    memory, question = add_memory(model, layers=[1], offset=-0.5, **SIZES), tokens(length=6, seed=2)
    memory.read(tokens(length=30))
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.normal_()
    before, ids = logits_of(model, question), held(memory)
    memory.save(tmp_path)
    again = made("llama")
    loaded = load_memory(again, tmp_path)
    assert torch.equal(logits_of(again, question), before)
    assert (held(loaded), loaded.settings.offset, loaded.numbers) == (ids, -0.5, [1])
    other = add_memory(made("llama"), layers=[0], **SIZES)
    with pytest.raises(ValueError, match=r"layers \[0\], got \[1\]"):
        other.load(tmp_path)


def test_a_copy_of_a_model_and_its_memory_is_their_own(model: PreTrainedModel) -> None:
    memory, question = add_memory(model, **SIZES), tokens(length=6, seed=2)
    memory.read(tokens(length=30))
    before = logits_of(model, question)
    other, its = copy.deepcopy((model, memory))
    assert torch.equal(logits_of(other, question), before)
    its.reset()
    assert not torch.equal(logits_of(other, question), before)
    assert torch.equal(logits_of(model, question), before)
    its.remove()
    assert not any("memtrans" in name for name, _ in other.named_modules())
    assert torch.equal(logits_of(model, question), before)


def test_a_copy_of_a_model_alone_has_a_memory_that_is_found_outside_of_every_context(model: PreTrainedModel) -> None:
    memory, question = add_memory(model, **SIZES), tokens(length=6, seed=2)
    memory.read(tokens(length=30))
    before = logits_of(model, question)
    with memory.training(), memory.tracing():
        logits_of(model, tokens(length=6))  # an evaluation's
        other = copy.deepcopy(model)
        assert torch.equal(logits_of(other, question), before)
        assert memory_of(model) is memory
    its = memory_of(other)
    assert its.lengths.tolist() == [28, 28]
    memory.reset()
    assert torch.equal(logits_of(other, question), before)
    its.remove()
    with pytest.raises(ValueError, match="model must have a memory, got LlamaForCausalLM without one: add_memory"):
        memory_of(other)


def test_a_model_that_was_saved_whole_has_its_memory_in_a_process_that_adds_none(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    memory, question = add_memory(model, **SIZES), tokens(length=6, seed=2)
    memory.read(tokens(length=30))
    torch.save((model, question, logits_of(model, question)), tmp_path / "whole.pt")
    load = """
import sys, torch
model, question, before = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    assert torch.equal(model(question).logits, before)
"""
    done = subprocess.run([sys.executable, "-c", load, tmp_path / "whole.pt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_copy_has_the_state_that_every_version_has_saved_whole(model: PreTrainedModel) -> None:
    memory = add_memory(model, **SIZES)
    memory.read(tokens(length=30))
    fixed = {"decoder", "layers", "settings", "numbers", "dtype", "is_rotary", "_handles"}
    with memory.training(), memory.newest(5), memory.reading_again():
        logits_of(model, tokens(length=6))  # an evaluation's
        state = memory.__getstate__()
    assert set(state) == {*fixed, "_held"}
    assert type(state["_held"]) is dict and {*state["_held"]} == {"read"}


def test_a_context_that_ends_first_leaves_the_others_as_they_are(model: PreTrainedModel) -> None:
    """A Trainer's callback enters and leaves one from hooks, whatever a caller does meanwhile."""
    memory = add_memory(model, **SIZES)
    memory.read(tokens(length=30))
    writing, off = memory.writing(), memory.off()
    writing.__enter__()
    off.__enter__()
    writing.__exit__(None, None, None)
    assert (memory.is_writing, memory.is_off) == (False, True)
    off.__exit__(None, None, None)
    assert (memory.is_writing, memory.is_off) == (False, False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_model_that_is_cast_goes_on_with_what_its_memory_holds(model: PreTrainedModel, dtype: torch.dtype) -> None:
    memory, question = add_memory(model, offset=0.5, **SIZES), tokens(length=6, seed=2)
    memory.read(tokens(length=30))
    before = logits_of(model, question)
    model.to(dtype)
    assert_close(logits_of(model, question).float(), before, 2 * ATTENTION[torch.float16], "logits")
    memory.read(tokens(length=30))
    assert memory.lengths.tolist() == [56, 56]


def test_a_saved_model_loads_without_a_memory(model: PreTrainedModel, tmp_path: Path) -> None:
    ids, plain = tokens(length=6), logits_of(model, tokens(length=6))
    add_memory(model, **SIZES)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(type(model).from_pretrained(tmp_path).eval(), ids), plain)


def test_a_memory_has_the_dtype_of_the_keys() -> None:
    memory = add_memory(made("llama", torch.bfloat16), **SIZES)
    memory.read(tokens())
    assert memory._entries is not None
    assert {entry.dtype for entry in memory._entries.memories.values()} == {torch.bfloat16}
    assert memory.bytes_per_document == 2 * 2 * 2 * 8 * 116 * 2


def test_a_large_memory_says_its_bytes_before_it_takes_them(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memtrans.hf.held.LARGE", 100)
    add_memory(model, **SIZES).reset(3)
    assert "a memory of 3 documents in 2 layers takes 0.00 GB" in caplog.text
