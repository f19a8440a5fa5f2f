"""Trainers and wrappers of other packages, and PyTorch's own: accelerate, Lightning, EMA, DeepSpeed, both FSDPs.

`make test-slow` installs what `memtrans[test]` lacks; a package that is missing fails its tests.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from helpers.checks import SAME_GRAPH, assert_close
from helpers.devices import seeded
from helpers.packages import package
from helpers.processes import Processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from memtrans import KNNMemoryList, MemorizingTransformer, generate
from memtrans.memorizing_transformers_pytorch import PreNormResidual

pytestmark = pytest.mark.cpu
BATCH, LENGTH, VOCABULARY, STEPS = 2, 8, 30, 4
TEXT = torch.randint(1, VOCABULARY, (BATCH, STEPS * LENGTH + 1), generator=seeded(2))
# Rows end at different places of their segments, and go on in the next one.
LENGTHS = torch.tensor([[8, 8], [8, 3], [5, 8], [8, 8]])
SEGMENTS = [
    {"x": TEXT[:, :-1][:, at : at + LENGTH], "labels": TEXT[:, 1:][:, at : at + LENGTH], "lengths": lengths}
    for at, lengths in zip(range(0, STEPS * LENGTH, LENGTH), LENGTHS, strict=True)
]


def build() -> MemorizingTransformer:
    torch.manual_seed(0)
    return MemorizingTransformer(
        num_tokens=VOCABULARY, dim=16, depth=2, dim_head=8, heads=2, memorizing_layers=(2,), max_knn_memories=40,
        xl_max_memories=4, xl_memory_layers=(1,), pad_id=-1,
    )  # fmt: skip


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5)


def by_hand(dtype: torch.dtype | None = None) -> tuple[list[float], list[Tensor], list[int]]:
    """Losses, weights and the memory's lengths of a loop of one's own."""
    model = build()
    moving, memories, caches, losses = optimiser(model), model.create_knn_memories(batch_size=BATCH), None, []
    for segment in SEGMENTS:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss, caches = model(segment["x"], memories, caches, segment["labels"], lengths=segment["lengths"])
        loss.backward()
        moving.step()
        moving.zero_grad()
        losses.append(loss.item())
    return losses, list(model.parameters()), memories[0].lengths.tolist()


def stored() -> list[int]:
    return LENGTHS.sum(dim=0).tolist()  # layer 2 has no XL cache


@pytest.fixture
def accelerator() -> Iterator[Callable[..., accelerate.Accelerator]]:
    """Makes one; what it keeps for the whole process, such as the precision, goes with the test."""
    forget = partial(accelerate.state.AcceleratorState._reset_state, reset_partial_state=True)
    forget()
    yield partial(accelerate.Accelerator, cpu=True)
    forget()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_22_10_accelerate_trains_with_lengths_that_differ(
    accelerator: Callable[..., accelerate.Accelerator], precision: str
) -> None:
    expected, weights, lengths = by_hand(torch.bfloat16 if precision == "bf16" else None)
    made, loader = accelerator(mixed_precision=precision), torch.utils.data.DataLoader(SEGMENTS, batch_size=None)
    original = build()
    model, moving, segments = made.prepare(original, optimiser(original), loader)
    memories, caches, losses = original.create_knn_memories(batch_size=BATCH), None, []
    for segment in segments:
        loss, caches = model(knn_memories=memories, xl_memories=caches, **segment)
        made.backward(loss)
        moving.step()
        moving.zero_grad()
        losses.append(loss.item())
    assert losses == expected
    assert memories[0].lengths.tolist() == lengths == stored()
    for weight, other in zip(made.unwrap_model(model).parameters(), weights, strict=True):
        assert torch.equal(weight, other)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_22_10_lightning_trains_and_resumes_from_its_checkpoint(precision: str, tmp_path: Path) -> None:
    lightning = package("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.caches, self.losses = build(), None, []
            self.memories = self.model.create_knn_memories(batch_size=BATCH)

        def training_step(self, segment: dict[str, Tensor], number: int) -> Tensor:
            loss, self.caches = self.model(knn_memories=self.memories, xl_memories=self.caches, **segment)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimiser(self)

    def fit(epochs: int, checkpoint: Path | None = None) -> Any:
        module = Module()
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=str(tmp_path),
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(SEGMENTS, batch_size=None)
        trainer.fit(module, loader, ckpt_path=None if checkpoint is None else str(checkpoint), weights_only=False)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    expected, weights, lengths = by_hand(torch.bfloat16 if precision == "bf16-mixed" else None)
    module = fit(1)
    assert module.losses == expected
    assert module.memories[0].lengths.tolist() == lengths == stored()
    for weight, other in zip(module.model.parameters(), weights, strict=True):
        assert torch.equal(weight, other)
    assert len(fit(2, tmp_path / "1.ckpt").losses) == STEPS


@pytest.mark.slow
def test_22_10_an_average_of_the_weights_reads_with_memories_of_its_own() -> None:
    average = package("ema_pytorch").EMA(model := build(), beta=0.5, update_after_step=0, update_every=1)
    moving, memories = optimiser(model), model.create_knn_memories(batch_size=BATCH)
    for segment in SEGMENTS[:2]:
        model(segment["x"], memories, labels=segment["labels"])[0].backward()
        moving.step()
        moving.zero_grad()
        average.update()
    own = copy.deepcopy(memories)
    with torch.no_grad():
        logits, _ = average(SEGMENTS[2]["x"], own)
        expected, _ = average.ema_model(SEGMENTS[2]["x"], copy.deepcopy(memories))
        others, _ = model(SEGMENTS[2]["x"], copy.deepcopy(memories))
    assert torch.equal(logits, expected) and not torch.equal(logits, others)
    assert own[0].lengths.tolist() == [3 * LENGTH] * BATCH and memories[0].lengths.tolist() == [2 * LENGTH] * BATCH


# ------------------------------------------------------------------------------------------------------ two processes


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    processes = Processes(2)
    yield processes
    processes.close()


def fsdp1(model: MemorizingTransformer, original: bool) -> nn.Module:
    policy = ModuleWrapPolicy({PreNormResidual, nn.Embedding})
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=original
    )


def fsdp2(model: MemorizingTransformer) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    blocks = [module for module in model.modules() if isinstance(module, PreNormResidual)]
    for module in (*blocks, model.token_emb, model.to_logits, model):
        fully_shard(module, mesh=mesh)
    return model


FORMS = {
    "fsdp1": lambda model: fsdp1(model, original=False),
    "fsdp1 with the original parameters": lambda model: fsdp1(model, original=True),
    "fsdp2": fsdp2,
}


def spread_losses(rank: int, form: str) -> tuple[list[float], list[int]]:
    """Both ranks read the same rows, so that the mean of their gradients is that of one process."""
    model = build()
    memories: KNNMemoryList = model.create_knn_memories(batch_size=BATCH)
    spread, caches, losses = FORMS[form](model), None, []
    moving = optimiser(spread)
    for segment in SEGMENTS:
        loss, caches = spread(knn_memories=memories, xl_memories=caches, **segment)
        loss.backward()
        moving.step()
        moving.zero_grad()
        losses.append(loss.item())
    return losses, memories[0].lengths.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_22_10_weights_spread_over_ranks_learn_the_same(two: Processes, form: str) -> None:
    expected, _, _ = by_hand()
    for losses, lengths in two.run(spread_losses, form):
        assert_close(torch.tensor(losses), torch.tensor(expected), SAME_GRAPH)
        assert lengths == stored()


# ------------------------------------------------------------------------------------------------ DeepSpeed, stage 3


def deepspeed_losses(rank: int) -> tuple[list[float], list[int], int, list[int]]:
    """Losses, the memory's lengths, how many numbers the parameters hold between the passes, and what is written then.

    The operator that several ranks on one CPU would share memory by is not compiled. What a model returns is copied, so
    its XL caches no longer say how much of them a row filled: that is told.
    """
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    deepspeed = import_module("deepspeed")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    model = build()
    memories, caches, losses, held = model.create_knn_memories(batch_size=BATCH), None, [], None
    settings = {
        "train_micro_batch_size_per_gpu": BATCH, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), optimizer=optimiser(model), config=settings
    )
    for segment in SEGMENTS:
        loss, caches = engine(knn_memories=memories, xl_memories=caches, xl_length=held, **segment)
        held = (segment["lengths"] + (0 if held is None else held)).clamp(max=caches[0].shape[1])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    numbers = sum(parameter.numel() for parameter in model.parameters())
    lengths = memories[0].lengths.tolist()
    with torch.no_grad():
        written = generate(engine.module.eval(), TEXT[:, :LENGTH], tokens=6, segment=LENGTH, temperature=0)
    return losses, lengths, numbers, written.flatten().tolist()


@pytest.mark.slow
def test_22_10_deepspeed_trains_with_weights_that_are_empty_between_calls() -> None:
    package("deepspeed")
    expected, weights, lengths = by_hand()
    one = Processes(1)
    try:
        (found,) = one.run(deepspeed_losses)
    finally:
        one.close()
    losses, filled, numbers, written = found
    assert_close(torch.tensor(losses), torch.tensor(expected), SAME_GRAPH)
    assert filled == lengths == stored() and numbers == 0
    model = build()
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.copy_(weight)
    expected_text = generate(model.eval(), TEXT[:, :LENGTH], tokens=6, segment=LENGTH, temperature=0)
    assert written == expected_text.flatten().tolist()
