"""Backend name -> implementation of an operator; available, or why not.

`auto` takes the fastest that can run on the tensors at hand: the first live one in the order of IMPLEMENTATIONS. A
named backend raises with the reason where it cannot run. `MEMTRANS_BACKEND` stands in for `auto`; operators that the
named backend does not implement at all stay on `auto`.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memtrans_kernels import native
from memtrans_kernels.attention_inputs import AttentionInputs, WholeInputs
from memtrans_kernels.mending import mending_command

Function = Callable[..., Any]
BACKENDS = ("auto", "reference", "triton", "native", "faiss")
ENVIRONMENT_VARIABLE = "MEMTRANS_BACKEND"


def _always_live() -> str | None:
    return None


def _native_missing() -> str | None:
    live, reason = native.status()
    return None if live else reason


def _native_cuda_missing() -> str | None:
    live, reason = native.status("cuda")
    return None if live else reason


def _faiss_bridge_missing() -> str | None:
    live, reason = native.status("faiss")
    return None if live else reason


@functools.cache
def _faiss_package_missing() -> str | None:
    return None if find_spec("faiss") else "the package faiss is not installed"


@functools.cache
def _triton_missing() -> str | None:
    return None if find_spec("triton") else "Triton is not installed"


def _not_interpreting() -> str | None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs on CPU tensors only in its interpreter: set TRITON_INTERPRET=1"
    return _triton_missing()


def _any_tensors(*arguments: Any) -> str | None:
    return None


NARROW = "no float64"


def _no_float64(*arguments: Any) -> str | None:
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.dtype == torch.float64:
            return "it computes in float32, not in float64"
    return None


def _no_float64_keys(query: Tensor, keys: Tensor, *_: Any) -> str | None:
    return _no_float64(keys)  # the query is cast to the dtype of the keys


def _unfit_for_cpu_write(keys: Tensor, values: Tensor, *_: Any) -> str | None:
    if any(ring.shape[-1] > 1 and ring.stride(-1) != 1 for ring in (keys, values)):
        return "keys and values must be contiguous in their last dimension"
    return None


RING_LIMITS = f"{NARROW}; contiguous keys, values and cursor"


def _unfit_for_ring_write(keys: Tensor, values: Tensor, cursor: Tensor, *others: Any) -> str | None:
    if not (keys.is_contiguous() and values.is_contiguous() and cursor.is_contiguous()):
        return "keys, values and cursor must be contiguous"  # they are written in place, so no copy can stand for them
    return _no_float64(keys, values, *others)


SEARCH_WIDTHS, SEARCH_MOST_NEIGHBOURS = (32, 64, 96, 128, 256), 128  # what csrc/cuda/knn_search is compiled for
SEARCH_LIMITS = f"float16 and bfloat16 keys, D of {SEARCH_WIDTHS}, K up to {SEARCH_MOST_NEIGHBOURS}, Hopper GPUs"


def _unfit_for_hopper(
    query: Tensor, keys: Tensor, rows: Tensor, start: Tensor, cursor: Tensor, capacity: int, k: int
) -> str | None:
    if keys.dtype not in (torch.float16, torch.bfloat16):
        return f"keys must be float16 or bfloat16, got {keys.dtype}"
    if keys.shape[-1] not in SEARCH_WIDTHS:
        return f"D must be one of {SEARCH_WIDTHS}, got {keys.shape[-1]}"
    if k > SEARCH_MOST_NEIGHBOURS:
        return f"k must be at most {SEARCH_MOST_NEIGHBOURS}, got {k}"
    if not keys.is_contiguous() or keys.data_ptr() % 16:
        return "keys must be contiguous and begin at a multiple of 16 bytes"
    if torch.cuda.get_device_capability(keys.device)[0] != 9:
        return f"it needs a Hopper GPU, got {torch.cuda.get_device_name(keys.device)}"
    return None


TRITON_SEARCH_MOST = (2048, 256)  # D, which its tiles are chosen for; K, as a program holds what it chooses from
TRITON_SEARCH_LIMITS = f"{NARROW}, contiguous keys, D up to {TRITON_SEARCH_MOST[0]}, K up to {TRITON_SEARCH_MOST[1]}"


def _unfit_for_triton_search(
    query: Tensor, keys: Tensor, rows: Tensor, start: Tensor, cursor: Tensor, *sizes: int
) -> str | None:
    (width, neighbours), (most_width, most_neighbours) = (keys.shape[-1], sizes[1]), TRITON_SEARCH_MOST
    if width > most_width or neighbours > most_neighbours:
        return f"D must be at most {most_width} and K {most_neighbours}, got {width} and {neighbours}"
    if not keys.is_contiguous():
        return "keys must be contiguous, as `keys.contiguous()` is"
    return _no_float64_keys(query, keys)


ATTENTION_MOST = 256  # widths of keys and values, and neighbours: a tile of a width is in registers
ATTENTION_LIMITS = f"{NARROW}, D, E and K up to {ATTENTION_MOST}"


def _wide_attention(inputs: AttentionInputs, *of_backward: Tensor) -> str | None:
    return _no_float64(*inputs, *of_backward)


def _beyond_attention_tiles(inputs: AttentionInputs, *of_backward: Tensor) -> str | None:
    if max(inputs.widest, inputs.neighbours) > ATTENTION_MOST:
        sizes = f"{inputs.width}, {inputs.value_width} and {inputs.neighbours}"
        return f"D, E and K must be at most {ATTENTION_MOST}, got {sizes}"
    return _no_float64(*inputs, *of_backward)


WHOLE_ATTENTION_LIMITS = f"{NARROW}, D and E up to {ATTENTION_MOST}"


def _beyond_whole_attention_tiles(inputs: WholeInputs) -> str | None:
    if inputs.widest > ATTENTION_MOST:
        sizes = f"{inputs.keys.shape[2]} and {inputs.values.shape[2]}"
        return f"D and E must be at most {ATTENTION_MOST}, got {sizes}"
    return _no_float64(*inputs)


FAISS_MOST_NEIGHBOURS = 2048  # getMaxKSelection in Faiss
FAISS_LIMITS = f"no float64, K up to {FAISS_MOST_NEIGHBOURS}, scores within ±2e9 for float16 keys; no CUDA graphs"


def _unfit_for_faiss(
    query: Tensor, keys: Tensor, rows: Tensor, start: Tensor, cursor: Tensor, capacity: int, k: int
) -> str | None:
    if k > FAISS_MOST_NEIGHBOURS:
        return f"k must be at most {FAISS_MOST_NEIGHBOURS}, got {k}"
    return _no_float64(keys)


@functools.cache
def _loaded(module: str, function: str) -> Function:
    return getattr(import_module(f"memtrans_kernels.{module}"), function)


class Implementation(NamedTuple):
    """Where an operator's implementation lives, on which device it runs, and what may speak against it."""

    backend: str
    device: str
    module: str
    function: str
    missing: Callable[[], str | None] = _always_live  # why this process cannot run it, None if it can
    unfit: Callable[..., str | None] = _any_tensors  # why it cannot run on these arguments, None if it can
    limits: str = ""  # what `unfit` lets through, in words

    def load(self) -> Function:
        return _loaded(self.module, self.function)

    def why_not(self) -> str | None:
        if self.device == "cuda" and not torch.cuda.is_available():
            return "PyTorch sees no CUDA device"
        return self.missing()


def _reference(operator: str, function: str | None = None, on_host: str | None = None) -> tuple[Implementation, ...]:
    module, function = f"impl.reference.{operator.rstrip('_')}", function or operator
    return (
        Implementation("reference", "cpu", module, on_host or function),
        Implementation("reference", "cuda", module, function, limits="slow on every GPU"),
    )


# Those for which `make test-targets` compiles every kernel; measured is an H100 alone.
TRITON_GPUS = "fast on NVIDIA GPUs from compute capability 8.0 on and AMD's gfx90a, gfx942, gfx950 and gfx1100"


def _triton(
    module: str, function: str, unfit: Callable[..., str | None] = _no_float64, limits: str = NARROW
) -> tuple[Implementation, ...]:
    return (
        Implementation(
            "triton", "cuda", f"impl.triton.{module}", function, _triton_missing, unfit, f"{limits}; {TRITON_GPUS}"
        ),
        Implementation("triton", "cpu", f"impl.triton.{module}", function, _not_interpreting, unfit, limits),
    )


def _ordered(*candidates: tuple[Implementation, ...]) -> tuple[Implementation, ...]:
    """Fastest first; on the CPU Triton's interpreter comes last, behind the reference."""
    flat = [candidate for group in candidates for candidate in group]
    return tuple(sorted(flat, key=lambda candidate: (candidate.backend, candidate.device) == ("triton", "cpu")))


def _attention(function: str) -> tuple[Implementation, ...]:
    return _ordered(
        _triton(function, function, _beyond_attention_tiles, ATTENTION_LIMITS),
        (Implementation("native", "cpu", "native", function, _native_missing, _wide_attention, NARROW),),
        _reference("memory_attention", function),
    )


IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {
    "knn_add_": _ordered(
        (Implementation("native", "cpu", "native", "knn_add_", _native_missing, _unfit_for_cpu_write),),
        _triton("knn_add", "knn_add_", _unfit_for_ring_write, RING_LIMITS),
        _reference("knn_add_"),
    ),
    "knn_search": _ordered(
        (
            Implementation("native", "cpu", "native", "knn_search", _native_missing, _no_float64_keys, NARROW),
            Implementation(
                "native", "cuda", "native", "knn_search_cuda", _native_cuda_missing, _unfit_for_hopper, SEARCH_LIMITS
            ),
        ),
        _triton("knn_search", "knn_search", _unfit_for_triton_search, TRITON_SEARCH_LIMITS),
        _reference("knn_search", on_host="knn_search_on_host"),
        (  # behind the reference, so that `auto` never takes them: equal keys come in any order
            Implementation(
                "faiss", "cpu", "impl.faiss.cpu", "knn_search", _faiss_package_missing, _no_float64_keys, NARROW
            ),
            Implementation(
                "faiss", "cuda", "impl.faiss.gpu", "knn_search", _faiss_bridge_missing, _unfit_for_faiss, FAISS_LIMITS
            ),
        ),
    ),
    "knn_merge": _ordered(
        _triton("knn_merge", "knn_merge"),
        _reference("knn_merge"),
        (  # what Faiss found has no order among equals, and only the reference does without one
            Implementation("faiss", "cpu", "impl.reference.knn_merge", "knn_merge", _faiss_package_missing),
            Implementation("faiss", "cuda", "impl.reference.knn_merge", "knn_merge", _faiss_bridge_missing),
        ),
    ),
    "cosine": _ordered(_triton("cosine", "cosine"), _reference("cosine")),
    "cosine_backward": _ordered(_triton("cosine", "cosine_backward"), _reference("cosine", "cosine_backward")),
    "gather_logits": _ordered(_triton("gather_logits", "gather_logits"), _reference("gather_logits")),
    "gather_logits_backward": _ordered(
        _triton("gather_logits", "gather_logits_backward"), _reference("gather_logits", "gather_logits_backward")
    ),
    "gather_pairs": _ordered(
        (Implementation("native", "cpu", "native", "gather_pairs", _native_missing),),
        _triton("gather_pairs", "gather_pairs", _any_tensors, ""),
        _reference("gather_pairs"),
    ),
    "memory_attention": _attention("memory_attention"),
    "memory_attention_backward": _attention("memory_attention_backward"),
    "whole_attention": _ordered(
        _triton("whole_attention", "whole_attention", _beyond_whole_attention_tiles, WHOLE_ATTENTION_LIMITS),
        _reference("whole_attention"),
    ),
}

FORMULAS = {
    "cosine": "cosine",
    "gather_logits": "gather_logits",
    "memory_attention": "formula",
}  # functions of the reference's modules


def check_name(backend: str) -> str:
    """Returns `backend`, or raises ValueError naming the choices."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def implements(operator: str, backend: str) -> bool:
    """Whether a named backend has this operator at all, on whatever device."""
    return any(candidate.backend == backend for candidate in IMPLEMENTATIONS[operator])


def named(operator: str, backend: str) -> str:
    """The backend that is asked for: what MEMTRANS_BACKEND names in place of `auto`, where it has this operator.

    Raises ValueError when there is no such name.
    """
    if backend != "auto":
        return backend
    instead = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    return instead if instead == "auto" or implements(operator, check_name(instead)) else "auto"


@functools.cache
def _candidates(operator: str, backend: str, device: str) -> tuple[tuple[Implementation, str | None], ...]:
    """The implementations to try, in order, each with the reason why this process cannot run it, None if it can.

    Kept, because what is installed stays as it is while a process runs, and asking is slow: files, environment, driver.
    """
    return tuple(
        (candidate, candidate.why_not())
        for candidate in IMPLEMENTATIONS[operator]
        if candidate.device == device and backend in ("auto", candidate.backend)
    )


def resolve(operator: str, backend: str, *arguments: Any) -> Function:
    """The function that runs `operator` on `arguments`, of which the first has a device.

    Raises RuntimeError with the reason when a named backend cannot, ValueError when there is no such name.
    """
    backend, device = named(operator, backend), arguments[0].device.type
    reasons: list[str] = []
    for candidate, missing in _candidates(operator, backend, device):
        reason = missing or candidate.unfit(*arguments)
        if reason is None:
            if candidate.backend == "reference" and reasons:
                _warn_slow_path(operator, device, "; ".join(reasons))
            return candidate.load()
        reasons.append(f"{candidate.backend}: {reason}")
    detail = "; ".join(reasons) or f"{backend} does not implement it"
    raise RuntimeError(f"backend={backend!r} cannot run {operator} on {device}: {detail}")


def formula(operator: str) -> Function:
    """The reference of a differentiable operator in plain PyTorch, which any transform and any order of derivative can
    go through, with autocast kept out."""
    function = getattr(import_module(f"memtrans_kernels.impl.reference.{operator}"), FORMULAS[operator])

    def without_autocast(*arguments: Any) -> Any:
        with torch.autocast(arguments[0].device.type, enabled=False):
            return function(*arguments)

    return without_autocast


def run(operator: str, backend: str, *arguments: Any) -> Any:
    """Runs `operator` on the GPU that its tensors live on, as kernels go to the current one, and in the dtypes given:
    an autocast around it would round the reference's matrix products."""
    function = resolve(operator, backend, *arguments)
    device: torch.device = arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device), torch.autocast(device.type, enabled=False):
            return function(*arguments)
    if not torch.is_autocast_enabled(device.type):
        return function(*arguments)
    torch.set_autocast_enabled(device.type, False)  # as torch.autocast does, which takes several times as long
    try:
        return function(*arguments)
    finally:
        torch.set_autocast_enabled(device.type, True)


def _warn_slow_path(operator: str, device: str, reasons: str) -> None:
    """Says that plain PyTorch runs: on a GPU once for each reason; on a CPU once, where the extension lacks.

    A CPU takes the plain version for float64 too, which is what it is for.
    """
    if device == "cuda":
        _warn_once(
            f"{operator} runs in plain PyTorch, which is slow: {reasons}. Mend one of these reasons, or pass "
            "backend='reference' to have it so without a warning"
        )
    elif reason := _native_missing():
        mending = "" if native.hidden_package() else f"; `{mending_command()}` builds it"
        _warn_once(
            f"search and attention run in plain PyTorch, which is slow, because the C++ extension is missing ({reason})"
            f"{mending}"
        )


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


class BackendInfo(NamedTuple):
    """One line of `python -m memtrans info`."""

    operator: str
    backend: str
    device: str
    live: bool
    reason: str  # why not, or the limits within which it is


def backends_info() -> list[BackendInfo]:
    """Every implementation of every operator, per device: live or why not, in the order `auto` tries them.

    >>> [line.backend for line in backends_info() if line.operator == "cosine" and line.device == "cpu"]
    ['reference', 'triton']
    """
    lines = []
    for operator, candidates in IMPLEMENTATIONS.items():
        for candidate in candidates:
            reason = candidate.why_not()
            lines.append(
                BackendInfo(operator, candidate.backend, candidate.device, reason is None, reason or candidate.limits)
            )
    return lines
