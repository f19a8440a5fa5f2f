"""Training on a GPU: the compiled, replayed step does what the eager one does, and no step waits for the device."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checks import FIRST_STEPS, SAME_CURVE, assert_same_curve
from helpers.devices import DEVICE
from helpers.processes import ended, started

from memtrans import cross_entropy
from memtrans.cuda_graph import EAGER_CALLS
from memtrans.training.checkpoint import Checkpoint
from memtrans.training.data import open_data
from memtrans.training.settings import Settings
from memtrans.training.trainer import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

STEPS = 60
SETTINGS = Settings(
    steps=STEPS, batch=4, segment=64, layers=3, width=64, heads=4, head_width=32, memory=200, memory_layers=(2,),
    neighbours=8, xl=64, xl_layers=(3,), accumulate=2, warmup=5, learning_rate=3e-3,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _default_device() -> Iterator[None]:
    """A run places its own tensors; so it does for users, whose default device is the CPU."""
    torch.set_default_device("cpu")
    yield
    torch.set_default_device(DEVICE)


@pytest.fixture
def text(tmp_path: Path) -> str:
    """Documents of 300 to 1,200 bytes: they end, and some fill and wrap a memory of 200 before."""
    directory = tmp_path / "text"  # of its own: a run must not read what it writes
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(12):
        words = torch.randint(97, 103, (300 + 80 * number,), generator=generator, dtype=torch.uint8)
        (directory / f"{number}.txt").write_bytes(bytes(words.repeat_interleave(2).tolist()))
    return str(directory)


def trainer_of(text: str, device: str = "cuda", **changes: object) -> Trainer:
    settings = dataclasses.replace(SETTINGS, data=text, **changes)
    return Trainer(settings, open_data(settings), torch.device(device))


def eager_trainer(text: str, **changes: object) -> Trainer:
    """Neither compiled nor replayed."""
    return trainer_of(text, compile=False, capture=False, **changes)


def losses(trainer: Trainer, steps: int = STEPS) -> torch.Tensor:
    for _ in range(steps):
        trainer.advance()
    return trainer.check()[:, 0]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_replayed_run_has_the_curve_of_an_eager_one(text: str, dtype: str, compiled: bool) -> None:
    plain = torch.stack([losses(eager_trainer(text, dtype=dtype, seed=seed)) for seed in range(3)])
    trainer = trainer_of(text, dtype=dtype, compile=compiled)
    replayed = losses(trainer)
    assert trainer._step.captured
    assert_same_curve(replayed, plain)
    assert replayed[-1] < replayed[0] - 1


@pytest.mark.parametrize(
    "changes",
    [{}, {"memory": 0, "xl_layers": None}, {"memory": 0, "xl_layers": None, "accumulate": 1}, {"memory": 0, "xl": 0}],
    ids=["a memory", "caches alone", "caches alone, one pass a step", "neither"],
)
@pytest.mark.parametrize("compiled", [True, False])
def test_a_run_has_the_curve_of_one_on_the_cpu(text: str, compiled: bool, changes: dict[str, Any]) -> None:
    """Whose weights start the same, and whose kernels are others."""
    on_cpu = [trainer_of(text, "cpu", dtype="float32", seed=seed, **changes) for seed in range(3)]
    replayed = losses(trainer_of(text, dtype="float32", compile=compiled, **changes))
    assert_same_curve(replayed.cpu(), torch.stack([losses(trainer) for trainer in on_cpu]))
    assert replayed[-1] < replayed[0] - 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_replayed_run_has_the_curve_of_an_eager_one_over_300_steps(dtype: str) -> None:
    """On real text, whose memory fills and wraps; of eager runs with three seeds."""
    larger = {"batch": 8, "segment": 128, "width": 128, "memory": 1024, "warmup": 30, "learning_rate": 1e-3}
    options: dict = {"steps": 300, "dtype": dtype, **larger}
    plain = torch.stack([losses(eager_trainer("stdlib", seed=seed, **options), 300) for seed in range(3)])
    trainer = trainer_of("stdlib", **options)
    replayed = losses(trainer, 300)
    assert trainer._step.captured and len(replayed) == 300
    assert (trainer.reader.memories[0].lengths == options["memory"]).any()
    assert_same_curve(replayed, plain)
    assert replayed[-1] < replayed[0] - 1


@pytest.mark.parametrize("compiled", [True, False])
def test_a_run_has_that_curve_when_its_logits_come_in_chunks(
    text: str, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    """And an eager one waits for the device no more than others; a replayed one could not."""
    plain = torch.stack([losses(eager_trainer(text, dtype="bfloat16", seed=seed)) for seed in range(3)])
    monkeypatch.setattr(cross_entropy, "MOST_LOGITS", 0)
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 100 * 256)
    assert_same_curve(losses(trainer_of(text, compile=compiled, capture=compiled, dtype="bfloat16")), plain)
    trainer = trainer_of(text, compile=compiled, capture=compiled, dtype="bfloat16")
    losses(trainer, EAGER_CALLS + 1)
    assert trainer._step.captured == compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("optimizer", "rate"), [("adafactor", 2e-2), ("muon", 3e-3)])
def test_a_replayed_run_has_the_curve_of_an_eager_one_with_other_optimisers(
    text: str, optimizer: str, rate: float
) -> None:
    options: dict = {"optimizer": optimizer, "learning_rate": rate, "dtype": "float32"}
    plain = torch.stack([losses(eager_trainer(text, seed=seed, **options)) for seed in range(3)])
    replayed = losses(trainer_of(text, **options))
    assert_same_curve(replayed, plain)
    assert replayed[-1] < replayed[0] - 1


@pytest.mark.parametrize("memory_query", ["shared", "own"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_replayed_run_that_is_not_compiled_learns_the_same_bits(text: str, dtype: str, memory_query: str) -> None:
    changes: dict[str, Any] = {"dtype": dtype, "memory_query": memory_query}
    ours, eager = trainer_of(text, compile=False, **changes), eager_trainer(text, **changes)
    assert torch.equal(losses(ours), losses(eager))
    assert ours._step.captured and not eager._step.captured
    for one, other in zip(ours.model.parameters(), eager.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_a_replayed_run_goes_on_from_a_checkpoint(text: str, optimizer: str) -> None:
    # float32: a compiled gradient of an embedding is summed in any order, and bfloat16 makes another curve of that
    stopped, resumed = (trainer_of(text, optimizer=optimizer, dtype="float32") for _ in range(2))
    losses(stopped, FIRST_STEPS // 2)
    resumed.restore(Checkpoint(*copy.deepcopy(stopped.state())))  # the moments of both would be the same tensors
    expected, actual = losses(stopped, FIRST_STEPS // 2), losses(resumed, FIRST_STEPS // 2)
    assert len(actual) == len(expected) == FIRST_STEPS
    assert (actual - expected).abs().max() < SAME_CURVE
    assert stopped.state()[1] == resumed.state()[1]


def test_a_replayed_run_goes_on_when_its_memory_was_widened(text: str) -> None:
    through, widened = (trainer_of(text) for _ in range(2))
    expected = losses(through, FIRST_STEPS)
    losses(widened, FIRST_STEPS // 2)
    assert widened._step.captured
    longer = torch.zeros(SETTINGS.batch, 4 * SETTINGS.segment, dtype=torch.int64, device="cuda")
    widened.reader.look(longer, torch.full((SETTINGS.batch,), longer.shape[1], device="cuda"))
    torch.cuda.empty_cache()  # what the memory left is gone
    actual = losses(widened, FIRST_STEPS - FIRST_STEPS // 2)
    assert widened._step.captured
    assert (actual - expected).abs().max() < SAME_CURVE


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_hundred_steps_never_wait_for_the_device(text: str, compiled: bool, optimizer: str) -> None:
    trainer = trainer_of(text, compile=compiled, optimizer=optimizer)
    losses(trainer, EAGER_CALLS + 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(100):
            trainer.advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.check().isfinite().all()


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_a_step_that_is_not_finite_is_left_out_of_a_replayed_run_too(text: str, optimizer: str) -> None:
    trainer = trainer_of(text, skip_nonfinite=True, optimizer=optimizer)
    losses(trainer, EAGER_CALLS + 2)
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    poisoned = trainer.model.token_emb.weight
    with torch.no_grad():
        held = poisoned[97].clone()
        poisoned[97] = torch.nan
    trainer.advance()
    with torch.no_grad():
        poisoned[97] = held
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert not trainer.check()[-1].isfinite().all()
    trainer.advance()
    assert trainer.check()[-1].isfinite().all()


def test_the_command_line_trains_goes_on_evaluates_and_generates(text: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    small = ("--batch", "2", "--segment", "32", "--layers", "2", "--width", "64", "--head-width", "32", "--plain")
    for command in (
        ("train", "--data", text, "--out", str(out), "--steps", "8", "--memory", "64", "--eval-bytes", "300", *small),
        ("train", "--resume", "--out", str(out), "--steps", "12", "--plain"),
        ("eval", "--out", str(out), "--data", text),
        ("generate", "--checkpoint", str(out), "--prompt", "abc", "--tokens", "5"),
    ):
        status, printed, error = ended(started(1, *command), 300)[0]
        assert status == 0, error
        assert printed
