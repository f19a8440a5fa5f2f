"""Number 1 of the clients' list: what a search of a memory holds at most, besides what it returns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from memtrans_kernels import native

pytestmark = pytest.mark.cpu

MOST = 1.2  # times the result

# In a process of its own: the kernel's mark of the highest water is never lowered.
SCRIPT = """
import resource, sys, torch
from memtrans import KNNMemory

torch.set_num_threads(1)
width, batch, length, copies = map(int, sys.argv[1:])
memory = KNNMemory(width, 256, batch)
memory.add(torch.randn(batch, 300, 2, width))
queries = torch.randn(batch, length, width)
memory.search(queries[:, :1], 32)  # loads what there is to load


def peak():
    with open("/proc/self/status") as file:  # what getrusage says begins with the peak of who started the process
        return 1024 * int(next(line for line in file if line.startswith("VmHWM")).split()[1])


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


now = resident()
result, mask = memory.search(queries, 32)
for _ in range(copies):
    result.clone()
print((peak() - now) / result.nbytes)
"""


def peak_of(width: int, batch: int, length: int, copies: int = 0) -> float:
    """Bytes that a search adds to the process at most, as a share of its result's."""
    arguments = [str(number) for number in (width, batch, length, copies)]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True)
    return float(done.stdout)


linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks the kernel of Linux")


@linux
@pytest.mark.parametrize(("width", "batch", "length"), [(768, 2, 256), (32, 16, 512)])
def test_22_1_a_search_holds_little_more_than_its_result(width: int, batch: int, length: int) -> None:
    assert native.load(), "without the extension the reference holds a block of 16 MiB more"
    assert 0.99 < peak_of(width, batch, length) < MOST


@linux
def test_22_1_one_copy_more_would_be_seen() -> None:
    assert peak_of(768, 2, 256, copies=1) > 1.9
