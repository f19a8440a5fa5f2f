"""Settings refuse what cannot run, and build the model that they say."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from memtrans.training.model import build_model
from memtrans.training.settings import Settings


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", 0, "steps must be at least 1, got 0"),
        ("batch", -3, "batch must be at least 1, got -3"),
        ("memory", -1, "memory must be at least 0, got -1"),
        ("learning_rate", 0.0, "learning_rate must be above 0, got 0.0"),
        ("learning_rate", float("nan"), "learning_rate must be finite, got nan"),
        ("dropout", 1.0, "dropout must be below 1, got 1.0"),
        ("seed", 2**70, f"seed must be below {2**63}, got {2**70}"),
        ("dtype", "int8", "dtype must be one of float32, bfloat16, got 'int8'"),
        ("batch", 2.5, r"batch must be of type int, got 2\.5"),
        ("batch", None, "batch must be of type int, got None"),
        ("xl_layers", "12", r"xl_layers must be of type tuple\[int, \.\.\.\] \| None, got '12'"),
        ("windows", 1, "windows must be of type bool, got 1"),
        ("seed", True, "seed must be of type int, got True"),
        ("memory_layers", (2, 9), "memory_layers must name layers from 1 to 4, got 9"),
        ("xl_layers", (0,), "xl_layers must name layers from 1 to 4, got 0"),
        ("kv_heads", 3, "heads must be a multiple of kv_heads=3, got 4"),
        ("vocabulary", 255, "vocabulary must be at least 256, got 255"),
        ("optimizer", "sgd", "optimizer must be one of adamw, adafactor, muon, got 'sgd'"),
        ("schedule", "linear", "schedule must be one of cosine, inverse-sqrt, got 'linear'"),
        ("clip", 0.0, r"clip must be above 0, got 0\.0"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{name: value})


def test_settings_of_another_version_are_refused():
    with pytest.raises(ValueError, match=r"settings must be names with values, got \[1\]"):
        Settings.from_json([1])
    with pytest.raises(ValueError, match=r"settings must be those of this version, got \['colour'\]"):
        Settings.from_json({"colour": "blue"})


def test_every_setting_has_a_help_text():
    assert all(field.metadata["help"] for field in dataclasses.fields(Settings))


def test_a_memory_of_zero_entries_is_a_model_without_memory_layers():
    model = build_model(Settings(memory=0))
    assert model.memorizing_layers == ()
    assert len(model.create_knn_memories(batch_size=1)) == 0


def test_the_middle_layer_has_the_memory_by_default():
    assert build_model(Settings(layers=6)).memorizing_layers == (3,)
    assert build_model(Settings(layers=1)).memorizing_layers == (1,)


def test_a_position_start_lets_each_local_head_look_one_token_further_back():
    model = build_model(dataclasses.replace(Settings(heads=4, layers=2), position_start=8.0))
    table = model.rel_pos_bias.table()
    assert table.argmax(dim=1).tolist() == [1, 2, 3, 4]
    assert (table.max(dim=1).values > 7).all()
    assert model.knn_rel_pos_bias.table().abs().max() < 1


def test_the_seed_determines_the_weights():
    torch.manual_seed(3)
    first = build_model(Settings())
    torch.manual_seed(3)
    second = build_model(Settings())
    assert all(torch.equal(left, right) for left, right in zip(first.parameters(), second.parameters(), strict=True))


def test_the_choices_are_those_of_what_they_choose():
    from memtrans.annotations import kind_of
    from memtrans.knn_attention import COMBINATIONS
    from memtrans.training.settings import hints

    assert kind_of(hints()["combine"]).choices == COMBINATIONS
    assert all(hasattr(torch, name) for name in kind_of(hints()["dtype"]).choices)
    for optimizer in kind_of(hints()["optimizer"]).choices:
        assert Settings(optimizer=optimizer).optimizer == optimizer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 2**17}, "batch must be at most 65536, got 131072"),
        ({"batch": 2**9, "segments": 2**9}, "batch, segments and accumulate must make at most 65536 rows a step, got"),
        ({"segment": 2**28, "batch": 8}, "segment must make at most 1073741824 tokens a step, got 2147483648"),
        ({"layers": 10_001}, "layers must be at most 10000, got 10001"),
        ({"memory": 2**63}, f"memory must be below {2**63}, got {2**63}"),
        ({"clip": 10**400}, "clip must be below"),
    ],
)
def test_sizes_that_no_machine_would_end_a_step_of_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)
