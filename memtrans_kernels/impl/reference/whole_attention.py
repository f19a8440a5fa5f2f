"""whole_attention in plain PyTorch: the oracle of all tests, and the last-resort kernel.

    out = softmax(scale · q kᵀ + offset) · values, over all visible entries of row rows[b·G + h // (H / G)], which are
    [max(start, cursor - M), cursor) without those whose key has a non-finite component

    query (B, H, N, D) · keys (R, M + S, D) · values (R, M + S, E) · rows (B·G,) · start, cursor (R,)
    scale, memory_offset (H,) · local_out (B, H, N, E), local_lse (B, H, N) -> out (B, H, N, E), lse (B, H, N)

With a part attended to elsewhere, both stand in one softmax: its result and the logarithm of its denominator are
merged with the memory's. Source: Wu et al. 2022, section 3.1. Arithmetic is float32, or float64 where the query is; on
CPU and CUDA tensors alike, without a host round trip.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memtrans_kernels.attention_inputs import WholeInputs
from memtrans_kernels.precision import arithmetic_dtype


def whole_attention(inputs: WholeInputs) -> tuple[Tensor, Tensor]:
    """One document and group of heads at a time."""
    query, keys, values, rows, start, cursor, capacity, scale, local_out, local_lse, memory_offset = inputs
    (batch, heads, length, _), dtype = query.shape, arithmetic_dtype(query)
    groups = rows.numel() // max(batch, 1)
    out = query.new_zeros(batch, heads, length, values.shape[2], dtype=dtype)
    lse = query.new_full((batch, heads, length), -torch.inf, dtype=dtype)
    for b in range(batch):
        for g in range(groups):
            of_group = slice(g * heads // groups, (g + 1) * heads // groups)
            row = rows[b * groups + g, None]  # (1,): a number would make the host wait for it
            seen = _visible(keys[row][0], start[row], cursor[row], capacity)  # (M + S,)
            key, value = (
                ring[row][0].masked_fill(~seen[:, None], 0.0).to(dtype) for ring in (keys, values)
            )  # (M + S, D), (M + S, E)
            logits = scale[of_group, None, None].to(dtype) * (query[b, of_group].to(dtype) @ key.mT)
            logits = logits.masked_fill(~seen, -torch.inf)
            lse[b, of_group] = logits.logsumexp(dim=-1)
            out[b, of_group] = (logits - _finite(lse[b, of_group])[..., None]).exp() @ value
    if memory_offset is not None:
        lse = lse + memory_offset.to(dtype)[:, None]
    if local_out is not None and local_lse is not None:
        joint = torch.logaddexp(lse, local_lse.to(dtype))
        of_memory, of_local = ((part - _finite(joint)).exp()[..., None] for part in (lse, local_lse.to(dtype)))
        out, lse = out * of_memory + local_out.to(dtype) * of_local, joint
    return out.to(query.dtype), lse


def _visible(row_keys: Tensor, start: Tensor, cursor: Tensor, capacity: int) -> Tensor:
    """Which slots of a row (M + S, D) hold an entry that a search may find (M + S,)."""
    slots, newest = row_keys.shape[0], cursor - 1
    entry = newest - (newest - torch.arange(slots, device=row_keys.device)) % slots  # the newest that went there
    held = (entry >= start.clamp(min=0)) & (entry >= cursor - capacity)
    return held & row_keys.isfinite().all(dim=-1)


def _finite(lse: Tensor) -> Tensor:
    """0 where nothing is seen: a difference of infinities would be NaN."""
    return lse.masked_fill(lse == -torch.inf, 0.0)
