"""Whether kernels in Triton's interpreter read and write inside the tensors that they are given, and nowhere else.

On a GPU a read beside a tensor gives what happens to lie there, or ends the process; a mask may hide it from results.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from torch import Tensor


@contextmanager
def inside_arguments() -> Iterator[None]:
    """Has an interpreted kernel fail at the first address, not masked, that is none of its arguments'."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    places = np.empty((0, 2), dtype=np.int64)
    begin = GridExecutor._init_args_hst
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def beginning(self: Any, arguments: Any, named: dict[str, Any]) -> Any:
        nonlocal places
        on_host = begin(self, arguments, named)
        places = _places([one for one in (*on_host[0], *on_host[1].values()) if isinstance(one, Tensor)])
        return on_host

    def loading(self: Any, addresses: Any, mask: Any, *others: Any) -> Any:
        _check(addresses, mask, places)
        return load(self, addresses, mask, *others)

    def storing(self: Any, addresses: Any, numbers: Any, mask: Any, *others: Any) -> Any:
        _check(addresses, mask, places)
        return store(self, addresses, numbers, mask, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "_init_args_hst", beginning)
        patch.setattr(InterpreterBuilder, "create_masked_load", loading)
        patch.setattr(InterpreterBuilder, "create_masked_store", storing)
        yield


def _places(tensors: list[Tensor]) -> np.ndarray:
    """Where tensors begin and end in memory (places, 2), in order; those that overlap are one."""
    merged: list[list[int]] = []
    for start, end in sorted(_place(tensor) for tensor in tensors if tensor.numel()):
        if merged and start < merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return np.array(merged, dtype=np.int64).reshape(-1, 2)


def _place(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _check(addresses: Any, mask: Any, places: np.ndarray) -> None:
    asked = addresses.data[np.broadcast_to(mask.data.astype(bool), addresses.data.shape)].astype(np.int64)
    bytes_of_each = max(1, addresses.get_element_ty().primitive_bitwidth // 8)
    which = np.searchsorted(places[:, 0], asked, side="right") - 1
    inside = which >= 0
    inside[inside] = asked[inside] + bytes_of_each <= places[which[inside], 1]
    assert inside.all(), f"{int((~inside).sum())} of {inside.size} addresses are outside the kernel's arguments"
