"""One commit beside another: today's benchmarks over both trees, in rounds that alternate."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.scripts import BENCHMARKS, benchmark_script

TODAY = BENCHMARKS.parent
PACKAGES = ("memtrans", "memtrans_kernels")


def python(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    # without the variables of a worker, whose benchmarks would measure nothing
    environment = {**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """A tree from before there were rooms."""
    files = {
        "memtrans/__init__.py": "",
        "memtrans/data.py": "class Document: pass",
        "memtrans/train.py": "from memtrans.data import Document\nclass Trainer: documents = Document",
        "memtrans_kernels/__init__.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def imported(statement: str, tree: Path, path: Path) -> subprocess.CompletedProcess[str]:
    """The statement in a process that measures `tree`, its packages found by `path`."""
    prepared = f"import pathlib, other_tree; other_tree.measure_tree(pathlib.Path({str(tree)!r})); "
    return python("-c", prepared + statement, cwd=BENCHMARKS, PYTHONPATH=str(path))


def test_a_module_that_moved_is_found_by_the_names_it_defines(flat: Path) -> None:
    statement = (
        "from memtrans.data.documents import Document; from memtrans.training.trainer import Trainer; "
        "assert Trainer.documents is Document; print(Trainer.__module__)"
    )
    done = imported(statement, flat, flat)
    assert (done.returncode, done.stdout) == (0, "memtrans.train\n"), done.stderr


def test_a_name_that_the_tree_does_not_have_is_an_import_error(flat: Path) -> None:
    done = imported("from memtrans.generation.decoder import Decoder", flat, flat)
    assert "ImportError: cannot import name 'Decoder'" in done.stderr


def test_packages_of_another_tree_than_the_named_one_are_refused(flat: Path) -> None:
    done = imported("", flat, TODAY)
    assert f"MEMTRANS_BENCH_TREE is {flat}, but memtrans is imported from {TODAY / 'memtrans'}" in done.stderr


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Today's packages in a plain folder, without git."""
    folder = tmp_path_factory.mktemp("tree")
    for package in PACKAGES:
        shutil.copytree(TODAY / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def compared(folder: Path, results: Path, expression: str) -> subprocess.CompletedProcess[str]:
    script = [str(BENCHMARKS / "against.py"), "--other", str(folder), "--name", "memtrans@before", "--rounds", "1"]
    toy = {"MEMTRANS_BENCH_TOY": "1", "MEMTRANS_BENCH_RESULTS": str(results)}
    return python(*script, "bench_knn_add.py", "-k", expression, cwd=TODAY, **toy)


@pytest.mark.slow
def test_both_trees_stand_beside_each_other_in_the_result_files(copied: Path, tmp_path: Path) -> None:
    done = compared(copied, tmp_path, "d64")
    assert done.returncode == 0, done.stdout + done.stderr
    entries = json.loads((tmp_path / "cpu" / "knn_add.json").read_text())
    assert [(entry["impl"], len(entry["rounds_ms"])) for entry in entries] == [("memtrans", 1), ("memtrans@before", 1)]
    assert entries[1]["commit"] == "before"
    assert all(entry["ms"] in entry["rounds_ms"] for entry in entries)
    assert "round 1 of 1\nknn_add memtrans d64-8k forward float32: " in done.stdout


@pytest.mark.slow
def test_an_expression_that_selects_nothing_is_an_error(copied: Path, tmp_path: Path) -> None:
    done = compared(copied, tmp_path, "no_such")
    assert done.returncode == 1 and "bench_knn_add.py -k no_such" in done.stderr


def test_a_tree_without_a_library_that_today_has_is_refused(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    against, today = benchmark_script("against"), flat / "today"
    (today / "memtrans_kernels").mkdir(parents=True)
    (today / "memtrans_kernels" / "_native_cpu.abi3.so").touch()
    monkeypatch.setattr(against, "TODAY", today)
    monkeypatch.delenv("MEMTRANS_BENCH_LIBRARIES", raising=False)
    with pytest.raises(SystemExit, match=r"has no _native_cpu\.abi3\.so.*MEMTRANS_BENCH_LIBRARIES"):
        against.require_libraries(flat)
    monkeypatch.setenv("MEMTRANS_BENCH_LIBRARIES", str(today / "memtrans_kernels"))
    against.require_libraries(flat)
    assert (flat / "memtrans_kernels" / "_native_cpu.abi3.so").exists()


@pytest.mark.parametrize(("times", "median"), [([3.0, 1.0, 2.0], 2.0), ([2.0, 1.0], 1.0)])
def test_the_round_with_the_median_time_is_written_down(times: list[float], median: float) -> None:
    entries = [{"ms": time, "round": number} for number, time in enumerate(times)]
    chosen = benchmark_script("against").middle(entries)
    assert chosen == {"ms": median, "round": times.index(median), "rounds_ms": times}


def test_a_new_entry_takes_the_place_of_the_earlier_one(tmp_path: Path) -> None:
    common, path = benchmark_script("common"), tmp_path / "cpu" / "op.json"
    labels = {"op": "op", "case": "d64", "mode": "forward", "dtype": "float32"}
    for impl, milliseconds in (("memtrans", 1.0), ("torch", 2.0), ("memtrans", 3.0)):
        common.put(path, {**labels, "impl": impl, "ms": milliseconds})
    assert [(entry["impl"], entry["ms"]) for entry in json.loads(path.read_text())] == [
        ("memtrans", 3.0),
        ("torch", 2.0),
    ]
