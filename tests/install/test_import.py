"""`import memtrans` takes little longer than `import torch`: what only some runs need is imported when they need it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

import memtrans

# Each takes from 0.2 to over a second.
HEAVY = ("matplotlib", "sympy", "torch._dynamo", "torch._inductor", "tqdm", "transformers", "triton")


@pytest.mark.parametrize("module", ["memtrans", "memtrans_kernels", "memtrans.presets"])
def test_importing_brings_no_compiler_and_no_plotting(module: str) -> None:
    new = "json.dumps([*{*sys.modules} - before])"
    script = f"import json, sys, torch; before = {{*sys.modules}}; import {module}; print({new})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not set(HEAVY) & set(json.loads(done.stdout))


def test_the_version_is_that_of_the_installed_package() -> None:
    assert memtrans.__version__ == version("memtrans")
