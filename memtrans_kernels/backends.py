"""Backend name -> implementation of an operator; available, or why not.

`auto` takes the fastest that can run on the tensors at hand: the first live one in the order of IMPLEMENTATIONS. A
named backend raises with the reason where it cannot run. `MEMTRANS_BACKEND` stands in for `auto`; operators that the
named backend does not implement at all stay on `auto`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor

from memtrans_kernels import native

BACKENDS = ("auto", "reference", "triton", "native", "faiss")
ENVIRONMENT_VARIABLE = "MEMTRANS_BACKEND"


def _always_live() -> str | None:
    return None


def _native_missing() -> str | None:
    live, reason = native.status()
    return None if live else reason


class Implementation(NamedTuple):
    """Where an operator's implementation lives, on which devices it runs and what may be missing."""

    backend: str
    module: str
    function: str
    devices: tuple[str, ...]
    missing: Callable[[], str | None] = _always_live  # why this process cannot run it, None if it can

    def load(self) -> Callable[..., Any]:
        return getattr(import_module(self.module), self.function)

    def why_not(self, device: str) -> str | None:
        if device not in self.devices:
            return f"it runs on {' and '.join(self.devices)} tensors, not on {device}"
        return self.missing()


def _reference(function: str, devices: tuple[str, ...] = ("cpu", "cuda")) -> Implementation:
    return Implementation("reference", "memtrans_kernels.reference", function, devices)


IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {
    "knn_add_": (
        Implementation("native", "memtrans_kernels.native", "knn_add_", ("cpu",), _native_missing),
        _reference("knn_add_"),
    ),
    "knn_search": (_reference("knn_search_on_host", ("cpu",)), _reference("knn_search", ("cuda",))),
    "cosine": (_reference("cosine"),),
    "cosine_backward": (_reference("cosine_backward"),),
    "memory_attention": (_reference("memory_attention"),),
    "memory_attention_backward": (_reference("memory_attention_backward"),),
}


def check_name(backend: str) -> str:
    """Returns `backend`, or raises ValueError naming the choices."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def implements(operator: str, backend: str) -> bool:
    """Whether a named backend has this operator at all, on whatever device."""
    return any(candidate.backend == backend for candidate in IMPLEMENTATIONS[operator])


def resolve(operator: str, backend: str, tensor: Tensor) -> Callable[..., Any]:
    """The function that runs `operator` on tensors like `tensor`.

    Raises RuntimeError with the reason when a named backend cannot, ValueError when there is no such name.
    """
    if backend == "auto":
        named = check_name(os.environ.get(ENVIRONMENT_VARIABLE, "auto"))
        backend = named if implements(operator, named) else "auto"
    reasons = []
    for candidate in IMPLEMENTATIONS[operator]:
        if backend in ("auto", candidate.backend):
            reason = candidate.why_not(tensor.device.type)
            if reason is None:
                return candidate.load()
            reasons.append(f"{candidate.backend}: {reason}")
    detail = "; ".join(reasons) or f"{backend} does not implement it"
    raise RuntimeError(f"backend={backend!r} cannot run {operator} on {tensor.device}: {detail}")


class BackendInfo(NamedTuple):
    """One line of `python -m memtrans info`."""

    operator: str
    backend: str
    device: str
    live: bool
    reason: str


def backends_info() -> list[BackendInfo]:
    """Every implementation of every operator, per device: live or why not, in the order `auto` tries them.

    >>> [line.backend for line in backends_info() if line.operator == "cosine" and line.device == "cpu"]
    ['reference']
    """
    lines = []
    for operator, candidates in IMPLEMENTATIONS.items():
        for candidate in candidates:
            for device in candidate.devices:
                reason = candidate.why_not(device)
                lines.append(BackendInfo(operator, candidate.backend, device, reason is None, reason or ""))
    return lines
