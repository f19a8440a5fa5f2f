"""`MEMTRANS_BENCH_OURS=1` leaves rivals and ceilings out: what a comparison of two commits (`against.py`) measures."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("MEMTRANS_BENCH_OURS") != "1":
        return
    rivals = [item for item in items if not _is_ours(item)]
    config.hook.pytest_deselected(items=rivals)
    items[:] = [item for item in items if item not in rivals]


def _is_ours(item: pytest.Item) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return item.get_closest_marker("rival") is None and parameters.get("impl", "memtrans").startswith("memtrans")
