"""Exact top-K search against its rivals, all in one run, over memories that are full and have wrapped.

Keys and queries are random; those of `trained-<steps>-*` and `hexdump-<steps>-*` are what a small model made of text
(trained_keys.py), those of `hard-<kind>-*` are of hard_rings.py. `b1-*` is one document. `ceiling_*` are what the
machine does at best in the same run, `workspace_bytes` what is allocated beside inputs and results.
`sdpa-dense` is the rival that matters: plain attention to the whole memory, which finds no neighbours but needs none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from common import DEVICE, TOY, Case, Ring, case, full_ring, gpu_milliseconds, measure, peak_bytes
from hard_rings import KINDS, hard_problem
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention
from trained_keys import SOURCES, STEPS, split_trained, trained, trained_problem

from memtrans_kernels import backends_info, knn_search

DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32
GPU_CASES = (
    "d64-8k", "d64-64k", "d64-262k", "d128-8k", "d128-64k", "paper-64k", "decode-d64-64k", "decode-paper-64k",
    "b1-d64-64k",
)  # fmt: skip
TRAINED_CASES = tuple(f"{source}-{steps}-d64-64k" for source in SOURCES for steps in STEPS)
HARD_SHAPES = ("d64-8k", "d64-64k", "d128-64k", "paper-64k", "decode-d64-64k")
HARD_CASES = (
    *(f"hard-{kind}-{shape}" for kind in KINDS for shape in HARD_SHAPES),
    *(f"hard-mixed-{percent}-d64-64k" for percent in (1, 50)),
)
CASES = GPU_CASES if DEVICE == "cuda" else ("cpu-d64-64k",)
FAISS_BYTES = 2**29  # that csrc/faiss/knn_search.cpp has Faiss allocate for itself, past PyTorch
MOST_SCORE_BYTES = 2**31  # of one row in float16: beyond it a matrix of all scores is no rival


def ours(sizes: Case, ring: Ring, query: Tensor) -> Callable[[], Any]:
    arguments = (query, ring.keys, ring.rows, ring.start, ring.cursor, sizes.capacity, sizes.neighbours)
    return lambda: knn_search(*arguments)


def ours_in_triton(sizes: Case, ring: Ring, query: Tensor) -> Callable[[], Any]:
    """What every GPU but a Hopper runs, and a Hopper without the compiled module."""
    arguments = (query, ring.keys, ring.rows, ring.start, ring.cursor, sizes.capacity, sizes.neighbours)
    return lambda: knn_search(*arguments, backend="triton")


def faiss_bridge(sizes: Case, ring: Ring, query: Tensor) -> Callable[[], Any]:
    """In bfloat16: of the three dtypes that it takes, the one it is fastest in."""
    keys = ring.keys.bfloat16()
    arguments = (query.bfloat16(), keys, ring.rows, ring.start, ring.cursor, sizes.capacity, sizes.neighbours)
    return lambda: knn_search(*arguments, backend="faiss")


def flashlib(sizes: Case, ring: Ring, query: Tensor) -> Callable[[], Any]:
    flash_knn = pytest.importorskip("flashlib").flash_knn
    queries, keys = (tensor.bfloat16().contiguous() for tensor in by_row(sizes, ring, query))
    return lambda: flash_knn(queries, keys, sizes.neighbours)


def product_and_topk(sizes: Case, ring: Ring, query: Tensor) -> Callable[[], Any]:
    queries, keys = by_row(sizes, ring, query)
    return lambda: [(q @ k.T).topk(sizes.neighbours) for q, k in zip(queries, keys, strict=True)]


def dense_attention(sizes: Case, ring: Ring, query: Tensor) -> Callable[[], Any]:
    queries, keys = (tensor[:, None] for tensor in by_row(sizes, ring, query))
    return lambda: scaled_dot_product_attention(queries, keys, keys)


def faiss_on_the_cpu(sizes: Case, ring: Ring, query: Tensor) -> Callable[[], Any]:
    """`IndexFlatIP`, a row at a time; the indices are filled beforehand, which is in its favour."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    queries, keys = by_row(sizes, ring, query)
    indices = []
    for row in keys:
        indices.append(faiss.IndexFlatIP(sizes.width))
        indices[-1].add(row.numpy())
    return lambda: [i.search(q.numpy(), sizes.neighbours) for i, q in zip(indices, queries, strict=True)]


def split_hard(name: str) -> tuple[str, str]:
    """The kind and the shape of `hard-<kind>-<shape>`.

    >>> split_hard("hard-mixed-50-decode-d64-64k")
    ('mixed-50', 'decode-d64-64k')
    """
    words = name.removeprefix("hard-").split("-")
    kind_words = 2 if words[0] == "mixed" else 1
    return "-".join(words[:kind_words]), "-".join(words[kind_words:])


def problem(name: str) -> tuple[Case, Ring, Tensor]:
    """Sizes, a full ring, and queries of unit length (B, H, N, D)."""
    if of_model := split_trained(name):
        source, steps, shape = of_model
        return case(shape), *trained_problem(source, steps, case(shape), DTYPE)
    if name.startswith("hard-"):
        kind, shape = split_hard(name)
        return case(shape), *hard_problem(kind, case(shape), DTYPE)
    sizes = case(name)
    query = torch.randn(sizes.batch, sizes.heads, sizes.length, sizes.width, device=DEVICE)
    return sizes, full_ring(sizes, DTYPE, DEVICE), normalize(query, dim=-1).to(DTYPE)


def by_row(sizes: Case, ring: Ring, query: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (R, H/G · N, D) and as many keys (R, M, D) as are visible."""
    return query.reshape(sizes.rows, -1, sizes.width), ring.keys[:, : sizes.capacity]


RIVALS = {
    "memtrans": ours,
    "memtrans-triton": ours_in_triton,
    "faiss-gpu": faiss_bridge,
    "faiss-cpu": faiss_on_the_cpu,
    "flashlib": flashlib,
    "torch": product_and_topk,
    "sdpa-dense": dense_attention,
}


def runs_here(impl: str, sizes: Case) -> bool:
    """Whether an implementation belongs to this machine and this case."""
    if impl == "faiss-gpu":
        return any(line.live for line in backends_info() if (line.backend, line.device) == ("faiss", "cuda"))
    if impl in ("memtrans-triton", "flashlib", "faiss-cpu"):
        return (impl != "faiss-cpu") == (DEVICE == "cuda")
    score_bytes = sizes.capacity * sizes.length * sizes.heads // sizes.groups * 2
    return impl != "torch" or score_bytes <= MOST_SCORE_BYTES


@functools.cache
def ceiling_run(ceiling: str) -> tuple[Callable[[], Any], dict[str, float]]:
    """What the machine does at best, and its FLOP or bytes: square matrices multiplied, or copied."""
    size = 64 if TOY else 8192 if DEVICE == "cuda" else 1024
    left, right = torch.randn(2, size, size, device=DEVICE).to(DTYPE)
    source = torch.randn(4 * size * size, device=DEVICE).to(DTYPE)
    target = torch.empty_like(source)
    if ceiling == "matrix-product":
        return lambda: left @ right, {"flop": 2 * size**3}
    return lambda: target.copy_(source), {"bytes": 2 * source.nbytes}


@functools.cache
def ceilings() -> dict[str, float]:
    """The rates that this run is held against, a second; none on a CPU, whose other processes change them."""
    if DEVICE == "cpu":
        return {}
    found = {}
    for ceiling in ("matrix-product", "copy"):
        run, amounts = ceiling_run(ceiling)
        milliseconds = gpu_milliseconds(run)[0]
        found |= {f"ceiling_{name}_per_second": amount / milliseconds * 1e3 for name, amount in amounts.items()}
    return found


def measure_search(benchmark: Any, name: str, impl: str, sizes: Case, ring: Ring, query: Tensor, **extra: Any) -> None:
    """Times one implementation and writes its entry down."""
    run, of_bridge = RIVALS[impl](sizes, ring, query), impl == "faiss-gpu"
    results = 8 * query[..., 0].numel() * sizes.neighbours
    extra["workspace_bytes"] = max(0, peak_bytes(run, 0) - results) + of_bridge * FAISS_BYTES
    measure(
        benchmark,
        run,
        op="knn_search",
        impl=impl,
        case=name,
        dtype=ring.keys.dtype,
        capturable=not of_bridge and not TOY,
        flop=2 * query.numel() * sizes.capacity,
        bytes=sizes.rows * sizes.capacity * sizes.width * ring.keys.element_size(),
        **ceilings(),
        **extra,
    )


@pytest.mark.parametrize(
    ("name", "impl"), [(name, impl) for name in CASES for impl in RIVALS if runs_here(impl, case(name))]
)
def test_knn_search(benchmark: Any, name: str, impl: str) -> None:
    measure_search(benchmark, name, impl, *problem(name))


@pytest.mark.parametrize(
    ("name", "impl"),  # by name: a model is trained once
    [
        (name, impl)
        for name in (TRAINED_CASES if DEVICE == "cuda" or TOY else ())
        for impl in ("memtrans", "memtrans-triton", "faiss-gpu", "sdpa-dense")
        if runs_here(impl, case(name.split("-", 2)[2]))
    ],
)
def test_keys_of_a_model(benchmark: Any, name: str, impl: str) -> None:
    sizes, ring, query = problem(name)
    source, steps, _ = split_trained(name) or ("", 0, "")
    measure_search(benchmark, name, impl, sizes, ring, query, data_sha256=trained(source, steps).data_sha256)


@pytest.mark.rival
@pytest.mark.skipif(DEVICE == "cpu", reason="on a CPU every case is in float32")
def test_knn_search_of_float32_keys(benchmark: Any) -> None:
    sizes, ring, query = problem("d64-64k")
    wide = replace(ring, keys=ring.keys.float())
    measure_search(benchmark, "d64-64k", "memtrans-triton", sizes, wide, query)


@pytest.mark.parametrize("name", HARD_CASES if DEVICE == "cuda" or TOY else ())
@pytest.mark.parametrize("impl", [impl for impl in ("memtrans", "memtrans-triton") if runs_here(impl, case("d64-64k"))])
def test_hard_keys(benchmark: Any, impl: str, name: str) -> None:
    """Beside the entries of dense attention, whose time does not depend on the keys."""
    measure_search(benchmark, name, impl, *problem(name))


@pytest.mark.parametrize("ceiling", ["matrix-product", "copy"])
def test_ceilings(benchmark: Any, ceiling: str) -> None:
    """Matrices of 8192 rows on a GPU, of 1024 on a CPU."""
    run, rate = ceiling_run(ceiling)
    measure(benchmark, run, op="ceilings", impl="torch", case=ceiling, dtype=DTYPE, **rate)
