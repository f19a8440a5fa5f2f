"""Whether a call only has to run, so that an operator can go straight to its implementation.

PyTorch's dispatcher, with the Python around a custom operator, costs 30 to 200 us of host time a call, more than many
kernels run. What it is for are compilers, transforms, modes and tensors with ideas of their own; without any of these
the implementation alone does the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_OWN = (Tensor, Parameter)
MOST_KEPT = 256
_KEPT: dict[tuple[Any, ...], Any] = {}
Made = TypeVar("Made")


def is_plain(*arguments: Any) -> bool:
    """True where nothing compiles, traces, transforms or watches, and every tensor is one of PyTorch's own.

    Args:
        arguments: of the operator; what is no tensor does not count.

    >>> is_plain(torch.ones(1), None, 3)
    True
    >>> torch.func.vmap(lambda x: x * is_plain(x))(torch.ones(1))
    tensor([0.])
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    ):
        return False
    for one in arguments:  # noqa: SIM110 - a loop takes half the time of `all`
        if isinstance(one, Tensor) and (type(one) not in _OWN or one.is_meta):
            return False
    return True


def kept(make: Callable[..., Made], device: torch.device, *arguments: Any) -> Made:
    """What `make(device, *arguments)` gives: tensors on that device that nobody writes to, made once by eager calls.

    Each stream has its own, so that they are there before whoever reads them; what is compiled or captured makes them
    for itself.

    Args:
        make: a function of the arguments alone. device: where its tensors are. arguments: hashable.

    >>> zeros = lambda device, size: torch.zeros(size, device=device)
    >>> kept(zeros, torch.device("cpu"), 3) is kept(zeros, torch.device("cpu"), 3)
    True
    """
    on_gpu = device.type == "cuda"
    if not is_plain() or (on_gpu and torch.cuda.is_current_stream_capturing()):
        return make(device, *arguments)
    key = (make, device, torch.cuda.current_stream(device) if on_gpu else None, *arguments)
    found: Made | None = _KEPT.get(key)  # asked once: another thread may clear it
    if found is None:
        if len(_KEPT) >= MOST_KEPT:
            _KEPT.clear()
        with torch.inference_mode(False):  # what is made in inference may be read in training
            found = _KEPT[key] = make(device, *arguments)
    return found


def is_differentiated_by_transform(*arguments: Any) -> bool:
    """True inside torch.func.grad, vjp, jvp and what is made of them, and for duals of forward-mode differentiation.

    A custom operator has no part in these: left alone it refuses the first and gives zeros in the second.

    >>> x = torch.ones(1)
    >>> is_differentiated_by_transform(x)
    False
    >>> torch.func.jvp(lambda x: x * is_differentiated_by_transform(x), (x,), (x,))[1]
    tensor([1.])
    """
    if torch.compiler.is_compiling():
        return False
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if torch._C._are_functorch_transforms_active():
        return any(_is_tracked(tensor) for tensor in tensors)
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def is_transformed() -> bool:
    """True inside torch.func's transforms, whatever they do, and in forward-mode differentiation.

    >>> is_transformed(), torch.func.vmap(lambda x: x * is_transformed())(torch.ones(1))
    (False, tensor([1.]))
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _is_tracked(tensor: Tensor) -> bool:
    """Whether one of the transforms around `tensor` differentiates."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False
