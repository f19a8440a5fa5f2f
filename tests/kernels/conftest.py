"""What holds in every test of the operators."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
from helpers.addresses import inside_arguments


@pytest.fixture(autouse=True, scope="session")
def kernels_stay_inside_their_arguments() -> Iterator[None]:
    """Interpreted ones: on a GPU `make test-gpu-sanitizer` looks."""
    with inside_arguments() if os.environ.get("TRITON_INTERPRET") == "1" else nullcontext():
        yield
