"""Compiles the kernels for GPUs that are not here; `python benchmarks/portability.py` writes results/targets/*.json.

A launcher runs with CPU tensors, and each launch that it makes is compiled for a target instead of started: Triton
needs no GPU for that. What the compiler says of a kernel is written down: shared memory, registers, bytes of stack a
thread, and the instructions of matrix units. The roofline is calculated from data sheets, not measured.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

RESULTS = Path(__file__).resolve().parent / "results" / "targets" / "kernels.json"
KILOBYTE = 1024


class Gpu(NamedTuple):
    """A target, a GPU of this kind, and what its data sheet says: float16 products with float32 sums, dense, no
    sparsity, in TFLOP/s, and memory in TB/s."""

    vendor: str
    architecture: int
    shared_kilobytes: int  # that one program may have
    lanes: int
    name: str
    teraflops: float
    terabytes: float


TARGETS = {
    "sm_80": Gpu("nvidia", 80, 163, 32, "A100 80 GB SXM", 312, 2.04),
    "sm_86": Gpu("nvidia", 86, 99, 32, "A10", 125, 0.6),
    "sm_89": Gpu("nvidia", 89, 99, 32, "RTX 4090", 165, 1.01),
    "sm_90": Gpu("nvidia", 90, 227, 32, "H100 SXM", 989, 3.35),
    "sm_100": Gpu("nvidia", 100, 227, 32, "B200", 2250, 8.0),
    "sm_103": Gpu("nvidia", 103, 227, 32, "B300", 2250, 8.0),
    "sm_120": Gpu("nvidia", 120, 99, 32, "RTX 5090", 210, 1.79),
    "gfx90a": Gpu("amd", 0x90A, 64, 64, "MI250X, one of its two dies", 192, 1.64),
    "gfx942": Gpu("amd", 942, 64, 64, "MI300X", 1307, 5.3),
    "gfx950": Gpu("amd", 950, 160, 64, "MI355X", 2516, 8.0),
    "gfx1100": Gpu("amd", 1100, 64, 32, "RX 7900 XTX", 123, 0.96),
}


class Search(NamedTuple):
    """A case of the search: dtype, D, K, queries of a head, slots."""

    dtype: torch.dtype
    width: int
    neighbours: int = 32
    length: int = 512
    capacity: int = 65536

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"search {dtype} D {self.width} K {self.neighbours} N {self.length} M {self.capacity}"


MAIN_SEARCHES = (
    Search(torch.float16, 64),
    Search(torch.bfloat16, 128),
    Search(torch.float32, 64),
    Search(torch.float16, 64, length=1),
)
SEARCHES = (
    *MAIN_SEARCHES,
    Search(torch.float16, 256, 64, capacity=8192),
    Search(torch.float16, 768, capacity=8192),
    Search(torch.float32, 256, capacity=8192),
    Search(torch.float32, 8, capacity=8192),
    Search(torch.bfloat16, 24, 256, 1, 600000),
)


OTHERS = "the other kernels, bfloat16, D 64 and 128"


class Kernel(NamedTuple):
    """What the compiler made of one launch."""

    name: str
    shared: int
    warps: int
    registers: int
    stack: int  # bytes a thread: what did not fit into registers
    products: tuple[str, ...]  # instructions of matrix units

    @property
    def family(self) -> tuple[str, ...]:
        """The instructions without what says only how many columns they take: `m64n8k16` and `m64n128k16` are one."""
        return tuple(sorted({re.sub(r"m\d+n\d+", "", name) for name in self.products}))


@contextmanager
def compiled_instead(gpu: Gpu, target: str) -> Iterator[list[Kernel]]:
    """Every launch of a Triton kernel is compiled for `target`, and added to the list."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ASTSource, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    nvidia = gpu.vendor == "nvidia"
    goal = GPUTarget("cuda", gpu.architecture, 32) if nvidia else GPUTarget("hip", target, gpu.lanes)
    kernels: list[Kernel] = []
    launch = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        options |= {"debug": False, "instrumentation_mode": ""}
        backend = make_backend(goal)
        bound, special, rest = create_function_from_signature(self.signature, self.params, backend)(
            *arguments, **options
        )
        chosen, signature, constants, attributes = self._pack_args(backend, dict(options), bound, special, rest)
        source = ASTSource(self, signature, constants, attributes)
        compiled = compile_kernel(source, target=goal, options=chosen.__dict__)
        kernels.append(_kernel(self.__name__, compiled, nvidia))

    JITFunction.run = compile_only
    try:
        yield kernels
    finally:
        JITFunction.run = launch


def _kernel(name: str, compiled: Any, nvidia: bool) -> Kernel:
    metadata = compiled.metadata
    if nvidia:
        registers, stack = _usage(compiled.asm["cubin"])
        text, products = compiled.asm["ptx"], r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\S*"
    else:
        text, products = compiled.asm["amdgcn"], r"v_(?:mfma|wmma)\S*"
        registers, stack = (
            int(re.search(rf"\.{field}:\s*(\d+)", text)[1]) for field in ("vgpr_count", "private_segment_fixed_size")
        )
    found = tuple(sorted(set(re.findall(products, text))))
    return Kernel(name, metadata.shared, metadata.num_warps, registers, stack, found)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack a thread, from the tool that Triton brings."""
    import triton.backends.nvidia as backend

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(backend.__file__).parent / "bin" / "cuobjdump"
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    return int(found[1]), int(found[2])


def search_kernels(target: str, case: Search) -> list[Kernel]:
    """Those of one search, for one target."""
    from memtrans_kernels.impl.triton import knn_search

    with said_to_be(target, "knn_search"), compiled_instead(TARGETS[target], target) as kernels:
        knn_search.knn_search(*_search_arguments(case), case.capacity, case.neighbours)
    return kernels


def _search_arguments(case: Search) -> tuple[Tensor, ...]:
    number = torch.zeros(2, dtype=torch.int64)
    keys = torch.empty(2, case.capacity + 512, case.width, dtype=case.dtype)
    query = torch.empty(2, 8, case.length, case.width, dtype=case.dtype)
    return query, keys, torch.arange(2), number, number


def other_kernels(target: str) -> list[Kernel]:
    """Cosine, ring write, merge, attention and its gradients, in bfloat16, D 64 and 128, K 32."""
    kernels = []
    for width in (64, 128):
        with said_to_be(target, "attention_tiles"), compiled_instead(TARGETS[target], target) as made:
            for job in _other_jobs(width):
                job()
        kernels += made
    return kernels


@contextmanager
def said_to_be(target: str, module: str) -> Iterator[None]:
    """Has a module of kernels take every device for that target."""
    from memtrans_kernels.impl.triton.targets import Target

    gpu, asking = TARGETS[target], importlib.import_module(f"memtrans_kernels.impl.triton.{module}")
    place = Target(gpu.vendor, gpu.architecture, gpu.shared_kilobytes * KILOBYTE, 100)
    before, asking.target_of = asking.target_of, lambda device: place
    try:
        yield
    finally:
        asking.target_of = before


def _other_jobs(width: int) -> list[Callable[[], Any]]:
    from memtrans_kernels.attention_inputs import AttentionInputs, WholeInputs
    from memtrans_kernels.impl.triton import (
        cosine,
        knn_add,
        knn_merge,
        memory_attention,
        memory_attention_backward,
        whole_attention,
    )

    half, number = torch.bfloat16, torch.arange(2)
    query, key = torch.empty(2, 8, 512, width, dtype=half), torch.empty(2, 1, 512, width, dtype=half)
    ring = torch.empty(2, 1024, width, dtype=torch.float16)
    scores, slots = torch.empty(2, 8, 512, 32), torch.empty(2, 8, 512, 32, dtype=torch.int32)
    inputs = AttentionInputs(
        query, key, key.clone(), ring, ring.clone(), number, scores, slots, torch.empty(8), torch.empty(8, 512), None,
        torch.empty(8),
    )  # fmt: skip
    plain = inputs._replace(
        scores=scores[..., :0], slots=slots[..., :0], memory_offset=None, bias_table=torch.empty(8, 129)
    )  # fmt: skip
    entries = torch.empty(2, 1, 8704, width, dtype=half)
    uneven = plain._replace(key=entries[:, :, :600], value=entries[:, :, :600])  # tiles do not line up
    whole = plain._replace(
        key=entries, value=entries.clone(), bias_table=None, causal=False,
        key_mask=torch.ones(2, 8704, dtype=torch.bool),
    )  # fmt: skip
    lse = torch.empty(2, 8, 512)
    attentions = [
        job
        for given in (inputs, plain, uneven, whole)
        for job in (
            partial(memory_attention.memory_attention, given),
            partial(memory_attention_backward.memory_attention_backward, given, query, lse, query, lse),
        )
    ]
    return [
        lambda: whole_attention.whole_attention(
            WholeInputs(query, *(entries[:, 0],) * 2, *(number,) * 3, 8192, torch.empty(8), query, lse, torch.empty(8))
        ),
        lambda: cosine.cosine(query, key),
        lambda: cosine.cosine_backward(query, key, query, key),
        lambda: knn_add.knn_add_(ring, ring.clone(), number, number, key, key),
        lambda: knn_merge.knn_merge(
            scores[None].repeat(2, 1, 1, 1, 1), slots[None].repeat(2, 1, 1, 1, 1), number, number, 1024
        ),
        *attentions,
    ]


def roofline(gpu: Gpu, width: int, length: int, capacity: int = 65536, batch: int = 16, heads: int = 8) -> float:
    """Milliseconds that a search takes at least: its products, or its bytes, at the data sheet's rates.

    Keys and queries in float16 are read once; the maxima of runs of 16 are written, those of a tile read.
    """
    queries = batch * heads * length
    products = 2 * queries * capacity * width
    numbers = batch * capacity * width * 2 + queries * width * 2
    maxima = queries * (capacity // 16 + 2 * capacity // 128) * 4
    return max(products / gpu.teraflops, (numbers + maxima) / gpu.terabytes) / 1e9


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def compiled_table(entries: list[dict[str, Any]]) -> str:
    """A row for each target: of each case the most shared memory that a kernel takes, and what spills."""
    cases = list(dict.fromkeys(entry["case"] for entry in entries))
    rows = []
    for target, gpu in TARGETS.items():
        cells = []
        for case in cases:
            found = [e for e in entries if (e["target"], e["case"]) == (target, case)]
            shared, stack = (max((e[field] for e in found), default=0) for field in ("shared", "stack"))
            cells.append(f"{shared / KILOBYTE:.0f} KB, {stack} B" if found else "–")
        rows.append([target, f"{gpu.shared_kilobytes} KB", *cells])
    return _table(["target", "room", *cases], rows)


def roofline_table() -> str:
    """Calculated: the least time that a search takes at the data sheet's rates."""
    shapes = {"d64-8k": (64, 512, 8192), "d64-64k": (64, 512, 65536), "d128-64k": (128, 512, 65536),
              "decode-d64-64k": (64, 1, 65536)}  # fmt: skip
    rows = [
        [
            target,
            gpu.name,
            f"{gpu.teraflops:g}",
            f"{gpu.terabytes:g}",
            *(f"{roofline(gpu, *s):.3f}" for s in shapes.values()),
        ]
        for target, gpu in TARGETS.items()
    ]
    return _table(["target", "GPU", "TFLOP/s", "TB/s", *shapes], rows)


def write_down(wanted: list[str]) -> None:
    """One entry for each target, case and kernel, in place of those of the same target; after each case."""
    entries = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    entries = [entry for entry in entries if entry["target"] not in wanted]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    for case, target in itertools.product([*SEARCHES, None], wanted):
        name = case.name if case else OTHERS
        kernels = dict.fromkeys(search_kernels(target, case) if case else other_kernels(target))  # equal ones once
        entries += [{"target": target, "case": name, **kernel._asdict()} for kernel in kernels]
        RESULTS.write_text(json.dumps(entries, indent=1) + "\n")
        print(target, name, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    write_down(sys.argv[1:] or list(TARGETS))
