"""Installing the package: with a compiler, without one, and with every switch of setup.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from torch.utils import cpp_extension

REPOSITORY = Path(__file__).resolve().parents[2]
NO_COMPILER = {"CXX": "/nowhere/c++", "CC": "/nowhere/cc"}

# Says what an installation in the folder argv[1] is like, as one line of JSON.
PROBE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import memtrans_kernels
from memtrans_kernels import native
assert memtrans_kernels.__file__.startswith(sys.argv[1]), memtrans_kernels.__file__
print(json.dumps({module: native.status(module) for module in native.MODULES}))
"""

# Adds one entry to a ring of one row, with Triton unavailable, and says which modules an import alone has loaded.
COLD_IMPORT = """
import json, sys
sys.path.insert(0, sys.argv[1])
sys.modules["triton"] = None
import torch
import memtrans, memtrans_kernels
libraries = list(torch.ops.loaded_libraries)
from memtrans_kernels import native
keys, values, cursor = torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(1, dtype=torch.int64)
memtrans_kernels.knn_add_(keys, values, cursor, torch.tensor([0]), torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
print(json.dumps({"libraries": libraries, "live": native.status()[0], "key": keys.item()}))
"""


# A module of one operator, which checks a shape.
CHECKING = """
#include "memtrans.h"
namespace {
void check(torch::stable::Tensor tensor, int64_t rows) {
  memtrans::check_shape(tensor, "tensor", {rows, 2}, "(R, 2)");
  MEMTRANS_CHECK(rows < 4, "rows must be below 4, got ", rows, ", which is ", 0.5, " of it");
}
}  // namespace
STABLE_TORCH_LIBRARY_FRAGMENT(memtrans_checking, library) { library.def("check(Tensor tensor, int rows) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(memtrans_checking, CPU, library) { library.impl("check", TORCH_BOX(&check)); }
"""

# Loads the module argv[1] and says what its operator does with a right shape, a wrong one and a wrong number.
CHECK = """
import sys
import torch
torch.ops.load_library(sys.argv[1])
for shape, rows in (((3, 2), 3), ((3, 2), 10), ((4, 2), 4)):
    try:
        print(torch.ops.memtrans_checking.check(torch.zeros(shape), rows))
    except RuntimeError as error:
        print(error)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of everything that an installation reads, without what was built in the checkout."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    for name in ("building", "csrc", "memtrans", "memtrans_kernels"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("_native_*", "__pycache__"))
    return copy


def run(*command: str | Path, cwd: Path = Path("/"), **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMTRANS_")}
    return subprocess.run(
        [sys.executable, *command], env=kept | environment, capture_output=True, text=True, cwd=cwd, timeout=280
    )


def install(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Installs `source` into the folder `site` beside it, with pip's output in full."""
    options = ("--verbose", "--no-deps", "--no-build-isolation", "--upgrade", "--target", source.parent / "site")
    return run("-m", "pip", "install", *options, source, **environment)


def probe(source: Path, script: str = PROBE) -> dict[str, object]:
    done = run("-c", script, source.parent / "site")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_installed_without_extension(source: Path, done: subprocess.CompletedProcess[str], reason: str) -> None:
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "WARNING: memtrans goes without memtrans_kernels._native_cpu" in output
    live, why = probe(source)["cpu"]
    assert live is False
    assert reason in why


def test_checks_speak_in_a_module_with_a_libstdcpp_of_its_own(tmp_path: Path) -> None:
    """Some compilers link it statically; its streams then write numbers as nothing, or crash: checks use none."""
    (tmp_path / "checking.cpp").write_text(CHECKING)
    folders = [f"-I{REPOSITORY / 'csrc'}", *(f"-I{path}" for path in cpp_extension.include_paths())]
    libraries = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-static-libstdc++"]
    stable = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
    command = [cpp_extension.get_cxx_compiler(), *flags, *stable, *folders, "checking.cpp", "-o", "checking.so"]
    subprocess.run([*command, *libraries], cwd=tmp_path, check=True, timeout=200)
    done = run("-c", CHECK, tmp_path / "checking.so")
    assert done.returncode == 0, done.stderr
    right, wrong_shape, wrong_number = done.stdout.splitlines()
    assert right == "None"
    assert wrong_shape.endswith("tensor must have shape (R, 2) = (10, 2), got (3, 2)")
    assert wrong_number.endswith("rows must be below 4, got 4, which is 0.5 of it")


@pytest.mark.slow  # a minute or two of compiling; continuous integration itself installs with a compiler
def test_a_compiler_is_all_that_the_extension_needs(source: Path) -> None:
    done = install(source, MEMTRANS_FORCE_BUILD="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert probe(source)["cpu"] == [True, "loaded from _native_cpu.abi3.so"]


def test_without_a_compiler_the_package_installs_and_works(source: Path) -> None:
    assert_installed_without_extension(source, install(source, **NO_COMPILER), "no C++ compiler was found")
    assert probe(source, COLD_IMPORT) == {"libraries": [], "live": False, "key": 1.0}


def test_force_build_makes_a_missing_compiler_an_error(source: Path) -> None:
    done = run("setup.py", "build_ext", cwd=source, MEMTRANS_FORCE_BUILD="1", **NO_COMPILER)
    assert done.returncode != 0
    assert (
        "MEMTRANS_FORCE_BUILD is set and memtrans_kernels._native_cpu could not be built" in done.stdout + done.stderr
    )


@pytest.mark.slow
def test_skip_build_needs_no_compiler_even_when_builds_are_forced(source: Path) -> None:
    done = install(source, MEMTRANS_SKIP_BUILD="1", MEMTRANS_FORCE_BUILD="1", **NO_COMPILER)
    assert_installed_without_extension(source, done, "MEMTRANS_SKIP_BUILD was set")


@pytest.mark.slow
def test_broken_source_is_a_warning_and_with_force_build_an_error(source: Path) -> None:
    with (source / "csrc" / "ops.cpp").open("a") as ops:
        ops.write("this is no C++\n")
    assert_installed_without_extension(source, install(source), "it could not be built")
    assert install(source, MEMTRANS_FORCE_BUILD="1").returncode != 0


@pytest.mark.slow
def test_without_torch_at_build_time_the_package_installs(source: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise ImportError('no torch here')\n")
    done = install(source, PYTHONPATH=str(blocked))
    assert_installed_without_extension(source, done, "PyTorch could not be imported during installation")
    assert install(source, PYTHONPATH=str(blocked), MEMTRANS_FORCE_BUILD="1").returncode != 0


@pytest.mark.slow
def test_skip_cuda_build_leaves_the_cpu_module_alone(source: Path) -> None:
    done = install(source, MEMTRANS_SKIP_CUDA_BUILD="1", MEMTRANS_FORCE_BUILD="1")
    assert done.returncode == 0, done.stdout + done.stderr
    found = probe(source)
    assert found["cpu"][0] is True
    assert found["cuda"] == [False, "MEMTRANS_SKIP_CUDA_BUILD was set during installation"]


def test_a_failed_build_leaves_the_library_of_an_editable_tree_in_use(source: Path) -> None:
    library = source / "memtrans_kernels" / "_native_cpu.abi3.so"
    library.write_bytes(b"what an earlier build left")
    done = run("setup.py", "build_ext", "--inplace", cwd=source, **NO_COMPILER)
    assert done.returncode == 0, done.stderr
    assert library.read_bytes() == b"what an earlier build left"
    assert "no C++ compiler was found" in library.with_name("_native_cpu.txt").read_text()
    assert "_native_cpu.abi3.so of an earlier build stays" in done.stderr


@pytest.mark.slow
def test_a_new_library_of_an_editable_tree_takes_the_place_of_the_old_one_and_its_note(source: Path) -> None:
    library = source / "memtrans_kernels" / "_native_cpu.abi3.so"
    library.write_bytes(b"what an earlier build left")
    library.with_name("_native_cpu.txt").write_text("no C++ compiler was found\n")
    assert run("setup.py", "build_ext", "--inplace", cwd=source).returncode == 0
    assert library.stat().st_size > 100_000
    assert not library.with_name("_native_cpu.txt").exists()


def test_a_wheel_without_the_extension_is_for_every_python_and_holds_todays_modules_alone(source: Path) -> None:
    moved_since = source / "build" / "lib" / "memtrans" / "moved_since.py"
    moved_since.parent.mkdir(parents=True)
    moved_since.touch()
    (source / "setup.cfg").write_text("[build]\nbuild_lib = build/lib\n")
    done = run("setup.py", "bdist_wheel", cwd=source, MEMTRANS_SKIP_BUILD="1")
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"memtrans/__init__.py", "memtrans_kernels/_native_cpu.txt"} <= set(names)
    assert not [name for name in names if ".data/" in name or "moved_since" in name]


@pytest.mark.slow
def test_a_wheel_with_the_extension_is_for_one_platform_and_every_later_python(source: Path) -> None:
    done = run("setup.py", "bdist_wheel", cwd=source, MEMTRANS_FORCE_BUILD="1")
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "dist").iterdir()
    assert f"-cp310-abi3-{sysconfig.get_platform().replace('-', '_')}" in wheel.name
    assert "memtrans_kernels/_native_cpu.abi3.so" in zipfile.ZipFile(wheel).namelist()
    assert done.stdout.count(" -shared ") == 1  # built once: setuptools' command builds again unless told


@pytest.mark.slow
def test_the_installed_library_serves_without_the_source_tree(source: Path) -> None:
    assert install(source, MEMTRANS_FORCE_BUILD="1").returncode == 0
    shutil.rmtree(source)
    assert probe(source, COLD_IMPORT) == {"libraries": [], "live": True, "key": 1.0}
