"""Tests make their tensors on one device, so that the same specification holds on the CPU and on a GPU."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch
from helpers.devices import DEVICE

# A CPU is the default, and to say so would take each call, and each one that is traced, through a mode.
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)

# The modules of most work, which begin first: one that begins last has one of the processes work alone.
LONGEST = [
    "test_compile.py", "test_benchmarks.py", "test_triton_interpreter.py", "test_cli.py", "test_cli_resume.py",
    "test_instruction_sets.py", "test_examples.py", "test_build.py", "test_targets.py", "test_ranks.py",
    "test_against.py", "test_gradient_sum.py", "test_upstream_readme.py", "test_cleared.py", "test_calibrate.py",
    "test_extras.py", "test_trainers.py", "test_cli_ranks.py", "test_beginnings.py", "test_records.py",
    "test_widths_of_layers.py",
]  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the longest modules first; leaves out, on a GPU, what is promised of CPU tensors alone.

    Values are looked at on the CPU, where that is free.
    """
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    if DEVICE != "cpu":
        _leave_out([item for item in items if item.get_closest_marker("cpu")], config, items)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """On the CPU a GPU's tests would pass without having seen one, or fail by what they make there."""
    if item.get_closest_marker("gpu") and DEVICE == "cpu":
        pytest.fail("a test of a GPU needs MEMTRANS_TEST_DEVICE=cuda, which `make test-gpu` sets", pytrace=False)


class OneOfSeveral:
    """Of the cases of each test that is left the first of every so many: interpreted kernels take their time."""

    def __init__(self, every: int) -> None:
        self.every = every

    @pytest.hookimpl(trylast=True)  # after -k and -m
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        seen = Counter[str]()
        out = []
        for item in items:
            test = item.nodeid.partition("[")[0]
            if seen[test] % self.every:
                out.append(item)
            seen[test] += 1
        _leave_out(out, config, items)


def pytest_configure(config: pytest.Config) -> None:
    if every := os.environ.get("MEMTRANS_TEST_ONE_OF"):
        config.pluginmanager.register(OneOfSeveral(int(every)))


def _leave_out(out: list[pytest.Item], config: pytest.Config, items: list[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]
