"""What the attention of a pretrained model's layer tells whoever traces its memory.

Shapes: the letters of `memtrans_kernels`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memtrans.hf.state import ForwardState
from memtrans.local_keys import LocalKeys
from memtrans.memory.checks import running_backward
from memtrans.memory.observation import Observation, local_weights, retrieved_weights
from memtrans.memory.snapshot import MemorySnapshot


@torch.no_grad()
def tell(
    state: ForwardState,
    layer: int,
    retrieved: Mapping[str, Any],
    lse: Tensor,
    *,
    offset: Tensor | None = None,
    local: LocalKeys | None = None,
    share: Tensor | None = None,
) -> None:
    """Keeps what a layer retrieved, to be told after the pass; not once more where a backward pass runs it again.

    Args:
        state: of the pass, which somebody watches. layer: its number.
        retrieved: what `memory_attention` was given of the memory. lse: (B, H, N), what it returned.
        offset: (H,), of the retrieved logits. Default: 0.
        local: the local context of the same softmax. Default: the model's own function attends to it.
        share: (B, H, N), what a gate gives to the memory. Default: there is no gate.

    Raises ValueError where local weights are wanted and the model's own function has them.
    """
    watched, slots, scale = state.watched, retrieved["slots"], retrieved["scale"]
    if watched is None or running_backward() != -1:
        return
    if watched.wants_local and local is None:
        raise ValueError(
            "local must be False in tracing() with combine='gate', where the model itself attends, got True"
        )
    snapshot = state.snapshots[layer]
    positions, tokens = snapshot.positions(slots), None
    if watched.ids is not None:
        tokens, positions = _looked_up(watched.ids, snapshot, slots)
    weights = retrieved_weights(retrieved["scores"], scale, lse, offset, share, retrieved.get("soft_cap"))
    of_local = None
    if watched.wants_local and local is not None:
        of_local = local_weights(retrieved["query"], local, scale, lse)
    rows = torch.arange(slots.shape[0], device=slots.device)
    state.told.append((layer, Observation(rows, positions, weights, of_local, tokens)))


def _looked_up(ids: MemorySnapshot, snapshot: MemorySnapshot, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and positions (B, H, N, K) int64 of the tokens in slots; -1 for none.

    The memory of ids is filled and cleared with that of a layer, so its entries have the same numbers.
    """
    entries = snapshot.entries_in(slots)
    place = entries.clamp(min=0) % ids.keys.shape[1]
    groups = snapshot.rows.numel() // snapshot.documents
    document = (snapshot.rows[::groups] // groups)[:, None, None, None]  # (B, 1, 1, 1)
    found = (ids.keys[document, place, 0], ids.values[document, place, 0])
    token, position = (column.long().masked_fill(entries < 0, -1) for column in found)
    return token, position
