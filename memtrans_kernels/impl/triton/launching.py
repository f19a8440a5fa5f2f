"""Launches that Triton has been asked for before, without asking it again what they are made of.

`kernel[grid](...)` works out in every call which compiled kernel its arguments need: 30 to 50 us of host time with the
forty arguments of attention, more than many kernels run. Here the compiled kernel is kept by all that Triton looks at,
and more: dtypes and alignment of tensors, and every other argument as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

MOST_KEPT = 1024  # combinations of arguments of all kernels
_COMPILED: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], **options: int) -> None:
    """The same as `kernel[grid](**arguments, **options)`.

    Args:
        kernel: what `triton.jit` made of a function.
        grid: one to three numbers.
        arguments: all of the kernel's, by name. A number is of one type in every launch: 16 and 16.0, which Triton
            compiles for differently, are one to a dictionary, and to ask for types takes time.
        options: of the compiler: `num_warps`, `num_stages`, the same ones in every launch of a kernel.
    """
    if type(kernel) is not JITFunction or torch.version.hip is not None:  # the interpreter; AMD asks for sizes too
        kernel[grid](**arguments, **options)
        return
    given = [arguments[name] for name in kernel.arg_names]
    kinds = [(one.dtype, one.data_ptr() % 16) if isinstance(one, Tensor) else one for one in given]
    key = (kernel.fn, given[0].get_device(), *options.values(), *kinds)
    compiled = _COMPILED.get(key)
    if compiled is not None:
        compiled[(*grid, 1, 1)](*given)
        return
    if len(_COMPILED) >= MOST_KEPT:
        _COMPILED.clear()
    _COMPILED[key] = kernel[grid](**arguments, **options)
