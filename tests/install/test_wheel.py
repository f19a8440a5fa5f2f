"""One wheel serves every PyTorch and every Python: what `make wheel` left in dist/, in fresh environments."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

OTHER_PYTHON = os.environ.get("MEMTRANS_OTHER_PYTHON", "python3.12")
DIST = Path(__file__).resolve().parents[2] / "dist"
# One entry in, one search: the answer is the entry. The CUDA module loads where there is no GPU, too.
SCRIPT = """
import json, torch
from memtrans_kernels import knn_add_, knn_search, native
keys, values, cursor = torch.zeros(1, 4, 8), torch.zeros(1, 4, 8), torch.zeros(1, dtype=torch.int64)
rows, start = torch.tensor([0]), torch.tensor([0])
knn_add_(keys, values, cursor, rows, torch.ones(1, 1, 1, 8), torch.ones(1, 1, 1, 8))
scores, slots = knn_search(torch.ones(1, 1, 1, 8), keys, rows, start, cursor, capacity=4, k=1, backend="native")
modules = ("cpu", "cuda") if torch.version.cuda else ("cpu",)
print(json.dumps({"live": [native.load(module) for module in modules], "slot": slots.item()}))
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("python", "torch"), [(OTHER_PYTHON, "2.10.0"), (sys.executable, "2.14.1")])
def test_the_wheel_works_with(python: str, torch: str, tmp_path: Path) -> None:
    (wheel,) = DIST.glob("*-abi3-manylinux*.whl")
    assert shutil.which(python), f"this test needs {python}"
    subprocess.run([python, "-m", "venv", tmp_path / "environment"], check=True)
    here = tmp_path / "environment" / "bin" / "python"
    subprocess.run([here, "-m", "pip", "install", "--quiet", f"torch=={torch}", "numpy", wheel], check=True)
    done = subprocess.run([here, "-c", SCRIPT], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["slot"] == 0
    assert all(found["live"])
