"""`import memtrans` takes little longer than `import torch`: what only some runs need is imported when they need it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import memtrans

REPOSITORY = Path(__file__).resolve().parents[2]
# Each takes from 0.2 to over a second.
HEAVY = ("matplotlib", "sympy", "torch._dynamo", "torch._inductor", "tqdm", "transformers", "triton")


@pytest.mark.parametrize("module", ["memtrans", "memtrans_kernels", "memtrans.presets"])
def test_importing_brings_no_compiler_and_no_plotting(module: str) -> None:
    new = "json.dumps([*{*sys.modules} - before])"
    script = f"import json, sys, torch; before = {{*sys.modules}}; import {module}; print({new})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not set(HEAVY) & set(json.loads(done.stdout))


@pytest.mark.parametrize(
    ("file", "line"),
    [("pyproject.toml", 'version = "{}"'), ("CITATION.cff", "version: {}"), ("CHANGELOG.md", "## [{}]")],
)
def test_every_file_says_the_same_version(file: str, line: str) -> None:
    lines = (REPOSITORY / file).read_text(encoding="utf-8").splitlines()
    assert any(found.startswith(line.format(memtrans.__version__)) for found in lines)
