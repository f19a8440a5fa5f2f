"""The Triton kernels pass their operators' tests in Triton's interpreter, where there is no GPU.

A process of their own: Triton decides at import whether it interprets.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
MODULES = [
    "test_knn_add.py",
    "test_knn_merge.py",
    "test_cosine.py",
    "test_memory_attention.py",
    "test_memory_attention_backward.py",
    "test_memory_attention_drawn.py",
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("module", MODULES)
def test_interpreted(module: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", str(TESTS / module)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) >= 3, "the triton backend was not live"
