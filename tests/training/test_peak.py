"""The share of the peak is counted products over what a datasheet says, and absent where no datasheet is known."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.tiny_runs import train, written_text
from torch.utils.flop_counter import FlopCounterMode

from memtrans.distributed.ranks import ALONE, Ranks
from memtrans.training import trainer as trainer_module
from memtrans.training.metrics import Metrics
from memtrans.training.model import build_model
from memtrans.training.peak import flop_per_token, peak_of, peak_rate
from memtrans.training.settings import Settings

pytestmark = pytest.mark.cpu

GPU, BF16 = torch.device("cuda"), torch.bfloat16
SMALL = Settings(layers=3, width=32, heads=4, head_width=8, kv_heads=2, segment=16, memory=0)


def counted(settings: Settings) -> float:
    """What `flop_per_token` says of a new model."""
    return flop_per_token(build_model(settings), settings)


def pairs(settings: Settings, cached: int) -> float:
    """Local keys that a token sees, on average."""
    seen = torch.ones(settings.segment, cached + settings.segment).tril(cached)
    return float(seen.sum() / settings.segment)


@pytest.mark.parametrize("memory", [0, 64])
def test_products_of_linear_layers_are_those_that_pytorch_counts(memory):
    settings = dataclasses.replace(SMALL, memory=memory)
    model = build_model(settings)
    tokens = torch.randint(0, 256, (2, settings.segment))
    with FlopCounterMode(display=False) as counter:
        model(tokens, model.create_knn_memories(batch_size=2), labels=tokens).backward()
    found = counter.get_flop_counts()["Global"]
    linear = sum(found.get(operator, 0) for operator in (torch.ops.aten.mm, torch.ops.aten.addmm)) / tokens.numel()
    assert linear > 0
    assert flop_per_token(model, settings) == linear + 12 * settings.head_width * 3 * 4 * pairs(settings, 0)


def test_an_xl_cache_counts_in_the_layers_that_have_one():
    cached = dataclasses.replace(SMALL, xl=24, xl_layers=(2,))
    more = pairs(cached, 24) - pairs(SMALL, 0)
    assert counted(cached) - counted(SMALL) == 12 * SMALL.head_width * SMALL.heads * more


def test_memory_layers_count_their_own_heads_and_no_search():
    settings = dataclasses.replace(SMALL, memory=64, memory_layers=(2,))
    assert counted(dataclasses.replace(settings, memory=4096, neighbours=7)) == counted(settings)
    wider = dataclasses.replace(settings, memory_heads=6)
    weights = 2 * 32 * 2 * 8  # of two more heads, on their way in and out
    assert counted(wider) - counted(settings) == 6 * weights + 12 * 8 * 2 * pairs(SMALL, 0)


class Two(Ranks):
    """Two ranks, of which the other one says `others`."""

    def __init__(self, others: float | None) -> None:
        super().__init__(rank=0, size=2)
        self.others = others

    def gather(self, value):
        return [value, self.others]


@pytest.mark.parametrize(
    ("name", "device", "dtype", "ranks", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", GPU, BF16, ALONE, 989.5e12),
        ("NVIDIA H100 80GB HBM3", GPU, torch.float16, ALONE, 989.5e12),
        ("NVIDIA H100 80GB HBM3", GPU, torch.float32, ALONE, None),
        ("NVIDIA H100 80GB HBM3", torch.device("cpu"), BF16, ALONE, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", GPU, BF16, ALONE, None),
        ("NVIDIA GeForce GTX 1080", GPU, BF16, ALONE, None),
        ("NVIDIA H200", GPU, BF16, Two(312e12), 1301.5e12),
        ("NVIDIA H200", GPU, BF16, Two(None), None),
    ],
)
def test_the_peak_is_that_of_known_devices_alone(name, device, dtype, ranks, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_of(ranks, device, dtype) == expected


def test_variants_of_one_gpu_have_their_own_peaks():
    assert peak_rate("NVIDIA H100 PCIe") < peak_rate("NVIDIA H100 NVL") < peak_rate("NVIDIA H100 80GB HBM3")


def test_a_run_logs_its_share_of_a_known_peak(tmp_path, monkeypatch, capsys):
    text = written_text(tmp_path)
    monkeypatch.setattr(trainer_module, "peak_of", lambda ranks, device, dtype: 1e12)
    assert train(tmp_path / "known", "--data", text, "--steps", "4", "--log-every", "2") == 0
    assert capsys.readouterr().out.count(" of peak FLOP/s\n") == 2
    lines = [line for line in Metrics(tmp_path / "known" / "metrics.jsonl").read() if "tokens_per_second" in line]
    settings = Settings(layers=2, width=16, heads=2, head_width=8, segment=32, memory=64)
    assert len(lines) == 2
    for line in lines:
        assert line["peak_share"] == pytest.approx(line["tokens_per_second"] * counted(settings) / 1e12)


def test_a_run_says_nothing_of_a_peak_that_is_not_known(tmp_path, capsys):
    assert train(tmp_path / "run", "--data", written_text(tmp_path), "--steps", "2", "--log-every", "1") == 0
    assert "peak" not in capsys.readouterr().out
    assert all("peak_share" not in line for line in Metrics(tmp_path / "run" / "metrics.jsonl").read())
