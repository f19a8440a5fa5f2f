"""The compiled search and attention on the CPU pass their tests with every instruction set.

Everyone's run has one of six cases of each test with the older set that most processors have, `make test-slow` all.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers.separate import ROOT

HERE = Path(__file__).parent
LEAST = {"test_native_search.py": 90, "test_native_attention.py": 55}  # of all cases


@pytest.mark.parametrize(
    ("instructions", "one_of"),
    [("avx2", 6), *(pytest.param(name, 1, marks=pytest.mark.slow) for name in ("avx2", "default"))],
)
def test_other_instruction_sets_pass_the_same_tests(instructions: str, one_of: int) -> None:
    """PyTorch's own variable limits both; a process of its own, because PyTorch reads it once."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rp", *(HERE / name for name in LEAST)]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": instructions, "MEMTRANS_TEST_ONE_OF": str(one_of)}
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    passed = Counter(re.findall(r"^PASSED \S*?(\w+\.py)::", result.stdout, re.MULTILINE))
    assert all(passed[name] >= count // one_of for name, count in LEAST.items()), passed
