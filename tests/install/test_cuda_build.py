"""The CUDA module compiles where there is no GPU, without a warning, and its kernels stay in registers."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from helpers.checks import MOST_SPILLED

from building import backend, cuda

pytestmark = pytest.mark.timeout(1200)  # a minute and a half of one core, which may have other work


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The library, and what the compilers said."""
    home = cuda.toolkit()
    assert home is not None, "this test needs nvcc: `make check-cuda` installs it"
    folder = tmp_path_factory.mktemp("cuda")
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVCC_APPEND_FLAGS", "-Werror all-warnings --ptxas-options=-v")
        patch.setattr(cuda, "execute", lambda command: said.append(output_of(command)))
        cuda.build(home, folder / "_native_cuda.abi3.so", folder / "temporary")
    return folder / "_native_cuda.abi3.so", "\n".join(said)


def output_of(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def spills(said: str) -> dict[str, int]:
    """Bytes that each kernel stores to the stack for want of registers, by its mangled name."""
    kernels = re.findall(r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores", said, re.DOTALL)
    return {name: int(count) for name, count in kernels}


def most_spilled(name: str) -> int:
    return next((most for part, most in MOST_SPILLED.items() if part in name), 0)


@pytest.mark.slow
def test_no_kernel_spills_more_than_it_did(built: tuple[Path, str]) -> None:
    found = spills(built[1])
    assert len(found) > 20
    assert not {name: count for name, count in found.items() if count > most_spilled(name)}


@pytest.mark.slow
def test_the_library_asks_for_no_cuda_runtime_of_its_own(built: tuple[Path, str]) -> None:
    needed = set(re.findall(rb"lib\w+\.so[.\d]*", built[0].read_bytes()))
    assert b"libtorch_cuda.so" in needed
    assert not [name for name in needed if name.startswith(b"libcudart")]


def test_spills_are_read_from_what_the_compiler_says() -> None:
    said = """ptxas info    : Compiling entry function '_Z4scanv' for 'sm_90a'
ptxas info    : Function properties for _Z4scanv
    16 bytes stack frame, 12 bytes spill stores, 12 bytes spill loads
ptxas info    : Compiling entry function '_Z4redov' for 'sm_90a'
ptxas info    : Function properties for _Z4redov
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"""
    assert spills(said) == {"_Z4scanv": 12, "_Z4redov": 0}


@pytest.mark.parametrize(
    ("gpu", "has_nvcc", "skipped", "asked"),
    [
        (True, False, "", cuda.NVCC_WHEELS),
        (True, True, "", []),
        (False, False, "", []),
        (True, False, "MEMTRANS_SKIP_CUDA_BUILD", []),
        (True, False, "MEMTRANS_SKIP_BUILD", []),
    ],
)
def test_an_installer_brings_nvcc_where_a_gpu_is_and_no_nvcc(
    gpu: bool, has_nvcc: bool, skipped: str, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "installed", {}.get)
    monkeypatch.setattr(backend, "wanted", lambda: gpu)
    monkeypatch.setattr(backend, "toolkit", lambda: Path("/cuda") if has_nvcc else None)
    for switch in ("MEMTRANS_SKIP_CUDA_BUILD", "MEMTRANS_SKIP_BUILD"):
        monkeypatch.setenv(switch, "1" if switch == skipped else "0")
    assert backend.missing() == asked


def test_beside_a_pytorch_that_brought_parts_of_cuda_the_others_fit_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip ends with an error where a build asks for another version than PyTorch does."""
    monkeypatch.setattr(cuda, "installed", {"nvidia-cuda-runtime": "13.2.86", "nvidia-cuda-cccl": "13.3.5.0.6"}.get)
    assert cuda.nvcc_wheels() == [
        *(f"{name}==13.2.*" for name in ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt")),
        *("nvidia-cuda-runtime==13.2.86", "nvidia-cuda-cccl==13.3.5.0.6"),
    ]


def test_parts_of_cuda_may_lie_in_two_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_pytorch, of_build, system = (tmp_path / name / "nvidia" / "cu13" for name in ("overlay", "normal", "system"))
    for folder in (of_pytorch, of_build):
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").touch()  # as some wheels have it; an import would find the first one alone
        monkeypatch.syspath_prepend(folder.parents[1])
    assert f"-I{of_pytorch / 'include'}" in cuda.compilation(of_build, "csrc/cuda/one.cu", tmp_path / "one.o")
    assert f"-L{of_pytorch / 'lib'}" in cuda.linking(of_build, [], tmp_path / "library.so", tmp_path)
    assert not cuda.other_parts(system), "what nvcc did not come with is not mixed with it"


def test_the_toolkit_is_the_one_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert cuda.toolkit() is None  # and no other one is taken in its place
    for file in ("bin/nvcc", "include/cuda_runtime.h"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    assert cuda.toolkit() == tmp_path
