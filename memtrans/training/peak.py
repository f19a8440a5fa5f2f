"""How much of the GPUs' peak a run's matrix products reach, often called MFU.

Counted are the products of linear layers and of attention to the local context, as the model defines them. Neither a
search nor what is gathered for attention to neighbours counts: what a memory costs shows as a smaller share.
"""

from __future__ import annotations

import torch
from torch import nn

from memtrans.distributed.ranks import Ranks
from memtrans.training.settings import Settings
from memtrans.transformer import MemorizingTransformer

# FLOP/s in bfloat16 of NVIDIA's datasheets, which count zeros that are skipped: twice the rate of dense products. By
# the whole name that PyTorch gives; a part of a GPU (MIG) has another one, and no known peak.
WITH_SPARSITY = {
    "NVIDIA H200": 1979e12,
    "NVIDIA H200 NVL": 1671e12,
    "NVIDIA H100 80GB HBM3": 1979e12,
    "NVIDIA H100 PCIe": 1513e12,
    "NVIDIA H100 NVL": 1671e12,
    "NVIDIA A100-SXM4-40GB": 624e12,
    "NVIDIA A100-SXM4-80GB": 624e12,
    "NVIDIA A100-PCIE-40GB": 624e12,
    "NVIDIA A100 80GB PCIe": 624e12,
    "NVIDIA L4": 242e12,
}


def peak_rate(name: str) -> float | None:
    """FLOP/s of dense products in bfloat16 or float16 of the device with that name; None where that is not known.

    >>> peak_rate("NVIDIA A100-SXM4-80GB"), peak_rate("NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    (312000000000000.0, None)
    """
    rate = WITH_SPARSITY.get(name)
    return None if rate is None else rate / 2


def peak_of(ranks: Ranks, device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of all ranks' devices together; None unless the peak of each is known. Every rank has to call this.

    dtype: that matrix products compute in.
    """
    halves = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    rates = [rate for rate in ranks.gather(peak_rate(torch.cuda.get_device_name(device)) if halves else None) if rate]
    return sum(rates) if len(rates) == ranks.size else None


def flop_per_token(model: MemorizingTransformer, settings: Settings) -> float:
    """Of a training step, forward and backward: 6 for each weight of a linear layer, and 12 for each local key that a
    token sees, times the width of all heads; XL caches are full.

    >>> settings = Settings(layers=1, width=8, heads=2, head_width=4, memory=0, segment=9)
    >>> model = MemorizingTransformer(num_tokens=256, dim=8, depth=1, dim_head=4, heads=2, memorizing_layers=())
    >>> flop_per_token(model, settings)
    16992.0
    """
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    seen = 0.0
    for number in range(1, settings.layers + 1):
        heads = settings.memory_heads if number in model.memorizing_layers else None
        cached = settings.xl if number in model.xl_memory_layers else 0
        seen += (heads or settings.heads) * (cached + (settings.segment + 1) / 2)
    return 6 * weights + 12 * settings.head_width * seen
