"""Training with the kernels follows the curve of plain PyTorch, with one softmax and with a gate."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
import torch
from helpers.checks import assert_same_curve
from helpers.devices import seeded
from torch import Tensor

from memtrans import MemorizingTransformer

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

STEPS, BATCH, SEGMENT, CAPACITY, SEEDS = 300, 8, 128, 1024, (0, 1, 2)
MODEL = {"dim": 128, "depth": 3, "heads": 4, "dim_head": 32, "memorizing_layers": (2,), "num_retrieved_memories": 16}


@functools.cache
def sources() -> Tensor:
    """The first bytes of Python's standard library, as many documents side by side (B, bytes)."""
    length = STEPS * SEGMENT + 1
    text = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
    return torch.tensor(list(text[: BATCH * length])).reshape(BATCH, length)


def losses(seed: int, combine: str, dtype: torch.dtype, steps: int = STEPS) -> Tensor:
    """Of every step; the memory fills after eight of them and wraps from then on."""
    torch.manual_seed(seed)
    model = MemorizingTransformer(
        num_tokens=256, max_knn_memories=CAPACITY, xl_max_memories=SEGMENT // 2, pad_id=-1, combine=combine, **MODEL
    )
    memories, xl_memories = model.create_knn_memories(batch_size=BATCH), None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    order, losses = torch.randperm(BATCH, generator=seeded(seed)), []
    for step in range(steps):
        tokens = sources()[order, step * SEGMENT : (step + 1) * SEGMENT + 1]
        with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
            loss, xl_memories = model(tokens[:, :-1], memories, xl_memories, labels=tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).float().cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("combine", ["softmax", "gate"])
def test_the_kernels_train_as_plain_pytorch_does(
    monkeypatch: pytest.MonkeyPatch, combine: str, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("MEMTRANS_BACKEND", "reference")
    plain = torch.stack([losses(seed, combine, dtype) for seed in SEEDS])
    monkeypatch.setenv("MEMTRANS_BACKEND", "auto")
    assert_same_curve(losses(SEEDS[0], combine, dtype), plain)
