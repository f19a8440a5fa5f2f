"""Loads the compiled modules and says what is live.

A module is a shared library of operators `memtrans::native_*`: `cpu` (schemas and CPU implementations), `cuda` (the
search on a GPU) and `faiss` (the search by Faiss on a GPU, called by impl/faiss/gpu.py). The functions here are those
operators under the names of `memtrans_kernels`. Importing this file loads nothing, and nothing raises because a library
is missing, broken or out of date: `status` gives the reason instead.
"""

from __future__ import annotations

import functools
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memtrans_kernels.attention_inputs import AttentionInputs

MODULES = ("cpu", "cuda", "faiss")
FOLDER = Path(__file__).resolve().parent
# Equals kInterface in csrc/memtrans.h; a library built for another number is refused.
INTERFACE = 11
INTERFACE_OPERATORS = {"cpu": "native_interface", "cuda": "native_cuda_interface", "faiss": "native_faiss_interface"}
FEW_QUERIES = 8  # of a memory row: equals kFewQueries in csrc/cuda/knn_search/search.h


def load(module: str = "cpu") -> bool:
    """Load one compiled module, once per process; True when its operators can be called.

    Args:
        module: "cpu", "cuda" or "faiss".

    Raises:
        ValueError: for any other name.
    """
    return status(module)[0]


def status(module: str = "cpu") -> tuple[bool, str]:
    """Whether one compiled module is live, after trying to load it, and one sentence that says from where or why not.

    Args:
        module: "cpu", "cuda" or "faiss".

    Raises:
        ValueError: for any other name.

    >>> live, reason = status("cpu")
    >>> isinstance(live, bool) and bool(reason)
    True
    """
    if module not in MODULES:
        raise ValueError(f"module must be one of {', '.join(MODULES)}, got {module!r}")
    return _open(FOLDER, module)


def verdict(module: str = "cpu") -> str:
    """`status` in the words that a person looks for first: built or not, loaded or why not.

    Args:
        module: "cpu", "cuda" or "faiss".

    Raises:
        ValueError: for any other name.

    >>> verdict("cpu").startswith(("built", "not built"))
    True
    """
    live, reason = status(module)
    if live:
        return "built, loaded"
    if _library(FOLDER, module) is None:
        return f"not built: {reason}"
    if module != "cpu" and not torch.cuda.is_available():
        return "built, no GPU here"
    return f"built, not loaded: {reason}"


def knn_add_(
    keys: Tensor,
    values: Tensor,
    cursor: Tensor,
    rows: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    count: Tensor | None = None,
    at: Tensor | None = None,
    first: Tensor | None = None,
) -> None:
    """`memtrans_kernels.knn_add_` in C++; `status` must have said that it is live."""
    torch.ops.memtrans.native_knn_add_.default(keys, values, cursor, rows, new_keys, new_values, count, at, first)


def knn_search(
    query: Tensor, keys: Tensor, rows: Tensor, start: Tensor, cursor: Tensor, capacity: int, k: int
) -> tuple[Tensor, Tensor]:
    """`memtrans_kernels.knn_search` in C++; `status` must have said that it is live. No float64 keys."""
    return torch.ops.memtrans.native_knn_search.default(query, keys, rows, start, cursor, capacity, k)


def knn_search_cuda(
    query: Tensor, keys: Tensor, rows: Tensor, start: Tensor, cursor: Tensor, capacity: int, k: int
) -> tuple[Tensor, Tensor]:
    """`memtrans_kernels.knn_search` in CUDA; `status("cuda")` must have said that it is live."""
    if query.dtype == torch.float64 or query[..., 0].numel() > FEW_QUERIES * rows.numel():
        query = query.to(keys.dtype)  # fewer are rounded as they are read: a launch less
    query = query.contiguous()
    if query.data_ptr() % 16:  # the copy engine reads 16 bytes at a time
        query = query.clone()
    rows, start, cursor = rows.contiguous(), start.contiguous(), cursor.contiguous()
    return torch.ops.memtrans.native_knn_search.default(query, keys, rows, start, cursor, capacity, k)


def gather_pairs(keys: Tensor, values: Tensor, rows: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """`memtrans_kernels.gather_pairs` in C++; `status` must have said that it is live."""
    pairs = torch.empty(*slots.shape, 2, keys.shape[2], dtype=dtype, device=keys.device)
    torch.ops.memtrans.native_gather_pairs.default(keys, values, rows, slots, pairs)
    return pairs


def memory_attention(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """`memtrans_kernels.memory_attention` in C++; `status` must have said that it is live. No float64."""
    return torch.ops.memtrans.native_memory_attention.default(*_with_number_as_cap(inputs))


def memory_attention_backward(
    inputs: AttentionInputs, grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, of_keys: bool = True
) -> tuple[Tensor, ...]:
    """Its gradients in C++, with the results of the reference's. No float64. Those of keys are computed in any case."""
    given = _with_number_as_cap(inputs)
    found = torch.ops.memtrans.native_memory_attention_backward.default(grad_out, grad_lse, out, lse, *given)
    return found if of_keys else (found[0], inputs.query.new_empty(0), inputs.query.new_empty(0), *found[3:])


def _with_number_as_cap(inputs: AttentionInputs) -> tuple[Any, ...]:
    """As the operators in C++ take them: no soft cap is one of 0."""
    return tuple(inputs._replace(soft_cap=inputs.soft_cap or 0.0))


def _library(folder: Path, module: str) -> Path | None:
    return next(iter(sorted(folder.glob(f"_native_{module}*.so"))), None)


@functools.cache
def _open(folder: Path, module: str) -> tuple[bool, str]:
    name = f"_native_{module}"
    library = _library(folder, module)
    if library is None:
        return False, _why_not_built(folder / f"{name}.txt")
    if module != "cpu" and not _open(folder, "cpu")[0]:
        return False, f"the cpu module, which holds the schemas, is not live: {_open(folder, 'cpu')[1]}"
    try:
        if module == "faiss":
            import_module("faiss")  # loads libfaiss.so, which the module is linked to
        torch.ops.load_library(library)
        interface = getattr(torch.ops.memtrans, INTERFACE_OPERATORS[module])()
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        # torch wraps the loader's own message, which names the symbol or the file that is missing
        return False, f"{library.name} cannot be loaded with torch {torch.__version__}: {error.__cause__ or error}"
    if interface != INTERFACE:
        return False, f"{library.name} was built for interface {interface}, this version needs {INTERFACE}: reinstall"
    if module == "faiss" and (mismatch := _faiss_mismatch(*torch.ops.memtrans.native_faiss_versions())):
        return False, mismatch
    note = folder / f"{name}.txt"
    older = f", which an earlier build left; the last one did not: {_why_not_built(note)}" if note.exists() else ""
    return True, f"loaded from {library.name}{older}"


def _faiss_mismatch(headers: int, library: int) -> str:
    """Why a build for one version of Faiss cannot use another, "" where it can; 1015001 is 1.15.1.

    Faiss keeps its binary interface within a minor version only.

    >>> _faiss_mismatch(1015000, 1015001)
    ''
    >>> _faiss_mismatch(1014002, 1015001)
    'the faiss module was built for Faiss 1.14.2, and 1.15.1 is loaded: reinstall'
    """
    built, loaded = (f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}" for number in (headers, library))
    same = headers // 1000 == library // 1000
    return "" if same else f"the faiss module was built for Faiss {built}, and {loaded} is loaded: reinstall"


def hidden_package(folder: Path | None = None, module: str = "cpu") -> Path | None:
    """Another copy of this package on Python's path that has the library, where this one has not: sources in the
    working directory come before what was installed from them. None where there is no such copy."""
    folder = FOLDER if folder is None else folder
    if _library(folder, module) is not None:
        return None
    others = (Path(entry).resolve() / "memtrans_kernels" for entry in sys.path)
    return next((other for other in others if other != folder and _library(other, module)), None)


def _why_not_built(note: Path) -> str:
    """The reason that setup.py left behind, or that there is none."""
    try:
        return note.read_text(encoding="utf-8").strip()
    except OSError:
        hidden = hidden_package(note.parent, note.stem.removeprefix("_native_"))
        if hidden is not None:
            return f"it was never built in {note.parent}, which hides {hidden}, where it was: run from another folder"
        return "it was never built: `pip install -v .` builds it and shows why where it cannot"
