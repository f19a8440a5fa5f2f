"""What may be known of a layer without reading numbers that it may not hold now.

Weights are offloaded (accelerate), packed (4 bits, `quantize_dynamic`), emptied between passes (ZeRO-3), made of others
(a parametrisation) or belong to a wrapper's inner layer (LoRA). So a layer is called; its weight is looked at where the
layer is exactly PyTorch's and nothing stands between.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import is_parametrized


def is_bare(module: nn.Module) -> bool:
    """Whether calling the module is its class's `forward` and nothing else: no hook, no parametrisation.

    Accelerate replaces the instance's `forward`; hooks of all modules (`register_module_forward_hook`) count.

    >>> is_bare(nn.Linear(2, 2)), is_bare(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    (True, False)
    """
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooked = any(getattr(module, name, None) for name in hooks)
    hooked = hooked or _has_any_global_hook()
    return not hooked and "forward" not in module.__dict__ and not is_parametrized(module)


def bare_weight(layer: nn.Module | None, kind: type[nn.Module]) -> Tensor | None:
    """The weight of a layer that is exactly of that class, bare, and holds its numbers now; None of any other.

    >>> bare_weight(nn.Linear(2, 3), nn.Linear).shape, bare_weight(nn.Linear(2, 3, device="meta"), nn.Linear)
    (torch.Size([3, 2]), None)
    """
    if layer is None or type(layer) is not kind or not is_bare(layer):
        return None
    weight = layer._parameters.get("weight")
    if weight is None or type(weight) is not nn.Parameter or weight.is_meta or weight.numel() == 0:
        return None
    return weight


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in `eval()` mode inside a `with`; behind it every layer is in the mode that it was in.

    >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with evaluating(model):
    ...     model[0].training
    False
    >>> model.training, model[0].training, model[1].training
    (True, True, False)
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def device_of(module: nn.Module) -> torch.device:
    """Where the first parameter or buffer is that is anywhere; the CPU where none is.

    >>> device_of(nn.Linear(2, 2)), device_of(nn.ReLU())
    (device(type='cpu'), device(type='cpu'))
    """
    for tensors in (module.parameters(), module.buffers()):
        for tensor in tensors:
            if not tensor.is_meta:
                return tensor.device
    return torch.device("cpu")


def dtype_of(module: nn.Module) -> torch.dtype:
    """Of the first floating-point parameter or buffer; float32 where there is none.

    >>> dtype_of(nn.Linear(2, 2, dtype=torch.bfloat16))
    torch.bfloat16
    """
    for tensors in (module.parameters(), module.buffers()):
        for tensor in tensors:
            if tensor.is_floating_point():
                return tensor.dtype
    return torch.float32
