"""What a GPU is to a configuration: vendor, capability, shared memory; never its name."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Target(NamedTuple):
    """A kind of GPU. `architecture` is the compute capability, 90 for 9.0, or AMD's number, 942 of gfx942.

    On ROCm PyTorch reports an MI300 as capability 9.4, so the vendor comes first.
    """

    vendor: str  # "nvidia", "amd", or "interpreter"
    architecture: int
    shared_memory: int  # bytes that one program may have
    multiprocessors: int = 1


INTERPRETER = Target("interpreter", 0, 1 << 30)


def target_of(device: torch.device) -> Target:
    """The target of a tensor's device; INTERPRETER for the CPU."""
    if device.type != "cuda":
        return INTERPRETER
    return _target(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _target(index: int) -> Target:
    return from_properties(torch.cuda.get_device_properties(index), amd=torch.version.hip is not None)


def from_properties(properties, amd: bool) -> Target:
    """From what `torch.cuda.get_device_properties` says."""
    if amd:
        name = properties.gcnArchName.partition(":")[0].removeprefix("gfx")
        architecture = int(name, 16) if name[-1:].isalpha() else int(name)
        shared_memory = properties.shared_memory_per_block
        return Target("amd", architecture, shared_memory, properties.multi_processor_count)
    architecture = 10 * properties.major + properties.minor
    shared_memory = properties.shared_memory_per_block_optin
    return Target("nvidia", architecture, shared_memory, properties.multi_processor_count)
