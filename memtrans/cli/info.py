"""`python -m memtrans info`: whether the extension is live, versions, devices, and the backends of each operator."""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from memtrans.cli.ending import show
from memtrans.distributed.ranks import Ranks
from memtrans_kernels import backends_info, native
from memtrans_kernels.mending import mending_command

SHARED = False


def run(options: argparse.Namespace, ranks: Ranks) -> None:
    """Prints the verdicts first: a line for each fact, or one JSON object."""
    del ranks
    found = facts()
    if options.json:
        show(json.dumps(found))
        return
    for module, verdict in found["extension"].items():
        show(f"{module:12} {verdict}")
    if not native.load("cpu") or (torch.cuda.is_available() and not native.load("cuda")):
        show(f"{'mend':12} {found['mend']}")
    for name, text in found["versions"].items():
        show(f"{name:12} {text}")
    show(f"{'gpu':12} {found['gpu']}")
    for line in found["backends"]:
        limits = f" ({line['reason']})" if line["reason"] else ""
        state = f"live{limits}" if line["live"] else f"not live: {line['reason']}"
        show(f"{line['operator']:26} {line['backend']:10} {line['device']:5} {state}")


def facts() -> dict[str, Any]:
    """What `info` says, by topic."""
    versions = {name: _version(name) for name in ("memtrans", "torch", "triton", "numpy", "safetensors")}
    return {
        "extension": {module: native.verdict(module) for module in ("cpu", "cuda")},
        "mend": mending_command(),
        "versions": versions | {"python": f"{platform.python_version()} on {platform.platform()}"},
        "gpu": _gpu(),
        "backends": [line._asdict() for line in backends_info()],
    }


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
