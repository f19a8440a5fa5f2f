"""Presets are what they say: the paper's table 4, upstream's own set-up, and figures that agree with measured ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers.checks import PREDICTION

from memtrans.presets import PRESETS, TABLE_4, figures, paper, paper_name
from memtrans.training.data import open_data
from memtrans.training.model import build_model
from memtrans.training.settings import Settings
from memtrans.training.trainer import Trainer

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("row", TABLE_4, ids=str)
def test_every_row_of_table_4_has_a_name_and_the_papers_size(row):
    _, memory, xl_cache = row
    settings = PRESETS[paper_name(*row)]
    assert (settings.segment, settings.memory, settings.xl) == row
    assert settings.batch * settings.segment * settings.segments * settings.accumulate == 2**17
    assert settings.combine == "gate"
    assert 180e6 < figures(settings).parameters < 220e6
    with torch.device("meta"):
        model = build_model(settings)
    assert (len(model.layers), model.token_emb.weight.shape) == (12, (32_000, 1024))
    assert (model.kv_heads, model.dim_head, model.layers[0][1].fn.net[0].out_features) == (8, 128, 4096)
    assert model.memorizing_layers == ((9,) if memory else ())
    assert model.xl_memory_layers == (tuple(range(1, 13)) if xl_cache else ())
    if memory:
        assert model.max_knn_memories == memory
        assert model.layers[8][0].fn.num_retrieved_memories == 32


def test_the_first_version_has_one_softmax_and_more_neighbours():
    first, later = PRESETS["paper-v1"], PRESETS["paper-512-8192-512"]
    assert (first.combine, first.neighbours) == ("softmax", 128)
    assert dataclasses.replace(first, combine="gate", neighbours=32) == later


def test_heads_may_share_the_papers_memory():
    assert figures(paper(kv_heads=1)).memory_bytes * 8 == figures(paper()).memory_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_layers": (13,)}, "memory_layers must name layers from 1 to 12, got 13"),
        ({"context": 0}, "segment must be at least 1, got 0"),
        ({"combine": "sum"}, "combine must be one of softmax, gate, got 'sum'"),
        ({"kv_heads": 3}, "heads must be a multiple of kv_heads=3, got 8"),
    ],
)
def test_a_combination_that_cannot_be_says_what_exists(options, message):
    with pytest.raises(ValueError, match=message):
        paper(**options)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_each_preset_at_reduced_width_takes_two_steps(preset, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(97, 123)) * 40)
    full = PRESETS[preset]
    settings = dataclasses.replace(
        full,
        data=full.data if full.data == "recall" else str(text),
        batch=2,
        segment=16,
        width=16,
        head_width=8,
        vocabulary=min(full.vocabulary, 300),
        memory=full.memory and 64,
        xl=full.xl and 16,
        eval_bytes=100,
        device="cpu",
    )
    trainer = Trainer(settings, open_data(settings), torch.device("cpu"))
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    for _ in range(2):
        trainer.advance()
    assert trainer.report()["bits_per_byte"] > 0
    assert any(not torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())
    assert [len(trainer.reader.memories) > 0, trainer.reader.xl_capacity > 0] == [full.memory > 0, full.xl > 0]


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_figures_count_what_a_model_and_its_memories_hold(preset):
    settings = dataclasses.replace(PRESETS[preset], batch=2, width=16, head_width=8, vocabulary=256)
    model, counted = build_model(settings), figures(settings)
    assert counted.parameters == sum(parameter.numel() for parameter in model.parameters())
    memories = model.create_knn_memories(
        batch_size=2, device="cpu", dtype=torch.float16, spare=settings.segment * settings.segments
    )
    rings = [memory.snapshot().ring for memory in memories]
    assert counted.memory_bytes == sum(ring.keys.nbytes + ring.values.nbytes for ring in rings)


@pytest.mark.parametrize("case", ["off", "8k", "64k"])
def test_a_predicted_step_agrees_with_a_measured_one(case):
    """Of the paper's shape, as benchmarks/bench_train.py trains it."""
    memory = {"off": 0, "8k": 8192, "64k": 65536}[case]
    shape = paper(512, memory, 0, combine="softmax")
    predicted = figures(dataclasses.replace(shape, batch=16, accumulate=1, vocabulary=256))
    entries = json.loads((RESULTS / "h100" / "train.json").read_text())
    (rate,) = (e["tokens_per_second"] for e in entries if (e["impl"], e["case"]) == ("memtrans", f"paper-{case}"))
    measured = predicted.step_tokens / rate
    assert abs(predicted.step_seconds / measured - 1) < PREDICTION


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_settings_come_back_from_json_as_they_were(preset):
    settings = PRESETS[preset]
    assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_the_demos_batch_divides_by_four():
    assert PRESETS["demo"].batch % 4 == 0


def test_enwik8_is_upstreams_own_training_set_up():
    settings = PRESETS["enwik8"]
    assert (settings.batch, settings.accumulate * settings.segments, settings.segment) == (16, 5, 512)
    model = build_model(settings)
    assert (len(model.layers), model.token_emb.weight.shape) == (8, (256, 512))
    assert (model.memorizing_layers, model.xl_memory_layers) == ((4,), (7, 8))
    assert model.max_knn_memories == 7680
    memory_layer, caching_layer = model.layers[3][0].fn, model.layers[7][0].fn
    assert (memory_layer.num_retrieved_memories, memory_layer.heads, memory_layer.dim_head) == (32, 8, 64)
    assert caching_layer.xl_max_memories == 512
    assert (settings.windows, settings.window_segments) == (True, 5)
    assert (settings.warmup, settings.final_rate, settings.weight_decay) == (0, 1.0, 0.0)
    assert 21.7e6 < sum(parameter.numel() for parameter in model.parameters()) < 21.9e6
