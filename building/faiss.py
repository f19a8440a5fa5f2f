"""The Faiss module: C++ alone, against Faiss's headers, which its wheels do not ship."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension

from building import common
from building.common import HOST_FLAGS, ROOT, Skipped, switched_on


def faiss_module(name: str) -> Extension:
    common.require_torch_and_compiler()
    if switched_on("MEMTRANS_SKIP_CUDA_BUILD"):
        raise Skipped("MEMTRANS_SKIP_CUDA_BUILD was set during installation")
    if common.torch_cuda is None:
        raise Skipped("the PyTorch present during installation was built without CUDA")
    headers = faiss_headers()
    return common.cpp_extension.CppExtension(
        name,
        common.sources("faiss/*.cpp"),
        include_dirs=[str(ROOT / "csrc"), str(headers), *cuda_headers()],
        library_dirs=[str(faiss_library(headers))],
        libraries=["faiss", "torch_cuda"],  # the latter knows the current stream
        extra_compile_args={"cxx": ["-std=c++20", "-DUSE_CUDA", *HOST_FLAGS]},
        py_limited_api=True,
    )


def faiss_headers() -> Path:
    """The folder to include from: that of MEMTRANS_FAISS_ROOT, or of the active conda environment."""
    given, conda = os.environ.get("MEMTRANS_FAISS_ROOT"), os.environ.get("CONDA_PREFIX")
    root = given or conda
    folder = first_with("faiss/gpu/GpuDistance.h", [Path(root, "include"), Path(root)]) if root else None
    if folder is None and given:
        raise RuntimeError(f"MEMTRANS_FAISS_ROOT={given} has no faiss/gpu/GpuDistance.h, nor has its folder include")
    if folder is None:
        raise Skipped(
            "no headers of Faiss: MEMTRANS_FAISS_ROOT was not set during installation, nor does conda have them"
        )
    return folder


def faiss_library(headers: Path) -> Path:
    """The folder of libfaiss.so: beside the headers, or in the `faiss` package (its wheels ship no headers)."""
    package = find_spec("faiss")
    folders = [headers.parent / "lib", headers.parent / "lib64", headers / "lib", headers]
    folders += [Path(place) for place in (package.submodule_search_locations or [])] if package else []
    folder = first_with("libfaiss.so", folders)
    if folder is None:
        raise RuntimeError(f"no libfaiss.so beside the headers in {headers}, nor in an installed package faiss")
    return folder


def cuda_headers() -> list[str]:
    """Of the CUDA toolkit, and of the packages nvidia-* that PyTorch's wheels bring."""
    package, home = find_spec("nvidia"), common.cpp_extension.CUDA_HOME
    folders = [Path(home, "include")] if home else []
    for place in (package.submodule_search_locations or []) if package else []:
        folders += sorted(Path(place).glob("*/include"))
    for header in ("cuda_runtime.h", "cublas_v2.h"):
        if first_with(header, folders) is None:
            raise RuntimeError(f"no {header} was found during installation: install a CUDA toolkit or set CUDA_HOME")
    return [str(folder) for folder in folders]


def first_with(file: str, folders: list[Path]) -> Path | None:
    return next((folder for folder in folders if (folder / file).exists()), None)
