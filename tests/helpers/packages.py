"""Packages that only slow tests need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest


def package(name: str) -> Any:
    """Imports it; fails the test where it is missing."""
    try:
        return import_module(name)
    except ImportError as error:
        pytest.fail(f"{name} is missing, which `make test-slow` installs: {error}")
