"""What an eager training step costs the host of a GPU, measured without a GPU: `python benchmarks/host_time.py`.

The step of bench_train's `enwik8-64k`, at toy size, on CPU tensors in bfloat16. Triton's kernels are compiled for an
H100 and handed to a driver that launches nothing, the search gives whatever is in memory, and what loops over tensors
on a CPU but is one launch on a GPU does nothing. So the numbers are rubbish; process time and counts are printed.
The driver's part of a launch and the allocator of a GPU, some microseconds each, are not in it: hence the counts.

`python benchmarks/host_time.py 20` times 20 steps instead of 100. Another tree, as `against.py` builds it:

    PYTHONPATH=../before MEMTRANS_BENCH_TREE=../before python benchmarks/host_time.py
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import os
import pkgutil
import sys
import time
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

TOY: dict[str, Any] = {
    "batch": 2, "segment": 8, "width": 32, "heads": 2, "head_width": 16, "memory": 64, "xl": 8, "dtype": "bfloat16",
}  # fmt: skip
ONE_LAUNCH = ("_foreach_copy_", "_foreach_add_", "_foreach_mul_", "_fused_adamw_")
WITHOUT_KERNEL = {  # operators that make views or room, or only call others
    "view", "transpose", "permute", "unbind", "slice", "select", "expand", "unsqueeze", "squeeze", "t", "reshape",
    "as_strided", "detach", "alias", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "flatten",
    "new_empty_strided", "to", "result_type", "narrow", "split", "split_with_sizes", "contiguous", "expand_as",
    "resolve_conj", "resolve_neg", "item", "_local_scalar_dense", "is_nonzero", "unflatten", "view_as", "chunk",
    "squeeze_", "set_", "lift_fresh", "detach_", "numpy_T",
}  # fmt: skip


class NoDriver:
    """Stands for a GPU's driver, and notes what would be launched."""

    handles = itertools.count(1)  # of compiled kernels

    def __init__(self) -> None:
        self.utils = self
        self.launches: list[tuple[Any, ...]] = []

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        from triton.runtime.driver import driver

        return lambda *given: driver.active.launches.append(given)  # Triton keeps this longer than one driver

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        handle = next(self.handles)
        return handle, handle, 32, 0, 1024

    def unload_module(self, *_: Any) -> None: ...

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def get_current_device(self) -> int:
        return 1000  # Triton keeps kernels by device: none of these is for a GPU that is here

    def get_current_stream(self, _: int) -> int:
        return 7

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def found_nothing(
    query: Tensor, keys: Tensor, rows: Tensor, start: Tensor, cursor: Tensor, capacity: int, k: int
) -> tuple[Tensor, Tensor]:
    """As the search in CUDA is called: the query is cast, and two tensors are made."""
    shape = (*query.to(keys.dtype).contiguous().shape[:3], k)
    return query.new_empty(shape, dtype=torch.float32), query.new_empty(shape, dtype=torch.int32)


def pretend() -> NoDriver:
    """Has this process train as if CPU tensors were a GPU's."""
    from triton.runtime.driver import driver

    stand_in = NoDriver()
    driver.set_active(stand_in)
    os.environ["MEMTRANS_BACKEND"] = "triton"
    for package in ("memtrans", "memtrans_kernels"):
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            if not any(part in module.name for part in ("__main__", "faiss", "_native", ".hf")):
                importlib.import_module(module.name)
    os.environ["TRITON_INTERPRET"] = "1"  # lets Triton run on CPU tensors; kernels that are imported do not see it
    backends = importlib.import_module("memtrans_kernels.backends")
    kind = type(backends.IMPLEMENTATIONS["knn_search"][0])
    search = type("Search", (kind,), {"load": lambda self: found_nothing})
    backends.IMPLEMENTATIONS["knn_search"] = (search("triton", "cpu", "", ""),)
    for module in [module for name, module in sys.modules.items() if name.startswith("memtrans")]:
        if hasattr(module, "may_look"):  # nobody looks into a GPU's tensors
            module.may_look = lambda *_: False  # type: ignore[attr-defined]
    for name in ONE_LAUNCH:
        setattr(torch, name, lambda *_, **__: None)
    one = torch.ones(())
    torch._foreach_norm = lambda tensors, *_: [one] * len(tensors)
    torch._C._set_mkldnn_enabled(False)  # its products of a few numbers take longer than ours
    return stand_in


def kernels(step: Any) -> int:
    """How many operators of PyTorch work on numbers, and do not call another that does."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()

    def works(event: Any) -> bool:
        return event.name.startswith("aten::") and event.name[6:] not in WITHOUT_KERNEL

    return sum(works(event) and not any(works(child) for child in event.cpu_children) for event in seen.events())


def main(steps: int) -> None:
    torch.set_num_threads(1)
    bench = importlib.import_module("bench_train")  # first, as it may say which tree is measured
    driver = pretend()
    settings = dataclasses.replace(bench.settings_of("enwik8-64k", compiled=False), **TOY)
    trainer = bench.Trainer(settings, bench.text(settings.batch), torch.device("cpu"), bench.ALONE)
    for _ in range(3):
        trainer.advance()
    times = []
    for _ in range(steps):
        begin = time.process_time()
        trainer.advance()
        times.append((time.process_time() - begin) / settings.accumulate)
    driver.launches.clear()
    worked = kernels(trainer.advance) / settings.accumulate
    launched = len(driver.launches) / settings.accumulate
    best, quarter = sorted(times)[0], sorted(times)[steps // 4]
    print(
        f"a segment: {best * 1e3:.2f} ms of the host at best, {quarter * 1e3:.2f} in the first quarter; "
        f"{worked:.0f} kernels of PyTorch and {launched:.0f} of Triton"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
