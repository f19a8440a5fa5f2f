"""`python -m memtrans info`: versions, devices, and which backend of each operator is live."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from memtrans.cli.ending import show
from memtrans.distributed.ranks import Ranks
from memtrans_kernels import backends_info

SHARED = False


def run(options: argparse.Namespace, ranks: Ranks) -> None:
    """Prints a line for each fact."""
    del options, ranks
    for name in ("memtrans", "torch", "triton", "numpy", "safetensors"):
        show(f"{name:12} {_version(name)}")
    show(f"{'python':12} {platform.python_version()} on {platform.platform()}")
    show(f"{'gpu':12} {_gpu()}")
    for line in backends_info():
        state = f"live{f' ({line.reason})' if line.reason else ''}" if line.live else f"not live: {line.reason}"
        show(f"{line.operator:26} {line.backend:10} {line.device:5} {state}")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return "none" if built else "none; this torch is built without CUDA"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{', '.join(names)}; CUDA {torch.version.cuda}"
