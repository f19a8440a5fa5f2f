"""Other people's trainers train a `MemorizingTransformer`: transformers' Trainer, with and without PEFT."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checks import SAME_GRAPH, assert_close
from helpers.devices import seeded
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

from memtrans import MemorizingTransformer

pytestmark = pytest.mark.cpu
BATCH, LENGTH, VOCABULARY = 2, 8, 30
TEXT = torch.randint(1, VOCABULARY, (8, LENGTH + 1), generator=seeded(2))
ROWS = [{"input_ids": row[:-1], "labels": row[1:]} for row in TEXT]
X, LABELS = TEXT[:BATCH, :-1], TEXT[:BATCH, 1:]


def build(**options) -> MemorizingTransformer:
    torch.manual_seed(0)
    sizes = {"num_tokens": VOCABULARY, "dim": 16, "depth": 2, "dim_head": 8, "heads": 2, "memorizing_layers": (2,)}
    return MemorizingTransformer(**{**sizes, "max_knn_memories": 40, "pad_id": -1, **options})


def settings(path: Path, **options) -> TrainingArguments:
    defaults = {"per_device_train_batch_size": BATCH, "num_train_epochs": 3, "learning_rate": 1e-2, "use_cpu": True}
    quiet = {"report_to": [], "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    return TrainingArguments(output_dir=str(path), **{**defaults, **quiet, **options})


def losses(trainer: Trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore:knn_memories were not given")
@pytest.mark.parametrize("options", [{}, {"memorizing_layers": ()}, {"xl_max_memories": 4}])
def test_22_9_the_trainer_trains_evaluates_predicts_and_saves(options: dict[str, Any], tmp_path: Path) -> None:
    model = build(**options)
    arguments = settings(tmp_path, eval_strategy="epoch", save_strategy="epoch", gradient_checkpointing=True)
    trainer = Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS)
    curve = losses(trainer)
    assert len(curve) == 12 and curve[-1] < curve[0]
    assert trainer.predict(ROWS).predictions.shape == (8, LENGTH, VOCABULARY)
    assert trainer.evaluate()["eval_loss"] < curve[0]
    again = build(**options)
    Trainer(again, settings(tmp_path, num_train_epochs=3), train_dataset=ROWS).train(
        resume_from_checkpoint=str(max(tmp_path.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime))
    )
    for one, other in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


class WithMemory(Trainer):
    """As docs/migrating.md shows it: rows of a batch go on where those of the batch before stopped."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss = model(inputs["input_ids"], self.memories, labels=inputs["labels"])
        return (loss, {"loss": loss}) if return_outputs else loss


def test_22_9_a_trainer_that_passes_memories_fills_them(tmp_path: Path) -> None:
    model = build()
    trainer = WithMemory(model, settings(tmp_path, num_train_epochs=1), train_dataset=ROWS)
    trainer.memories = model.create_knn_memories(batch_size=BATCH)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="knn_memories were not given")
        losses(trainer)
    assert trainer.memories[0].lengths.tolist() == [4 * LENGTH] * BATCH


@pytest.mark.filterwarnings("ignore:knn_memories were not given")
def test_22_9_gradients_accumulated_over_batches_are_those_of_one_batch(tmp_path: Path) -> None:
    """Also where batches score different numbers of labels."""
    rows = [{**row, "labels": row["labels"].clone()} for row in ROWS[:4]]
    rows[0]["labels"][2:] = -100
    weights = []
    for size, steps in ((4, 1), (1, 4)):
        model = build()
        arguments = settings(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, num_train_epochs=1,
            optim="sgd", learning_rate=1.0, max_grad_norm=0.0,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows).train()
        weights.append(list(model.parameters()))
    for one, other in zip(*weights, strict=True):
        assert_close(one, other, SAME_GRAPH)


def test_22_9_input_ids_is_another_name_for_x() -> None:
    model = build().eval()
    memories, others = (model.create_knn_memories(batch_size=BATCH) for _ in range(2))
    for _ in range(2):
        assert torch.equal(model(input_ids=X, knn_memories=memories), model(X, others))
    loss = model(input_ids=X, knn_memories=memories, labels=LABELS)
    assert torch.equal(loss, model(X, others, labels=LABELS))
    with pytest.raises(ValueError, match="x must be None beside input_ids"):
        model(X, memories, input_ids=X)
    with pytest.raises(ValueError, match=r"one memory for each of the layers \(2,\), got 0"):
        model(X)


def test_22_9_without_memories_input_ids_are_documents_of_their_own_and_that_is_said() -> None:
    model = build().eval()
    with pytest.warns(UserWarning, match="knn_memories were not given: each row is a document of its own"):
        logits = model(input_ids=X)
    assert torch.equal(logits, model(X, model.create_knn_memories(batch_size=BATCH)))


def test_22_9_an_attention_mask_says_the_lengths() -> None:
    model, mask = build(xl_max_memories=3).eval(), torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[1, 5:] = 0
    memories, others = (model.create_knn_memories(batch_size=BATCH) for _ in range(2))
    _, caches = model(input_ids=X, attention_mask=mask, knn_memories=memories)
    _, expected = model(X, others, lengths=torch.tensor([LENGTH, 5]))
    assert memories[0].lengths.tolist() == [LENGTH - 3, 2]
    assert all(torch.equal(one, other) for one, other in zip(caches, expected, strict=True))
    before = torch.cat((X[:, 3:], X[:, :3]), dim=1)  # padding may lead too
    padded = model(input_ids=before, attention_mask=mask.flip(1), knn_memories=memories, add_knn_memory=False)[0]
    assert_close(padded[1, 3:], model(before[1:, 3:], [others[0].expand([1])], add_knn_memory=False)[0][0], SAME_GRAPH)
    with pytest.raises(ValueError, match=r"attention_mask must be in \[0, 1\], got"):
        model(input_ids=X, attention_mask=mask * 2, knn_memories=memories)
    with pytest.raises(ValueError, match="mask must be None beside attention_mask"):
        model(X, memories, attention_mask=mask, mask=mask.bool())


@pytest.mark.parametrize("pad_id", [-1, 0])
def test_22_9_labels_of_minus_100_are_not_scored(pad_id: int) -> None:
    model, labels = build(memorizing_layers=(), pad_id=pad_id), LABELS.clone()
    labels[0, 3:] = -100
    expected = torch.nn.functional.cross_entropy(model(X).flatten(0, 1), labels.flatten())
    assert_close(model(X, labels=labels), expected, SAME_GRAPH)
    model(X, labels=labels).backward()
    with pytest.raises(IndexError, match=r"labels must be token ids in .*, got -99"):
        model(X, labels=labels.where(labels >= 0, -99))


def test_22_9_labels_that_are_the_input_itself_are_pointed_out() -> None:
    """As collators for models that shift them make them."""
    model = build(memorizing_layers=())
    with pytest.warns(UserWarning, match=r"labels must hold what comes after each token, got input_ids themselves"):
        model(input_ids=X, labels=X.clone())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=X, labels=LABELS)
        model(X, labels=X)


@pytest.mark.parametrize("size", [45, 12])
def test_22_9_the_vocabulary_grows_and_shrinks_and_is_saved(size: int, tmp_path: Path) -> None:
    model, ids, kept = build(memorizing_layers=()).eval(), X % 12, min(size, VOCABULARY)
    before = model(ids)
    assert model.resize_token_embeddings(size) is model.token_emb is model.get_input_embeddings()
    after = model(ids)
    assert after.shape[-1] == size == model.num_tokens == model.get_output_embeddings().out_features
    assert_close(after[..., :kept], before[..., :kept], SAME_GRAPH)
    if size > VOCABULARY:
        model(torch.full((1, 4), size - 1), labels=torch.full((1, 4), size - 1)).backward()
    model.save_pretrained(tmp_path)
    assert torch.equal(MemorizingTransformer.from_pretrained(tmp_path)(ids), after)
    with pytest.raises(IndexError, match=rf"x must be token ids in \[0, {size}\), got {size}"):
        model(torch.full((1, 4), size))


def test_22_9_tied_weights_stay_tied_and_a_clearing_token_stays() -> None:
    model = build(memorizing_layers=(), clear_memories_on_eos_token_id=20)
    model.to_logits[1].weight = model.token_emb.weight
    model.resize_token_embeddings(40)
    assert model.to_logits[1].weight is model.token_emb.weight
    with pytest.raises(ValueError, match="new_num_tokens must leave token 20, which clears memories, got 20"):
        model.resize_token_embeddings(20)


def test_22_9_checkpointing_device_and_dtype_as_transformers_models_have_them() -> None:
    model = build()
    model.gradient_checkpointing_enable()
    assert model.activation_checkpointing and model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.activation_checkpointing
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with pytest.raises(ValueError, match="use_reentrant must be False in activation checkpointing, got True"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="every_n_layers must be 1 in activation checkpointing, got 2"):
        model.activation_checkpointing_enable(every_n_layers=2)
    assert model.device == torch.device("cpu") and model.double().dtype == torch.float64


def adapted(model: MemorizingTransformer) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["to_q", "to_kv"], modules_to_save=["to_logits"]))


@pytest.mark.filterwarnings("ignore:knn_memories were not given")
def test_22_9_peft_saves_the_head_beside_its_adapters(tmp_path: Path) -> None:
    wrapped = adapted(build())
    curve = losses(Trainer(wrapped, settings(tmp_path, learning_rate=3e-2), train_dataset=ROWS))
    assert curve[-1] < curve[0]
    assert not torch.equal(head_of(wrapped), build().to_logits[1].weight)
    expected = logits_of(wrapped)
    wrapped.save_pretrained(tmp_path / "adapters")
    from peft import PeftModel

    assert_close(logits_of(PeftModel.from_pretrained(build(), str(tmp_path / "adapters"))), expected, SAME_GRAPH)
    merged = wrapped.merge_and_unload()
    assert_close(logits_of(merged), expected, SAME_GRAPH)
    merged.save_pretrained(tmp_path / "model")
    assert_close(logits_of(MemorizingTransformer.from_pretrained(tmp_path / "model")), expected, SAME_GRAPH)


def head_of(wrapped: Any) -> Tensor:
    return wrapped.base_model.model.to_logits.modules_to_save["default"][1].weight


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model.eval()(X, MemorizingTransformer.create_knn_memories(model, batch_size=BATCH))
