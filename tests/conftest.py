"""Tests make their tensors on one device, so that the same specification holds on the CPU and on a GPU."""

from __future__ import annotations

import pytest
import torch
from helpers.devices import DEVICE

torch.set_default_device(DEVICE)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out, on a GPU, what is promised of CPU tensors alone: values are looked at there, where that is free."""
    if DEVICE != "cpu":
        out = [item for item in items if item.get_closest_marker("cpu")]
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]
