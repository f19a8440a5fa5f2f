"""Gradients through a pass that searches a memory, and the ways in which people train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checks import PARITY, SAME_GRAPH, assert_close
from helpers.hf_families import made, tokens
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, StaticCache, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from memtrans.hf import MemoryCallback, ModelMemory, add_memory, document_rows, load_memory

SIZES: dict[str, Any] = {"max_memories": 100, "k": 8, "segment": 16}
FINITE_DIFFERENCE, AGREES = 1e-6, 1e-6


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Of the next token, in the logits' own dtype: transformers' goes through float32."""
    return cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Norm(nn.Module):
    """Llama's, without its detour through float32, in which finite differences drown."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden * (hidden.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def in_float64() -> PreTrainedModel:
    model = made("llama", torch.float64)
    model.model.norm = Norm(model.model.norm.weight)
    for layer in model.model.layers:
        layer.input_layernorm = Norm(layer.input_layernorm.weight)
        layer.post_attention_layernorm = Norm(layer.post_attention_layernorm.weight)
    return model


def learned(memory: ModelMemory, form: str = "mix") -> None:
    """Heads that ask the memory with another query than the local keys."""
    generator = torch.Generator().manual_seed(0)
    for layer in memory.layers.values():
        layer.learned.learn_to_ask(form)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.data = parameter.data.double().normal_(std=0.2, generator=generator)


@pytest.mark.parametrize("combine", ["softmax", "gate"])
@pytest.mark.parametrize("form", ["offset", "mix", "across"])
def test_gradients_are_those_of_finite_differences(combine: str, form: str) -> None:
    model = in_float64()
    memory = add_memory(model, combine=combine, offset=0.0, **SIZES)
    memory.read(tokens(length=30))
    for parameter in memory.parameters():
        parameter.data = parameter.data.double()
    learned(memory, form)
    ids, attention = tokens(length=12, seed=1), model.model.layers[1].self_attn
    asked = [
        *(
            [(attention.memtrans.memory_gain, (1, 3)), (attention.memtrans.memory_mix, (2, 3, 5))]
            if form != "offset"
            else []
        ),
        *(
            [(attention.memtrans.memory_across, (3, 5)), (attention.memtrans.memory_across, (5, 3))]
            if form == "across"
            else []
        ),
        (attention.memtrans.memory_offset, (1,)),
        (attention.q_proj.weight, (2, 3)),
        (attention.k_proj.weight, (1, 1)),
    ]
    loss_of(model, ids).backward()
    with torch.no_grad():
        for parameter, at in asked:
            losses = []
            for step in (FINITE_DIFFERENCE, -FINITE_DIFFERENCE):
                before = parameter[at].clone()
                parameter[at] += step
                losses.append(loss_of(model, ids))
                parameter[at] = before
            difference = (losses[0] - losses[1]) / (2 * FINITE_DIFFERENCE)
            assert parameter.grad is not None
            assert abs(float(difference - parameter.grad[at])) <= AGREES * max(1.0, abs(float(difference)))


def test_a_pass_with_gradients_has_the_logits_of_one_without() -> None:
    model = in_float64()
    memory = add_memory(model, offset=0.0, **SIZES)
    memory.read(tokens(length=30))
    before = model(tokens(length=12, seed=1)).logits
    learned(memory)
    with_gradients = model(tokens(length=12, seed=1)).logits
    with torch.no_grad():
        assert_close(with_gradients, model(tokens(length=12, seed=1)).logits, PARITY, "logits")
    assert not torch.allclose(with_gradients, before)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("asks", [False, True])
def test_checkpointing_recomputes_the_same_and_stores_once(reentrant: bool, asks: bool) -> None:
    def gradients(change: Callable[[PreTrainedModel], Any]) -> tuple[list[Tensor], list[int]]:
        model = made("llama", torch.float64)
        memory = add_memory(model, **SIZES)
        memory.read(tokens(length=30))
        if asks:
            learned(memory)
        change(model.train())
        with memory.writing():
            loss_of(model, tokens(length=12, seed=1)).backward()
        return [p.grad for p in model.parameters() if p.grad is not None], memory.lengths.tolist()

    plain, lengths = gradients(lambda model: None)
    again, stored = gradients(
        lambda model: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    )
    assert stored == lengths == [28 + 11] * 2
    assert len(plain) == len(again) and all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_whole_model_is_refused_and_changes_nothing(reentrant: bool) -> None:
    model, ids = made("llama").train(), tokens(length=12, seed=1)
    memory = add_memory(model, **SIZES)
    memory.read(tokens(length=30))
    embeds, begins = model.get_input_embeddings()(ids), torch.tensor([False, True])
    with memory.writing():
        logits = checkpoint(
            lambda given: model(inputs_embeds=given, new_document=begins).logits, embeds, use_reentrant=reentrant
        )
        with pytest.raises(RuntimeError, match=r"got a forward pass that a backward pass runs again: .*_enable\(\)"):
            logits.sum().backward()
    assert memory.lengths.tolist() == [28 + 11, 11]


def test_what_a_memory_learns_has_a_gradient_wherever_it_was_made(tmp_path: Path) -> None:
    model, again = made("llama"), made("llama")
    with torch.inference_mode():
        memory = add_memory(model, **SIZES)
        memory.read(tokens(length=30))
        for layer in memory.layers.values():
            layer.learned.learn_to_ask()
        memory.save(tmp_path)
        loaded = load_memory(again, tmp_path)
    loss_of(again, tokens(length=12, seed=1)).backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["offset", "next"])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_compiles_without_a_break(training: bool, form: str) -> None:
    segments = tokens(length=12), tokens(length=12, seed=1)

    def logits(change: Callable[[PreTrainedModel], Any]) -> tuple[list[Tensor], list[int]]:
        torch._dynamo.reset()
        model = made("llama").train(training)
        memory = add_memory(model, **SIZES)
        if form != "offset":
            learned(memory, form)
            model.float()
        memory.reset(2)
        called = change(model)
        with torch.no_grad(), memory.writing():
            return [called(ids, use_cache=False).logits for ids in segments], memory.lengths.tolist()

    plain, lengths = logits(lambda model: model)
    compiled, stored = logits(lambda model: torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert stored == lengths == [22, 22]
    for one, other in zip(compiled, plain, strict=True):
        assert_close(one, other, SAME_GRAPH, "logits")


@pytest.mark.slow
@torch.no_grad()
def test_a_step_with_a_static_cache_compiles_without_a_break() -> None:
    model, prompt = made("llama"), tokens(length=9, seed=2)
    memory = add_memory(model, **SIZES)
    memory.read(tokens(length=30))
    plain = model(torch.cat((prompt, tokens(length=3, seed=4)), 1), use_cache=False).logits[:, 9:]
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache, found = StaticCache(config=model.config, max_cache_len=16), []
    model(prompt, past_key_values=cache, use_cache=True)
    for place, token in enumerate(tokens(length=3, seed=4).split(1, dim=1), start=9):
        mask = (torch.arange(16) <= place)[None, None, None]
        said = {"position_ids": torch.full((1, 1), place), "past_key_values": cache, "use_cache": True}
        found.append(step(token, attention_mask=mask, **said).logits)
    assert_close(torch.cat(found, 1), plain, PARITY, "logits")


@pytest.mark.parametrize("first", ["memory", "lora"])
def test_low_rank_adapters_come_before_or_after(first: str) -> None:
    model, ids = made("llama"), tokens(length=12, seed=1)
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["memtrans"] if first == "memory" else None)
    memory = add_memory(model, **SIZES) if first == "memory" else None
    adapted = get_peft_model(model, lora)
    memory = memory or add_memory(adapted, **SIZES)
    memory.read(tokens(length=30))
    loss_of(adapted, ids).backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    assert sum("lora_B" in name for name in trained) == 2
    assert sum("memory_offset" in name for name in trained) == 2
    assert memory.lengths.tolist() == [28, 28]


@pytest.mark.parametrize("training", [False, True])
def test_what_an_adapter_learned_of_values_is_in_what_is_stored(training: bool) -> None:
    held = []
    for adapts in (False, True):
        model = made("llama").train(training)
        memory = add_memory(model, **SIZES)
        if adapts:
            get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["memtrans"])).train(training)
        learned(memory, "next")
        model.float()
        with memory.writing():
            model(tokens(length=12))
        assert memory._entries is not None
        held.append(memory._entries.memories[0].entries().values)
    assert_close(held[1], held[0], PARITY, "values")


def test_what_an_adapter_learned_of_the_memory_is_saved_and_taken_up(tmp_path: Path) -> None:
    model = made("llama")
    memory = add_memory(model, **SIZES)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["memtrans"]))
    calibrated = [layer.learned for layer in memory.layers.values()]
    for layer in calibrated:
        layer.learn_to_ask("mix")
        for parameter in layer.parameters():
            parameter.data.normal_()
    assert [parameter.requires_grad for parameter in memory.parameters()] == [True] * 10
    memory.save(tmp_path)
    again = load_memory(made("llama"), tmp_path)
    for mine, its in zip(again.parameters(), memory.parameters(), strict=True):
        assert torch.equal(mine, its)
    memory.load(tmp_path)
    assert [layer.learned for layer in memory.layers.values()] == calibrated
    with adapted.disable_adapter():
        assert not any(parameter.requires_grad for parameter in memory.parameters())


def arguments(directory: Path, **changed: Any) -> TrainingArguments:
    given = {"remove_unused_columns": False, "max_steps": 6, "per_device_train_batch_size": 2, "use_cpu": True}
    given |= {"per_device_eval_batch_size": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    return TrainingArguments(output_dir=str(directory), **{**given, **changed})


def test_a_trainer_reads_documents_to_their_end(tmp_path: Path) -> None:
    model, lengths = made("llama"), []
    memory = add_memory(model, **{**SIZES, "sink": 0})

    class Watched(MemoryCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            lengths.append(memory.lengths.tolist())

    documents = [tokens(1, 64)[0].tolist(), tokens(1, 24)[0].tolist(), tokens(1, 64)[0].tolist()]
    rows = document_rows(documents, batch=2, segment=16)
    evaluation = document_rows(documents[:1], batch=1, segment=16)
    said = arguments(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=4)
    trainer = Trainer(model, said, train_dataset=rows, eval_dataset=evaluation, callbacks=[Watched(memory)])
    before = [parameter.detach().clone() for parameter in memory.parameters()]
    trainer.train()
    assert lengths == [[16, 16], [32, 24], [48, 16], [64, 32]]
    assert any(not torch.equal(p, old) for p, old in zip(memory.parameters(), before, strict=True))
    assert (memory.is_writing, memory.lengths.tolist()) == (False, [])
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 2
    assert (tmp_path / "checkpoint-4" / "memory" / "memories.safetensors").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"dataloader_num_workers": 2}, "dataloader_num_workers must be 0 or 1 with a memory, got 2"),
        ({}, "train_dataset must come in its own order .* shuffled"),
    ],
)
def test_a_trainer_that_would_mix_documents_up_is_refused(tmp_path: Path, changed: Any, message: str) -> None:
    model, rows = made("llama"), list(document_rows([tokens(1, 64)[0].tolist()] * 2, batch=2, segment=16))
    memory = add_memory(model, **SIZES)
    trainer = Trainer(model, arguments(tmp_path, **changed), train_dataset=rows, callbacks=[MemoryCallback(memory)])
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert not memory.is_writing


def test_a_process_with_several_gpus_is_refused(tmp_path: Path) -> None:
    said, memory = arguments(tmp_path), add_memory(made("llama"), **SIZES)
    said._n_gpu = 2
    with pytest.raises(ValueError, match="a process must have one GPU with a memory, got 2 for DataParallel"):
        MemoryCallback(memory).on_train_begin(said, None, None)


ROWS: dict[str, Any] = {"segment": 16, "documents": [tokens(1, 64)[0].tolist()] * 2}


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ([dict.fromkeys(("input_ids", "labels"), tokens(1, 16)[0])] * 4, "datasets must say new_document in each row"),
        (document_rows(batch=1, **ROWS), r"eval_dataset must have .* takes 2 rows at a time, got .*\(batch=1\)"),
    ],
    ids=["rows that say nothing", "another batch"],
)
def test_an_evaluation_that_would_mix_documents_up_is_refused(tmp_path: Path, evaluation: Any, message: str) -> None:
    model = made("llama")
    memory, rows = add_memory(model, **SIZES), document_rows(batch=2, **ROWS)
    said = arguments(tmp_path, max_steps=2, per_device_eval_batch_size=2, eval_strategy="steps", eval_steps=1)
    trainer = Trainer(model, said, train_dataset=rows, eval_dataset=evaluation, callbacks=[MemoryCallback(memory)])
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert (memory.is_writing, memory.lengths.tolist()) == (False, [])


@pytest.mark.parametrize(("event", "which"), [("on_train_begin", "train"), ("on_prediction_step", "eval")])
def test_rows_that_are_grouped_by_length_are_refused(tmp_path: Path, event: str, which: str) -> None:
    memory = add_memory(made("llama"), **SIZES)
    loader: Any = DataLoader([0] * 4, batch_size=2, sampler=LengthGroupedSampler(2, lengths=[16] * 4))
    told, said = getattr(MemoryCallback(memory), event), arguments(tmp_path)
    with memory.training(), pytest.raises(ValueError, match=rf"{which}_dataset must come in its own .* by length"):
        told(said, None, None, **{f"{which}_dataloader": loader})


def test_an_evaluation_by_itself_is_one_amid_training(tmp_path: Path) -> None:
    model = made("llama")
    memory, rows = add_memory(model, **SIZES), document_rows(batch=2, **ROWS)
    said = arguments(tmp_path, max_steps=2, per_device_eval_batch_size=2, eval_strategy="steps", eval_steps=2)
    trainer = Trainer(model, said, train_dataset=rows, eval_dataset=rows, callbacks=[MemoryCallback(memory)])
    trainer.train()
    amid = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    with pytest.raises(ValueError, match=r"a Trainer evaluates `with memory.training\(\):`"):
        trainer.evaluate()
    with memory.training():
        assert [trainer.evaluate()["eval_loss"] for _ in range(2)] == [amid, amid]
    assert (memory.is_writing, memory.lengths.tolist()) == (False, [])


def test_a_training_that_an_exception_ended_leaves_the_memory_as_outside_of_it(tmp_path: Path) -> None:
    model = made("llama")
    memory, question = add_memory(model, **SIZES), tokens(length=6, seed=2)
    plain = model.eval()(question).logits

    class Interrupted(MemoryCallback):
        def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    said = arguments(tmp_path, max_steps=2, gradient_accumulation_steps=2)
    rows = document_rows(batch=2, **ROWS)
    with pytest.raises(KeyboardInterrupt):
        Trainer(model, said, train_dataset=rows, callbacks=[Interrupted(memory)]).train()
    assert not memory.is_writing
    assert_close(model.eval()(question).logits, plain, PARITY, "logits")
    memory.read(question)
    assert memory.lengths.tolist() == [5, 5]
    Trainer(model, said, train_dataset=rows, callbacks=[MemoryCallback(memory)]).train()


def test_a_training_that_goes_on_from_a_checkpoint_goes_on_with_its_memory(tmp_path: Path) -> None:
    lengths = []

    class Watched(MemoryCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            lengths.append(self.memory.lengths.tolist())

    for steps in (2, 4):
        model = made("llama")
        memory = add_memory(model, **{**SIZES, "sink": 0})
        said = arguments(tmp_path, max_steps=steps, save_strategy="steps", save_steps=2)
        rows = document_rows(batch=2, **ROWS)
        trainer = Trainer(model, said, train_dataset=rows, callbacks=[Watched(memory)])
        trainer.train(resume_from_checkpoint=steps > 2)
    assert lengths == [[16, 16], [32, 32], [48, 48], [64, 64]]


def test_too_few_documents_for_the_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="documents must be at least batch=3 with tokens, got 2"):
        list(document_rows([[1, 2], [3], []], batch=3, segment=2))
