"""The state of a memory: the tensors that `KNNMemory.state_dict` returns and `load_state_dict` takes up.

A whole memory has one state; of a memory that several ranks hold, each rank has the state of its shard.

    keys          (R, n, D)   each row's entries, old to new, behind filler where a row holds fewer than the longest one
    values        (R, n, E)   likewise
    lengths       (R,) int64  how many entries each row holds, in all shards together
    ids           (R, n) int64  the ids of the entries, where they are kept
    positions     (R,) int64  how many entries each row's document was given, where ids are kept
    clearings     (R,) int64  how often each row was cleared, where one was: XL caches saved beside it say it too
    entries       (R,) int64  a shard's alone: how many entries the whole memory has ever stored in each row
    shard         (2,) int64  a shard's alone: its number and W; entry i of a row is in shard i mod W

Shapes: R memory rows, n entries of the longest row, D width of keys, E of values, W shards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from memtrans_kernels import checks

SHARD = "shard"  # the name that a shard's state has, and a whole memory's has not


def state_parts(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (R, n, D), values (R, n, E) and lengths (R,) of a state.

    Raises TypeError where `state` is no mapping, ValueError where one of the three is missing.
    """
    check_mapping(state)
    missing = {"keys", "values", "lengths"} - set(state)
    if missing:
        raise ValueError(f"state must hold keys, values and lengths, got none of {sorted(missing)}")
    return state["keys"], state["values"], state["lengths"]


def check_mapping(state: object) -> None:
    """Raises TypeError unless `state` is a mapping."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a mapping of names to tensors, got {type(state).__name__}")


def with_ids(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The state with ids; one that has none is numbered from the oldest entry that each row holds.

    >>> keys = torch.zeros(2, 3, 1)
    >>> with_ids({"keys": keys, "values": keys, "lengths": torch.tensor([3, 1])})["ids"].tolist()
    [[0, 1, 2], [-2, -1, 0]]
    """
    if "ids" in state:
        return state
    keys, lengths = state["keys"], state["lengths"]
    entry = torch.arange(keys.shape[1], device=keys.device)[None]
    total = torch.full_like(lengths, keys.shape[1])
    if SHARD in state:
        total, (rank, size) = state["entries"], state[SHARD].tolist()
        entry = (held(total, rank, size)[:, None] - keys.shape[1] + entry) * size + rank
    first = (total - lengths).to(keys.device)
    return {**state, "ids": entry - first[:, None], "positions": lengths}


def without_ids(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The state without ids.

    >>> without_ids({"keys": torch.zeros(0), "ids": torch.zeros(0), "positions": torch.zeros(0)})
    {'keys': tensor([])}
    """
    return {name: tensor for name, tensor in state.items() if name not in ("ids", "positions")}


def holds_nothing(state: Mapping[str, Tensor]) -> bool:
    """Whether the state is a whole memory's without entries: then nothing in it needs a device to go to."""
    return SHARD not in state and state["keys"].shape[1] == 0


def dtype_names(**dtypes: torch.dtype | None) -> dict[str, str | None]:
    """The names that a file's configuration has for dtypes; None stands for the device's default.

    >>> dtype_names(dtype=torch.float16, value_dtype=None)
    {'dtype': 'float16', 'value_dtype': None}
    """
    return {name: None if dtype is None else str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()}


def memory_arguments(configuration: Mapping[str, Any], keys: Tensor, values: Tensor) -> dict[str, Any]:
    """The arguments of a memory that was saved: the configuration of its file, with dtypes in place of their names.

    A file of an earlier version names no dtype; its memory gets those of `keys` and `values`.

    Raises ValueError where the configuration names a dtype that no memory can have.
    """
    by_name = {str(dtype).removeprefix("torch."): dtype for dtype in checks.STORED}
    said = {name: configuration[name] for name in ("dtype", "value_dtype") if name in configuration}
    unknown = set(said.values()) - set(by_name) - {None}
    if unknown:
        raise ValueError(f"configuration must name dtypes of {', '.join(by_name)}, got {unknown}")
    held = {"dtype": keys.dtype, "value_dtype": values.dtype}
    return {**configuration, **held, **{name: by_name.get(dtype) for name, dtype in said.items()}}


def check_state(state: Mapping[str, Tensor], rows: int, widths: tuple[int, int], shard: tuple[int, int] | None) -> None:
    """Raises ValueError or TypeError unless a memory can take the state up.

    Args:
        state: of a whole memory or of a shard.
        rows: R of the memory.
        widths: D and E of the memory.
        shard: number of the memory's own shard, and W; None for a whole memory.
    """
    keys, values, lengths = state_parts(state)
    checks.floating(keys=keys, values=values)
    checks.typed(torch.int64, lengths=lengths)
    width = keys.shape[1] if keys.dim() == 3 else 0
    fits = all(tensor.shape == (rows, width, of_each) for tensor, of_each in zip((keys, values), widths, strict=True))
    if not fits or tuple(lengths.shape) != (rows,):
        of_values = "" if widths[0] == widths[1] else f" of shape ({rows}, entries, {widths[0]})"
        raise ValueError(
            f"state must hold keys{of_values} and values of shape ({rows}, entries, {widths[1]}) and lengths of shape "
            f"({rows},), got {tuple(keys.shape)}, {tuple(values.shape)} and {tuple(lengths.shape)}"
        )
    if "ids" in state:
        _check_ids(state)
    if "clearings" in state:
        _check_clearings(state["clearings"], rows)
    if SHARD in state:
        rank, size = state[SHARD].tolist()
        if (rank, size) != shard:
            fitting = "a whole memory's" + ("" if shard is None else f" or shard {shard[0]} of {shard[1]}")
            raise ValueError(
                f"state must be {fitting}, got shard {rank} of {size}; join_shards makes all shards a whole"
            )
        width = (width + 1) * size  # some ranks hold one more than this
    if not bool(((lengths >= 0) & (lengths <= width)).all()):
        raise ValueError(f"lengths must be in [0, {width}], got {lengths.tolist()}")
    if checks.may_look(values):
        _check_values(state)


def _check_values(state: Mapping[str, Tensor]) -> None:
    """Raises ValueError where an entry that a search may find has a value that `add` would refuse."""
    keys, values, lengths = state_parts(state)
    if SHARD in state:
        total, (rank, size) = state["entries"], state[SHARD].tolist()
        lengths = held(total, rank, size) - held(total - lengths, rank, size)
    place = torch.arange(keys.shape[1], device=keys.device)
    taken = place >= keys.shape[1] - lengths.to(keys.device)[:, None]
    if bool((taken & keys.isfinite().all(dim=-1) & values.isnan().any(dim=-1)).any()):
        raise ValueError("values must be numbers beside keys that can be found, got NaN components")


def _check_ids(state: Mapping[str, Tensor]) -> None:
    rows, width = state["keys"].shape[:2]
    if "positions" not in state:
        raise ValueError("state must hold positions beside ids, got none")
    checks.typed(torch.int64, ids=state["ids"], positions=state["positions"])
    if state["ids"].shape != (rows, width) or state["positions"].shape != (rows,):
        raise ValueError(
            f"state must hold ids of shape ({rows}, {width}) and positions of shape ({rows},), "
            f"got {tuple(state['ids'].shape)} and {tuple(state['positions'].shape)}"
        )


def _check_clearings(clearings: Tensor, rows: int) -> None:
    checks.typed(torch.int64, clearings=clearings)
    if clearings.shape != (rows,) or not bool((clearings >= 0).all()):
        raise ValueError(f"clearings must be counts of shape ({rows},), got {clearings.tolist()}")


def held(entries: Tensor, rank: int | Tensor, size: int) -> Tensor:
    """How many of the first `entries` entries of a row are in shard `rank` of `size`."""
    return ((entries - rank + (size - 1)) // size).clamp(min=0)


def join_shards(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Puts the states of all shards of a memory together: the result loads in one process, or on other ranks.

    Args:
        states: what `KNNMemory.state_dict` returned on each rank, in any order.

    Returns:
        the state of the whole memory.

    Raises:
        ValueError: `states` are not all the shards of one memory at one time.

    >>> def shard(rank, *numbers):
    ...     keys, three = torch.tensor(numbers).reshape(1, -1, 1), torch.tensor([3])
    ...     return {"keys": keys, "values": keys, "lengths": three, "entries": three, "shard": torch.tensor([rank, 2])}
    >>> join_shards([shard(0, 0.0, 2.0), shard(1, 1.0)])["keys"].flatten().tolist()
    [0.0, 1.0, 2.0]
    """
    shards = [tuple(state[SHARD].tolist()) if SHARD in state else None for state in states]
    if not states or sorted(shards, key=str) != sorted(((rank, len(states)) for rank in range(len(states))), key=str):
        raise ValueError(f"states must be those of all shards of one memory, got shards {shards}")
    states = sorted(states, key=lambda state: int(state[SHARD][0]))
    total, lengths = states[0]["entries"], states[0]["lengths"]
    if any(not torch.equal(state[name], states[0][name]) for state in states for name in ("entries", "lengths")):
        raise ValueError("states must be those of one memory at one time, got shards that differ in what they hold")
    whole = {"lengths": lengths}
    for name in ("keys", "values", "ids"):
        if all(name in state for state in states):
            whole[name] = _interleaved([state[name] for state in states], total, lengths)
    of_all = ("positions", "clearings") if "ids" in whole else ("clearings",)
    return {**whole, **{name: states[0][name] for name in of_all if name in states[0]}}


def _interleaved(shards: Sequence[Tensor], total: Tensor, lengths: Tensor) -> Tensor:
    """Puts the keys, values or ids of all shards, (R, n, ...) each, into one tensor; zeros lead in shorter rows.

    total: (R,), entries ever stored in the whole memory. lengths: (R,), entries that it holds.
    """
    longest, size = int(lengths.max()), len(shards)
    entry = total[:, None] - longest + torch.arange(longest, device=total.device)  # (R, entries)
    row = torch.arange(len(total), device=total.device)[:, None].expand_as(entry)
    whole = shards[0].new_zeros(*entry.shape, *shards[0].shape[2:])
    for rank, shard in enumerate(shards):
        here = (entry % size == rank) & (entry >= total[:, None] - lengths[:, None])
        place = shard.shape[1] - held(total, rank, size)[:, None] + entry // size
        whole[here] = shard[row[here], place[here]]
    return whole
