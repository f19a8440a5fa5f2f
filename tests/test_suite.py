"""What the test suite holds itself to."""

from __future__ import annotations

import os
import subprocess
import sys

from helpers.separate import ROOT


def test_a_test_of_a_gpu_fails_by_name_where_the_device_is_the_cpu() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-k", "need_no_alignment"]
    environment = {name: value for name, value in os.environ.items() if name != "MEMTRANS_TEST_DEVICE"}
    result = subprocess.run(
        [*command, "tests/gpu/test_gpu_search.py"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert "MEMTRANS_TEST_DEVICE=cuda, which `make test-gpu` sets" in result.stdout and " passed" not in result.stdout
