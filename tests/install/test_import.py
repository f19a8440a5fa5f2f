"""`import memtrans` takes little longer than `import torch`, and so does a command that compiles nothing.

What only some runs need is imported when they need it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny_runs import train, written_text

import memtrans

REPOSITORY = Path(__file__).resolve().parents[2]
# Each takes from 0.2 to over a second.
COMPILERS = ("torch._dynamo", "torch._inductor", "triton")
HEAVY = ("matplotlib", "sympy", "torch.distributed.fsdp", "tqdm", "transformers", *COMPILERS)


@pytest.mark.parametrize("module", ["memtrans", "memtrans_kernels", "memtrans.presets"])
def test_importing_brings_no_compiler_and_no_plotting(module: str) -> None:
    new = "json.dumps([*{*sys.modules} - before])"
    script = f"import json, sys, torch; before = {{*sys.modules}}; import {module}; print({new})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not set(HEAVY) & set(json.loads(done.stdout))


def test_commands_that_compile_nothing_bring_none_of_it_either(tmp_path: Path) -> None:
    data, run = written_text(tmp_path), tmp_path / "run"
    assert train(run, "--data", data, "--steps", "1") == 0
    commands = (["presets"], ["eval", "--out", str(run)], ["generate", "--checkpoint", str(run), "--tokens", "2"])
    script = f"import json, sys; from memtrans.cli.main import main; done = [main(c) for c in {commands!r}]; "
    script += "print(json.dumps([done, *sys.modules]))"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    done, *modules = json.loads(ended.stdout.splitlines()[-1])
    assert done == [0, 0, 0]
    assert not (set(HEAVY) - {"tqdm"}) & set(modules)  # but for the bar of eval


@pytest.mark.parametrize(
    ("file", "line"),
    [("pyproject.toml", 'version = "{}"'), ("CITATION.cff", "version: {}"), ("CHANGELOG.md", "## [{}]")],
)
def test_every_file_says_the_same_version(file: str, line: str) -> None:
    lines = (REPOSITORY / file).read_text(encoding="utf-8").splitlines()
    assert any(found.startswith(line.format(memtrans.__version__)) for found in lines)
