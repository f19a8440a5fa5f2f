"""Builds the optional C++/CUDA extension; everything else about the package stands in pyproject.toml.

Each module of the extension is a shared library of operators, `memtrans_kernels/_native_<module>.abi3.so`, loaded by
`memtrans_kernels/native.py`. A module that cannot be built never stops the installation: a warning is printed and the
reason is left beside the package as `_native_<module>.txt`, where `memtrans_kernels.native.status` finds it.

Switches (environment variables):
  MEMTRANS_SKIP_BUILD=1       build no module at all
  MEMTRANS_SKIP_CUDA_BUILD=1  leave the CUDA module and the Faiss module out
  MEMTRANS_FAISS_ROOT         a folder with Faiss's headers (include/faiss or faiss) and maybe lib/libfaiss.so, for the
                              Faiss module (default: the active conda environment); without it that module is left out
  MEMTRANS_FORCE_BUILD=1      a module that was not skipped and cannot be built is an error
  TORCH_CUDA_ARCH_LIST        GPU architectures to compile for (default: 9.0a, the one that the kernels are written for;
                              a list without it or 9.0 leaves the CUDA module out)
  MAX_JOBS                    compilers to run at a time
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from torch.utils import cpp_extension
    from torch.version import cuda as torch_cuda

    BuildExtension = cpp_extension.BuildExtension
    torch_missing = ""
except Exception as error:  # a broken PyTorch fails in many ways, and none of them may stop the installation
    BuildExtension = build_ext
    torch_missing = (
        f"PyTorch could not be imported during installation ({error}): install it first, use --no-build-isolation"
    )

ROOT = Path(__file__).resolve().parent
HOPPER = "9.0a"  # what the CUDA kernels are written for: wgmma and the bulk copy engine
# PyTorch's build switches these off for its own tensors' sake; the kernels include no PyTorch header.
HALF_CONVERSIONS = ["-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__"]
# LibTorch's stable ABI as of 2.10: one build works with every later PyTorch (and, through abi3, every Python >= 3.10).
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
# Errors name their source line; without the folder that the package happened to be built in.
HOST_FLAGS = ["-O3", "-fopenmp-simd", "-fvisibility=hidden", f"-ffile-prefix-map={ROOT}{os.sep}=", *STABLE_ABI]


class Skipped(Exception):
    """A module is left out on purpose or has nothing to run on here: no failure, also under MEMTRANS_FORCE_BUILD."""


def switched_on(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off")


def sources(*patterns: str) -> list[str]:
    found = sorted(path for pattern in patterns for path in (ROOT / "csrc").glob(pattern))
    return [path.relative_to(ROOT).as_posix() for path in found]


def require_torch_and_compiler() -> None:
    if switched_on("MEMTRANS_SKIP_BUILD"):
        raise Skipped("MEMTRANS_SKIP_BUILD was set during installation")
    if torch_missing:
        raise RuntimeError(torch_missing)
    compiler = shlex.split(cpp_extension.get_cxx_compiler())[0]
    if os.name == "posix" and shutil.which(compiler) is None:
        raise RuntimeError(f"no C++ compiler was found during installation ({compiler}): install one or set CXX")


def cpu_module(name: str) -> Extension:
    require_torch_and_compiler()
    return cpp_extension.CppExtension(
        name,
        sources("*.cpp", "cpu/*.cpp"),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": HOST_FLAGS},
        py_limited_api=True,
    )


def cuda_module(name: str) -> Extension:
    require_torch_and_compiler()
    if switched_on("MEMTRANS_SKIP_CUDA_BUILD"):
        raise Skipped("MEMTRANS_SKIP_CUDA_BUILD was set during installation")
    if not sources("cuda/**/*.cu"):
        raise Skipped("this version has no CUDA sources")
    if torch_cuda is None:
        raise Skipped("the PyTorch present during installation was built without CUDA")
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", HOPPER).replace(";", " ").split()
    if not {HOPPER, "9.0"} & {name.removesuffix("+PTX") for name in architectures}:
        raise Skipped(
            f"TORCH_CUDA_ARCH_LIST is {' '.join(architectures)}, and the kernels are written for {HOPPER} only"
        )
    home = cpp_extension.CUDA_HOME
    if home is None or shutil.which("nvcc", path=os.path.join(home, "bin")) is None:
        raise RuntimeError("no nvcc was found during installation: install a CUDA toolkit or set CUDA_HOME")
    return cpp_extension.CUDAExtension(
        name,
        sources("cuda/**/*.cpp", "cuda/**/*.cu"),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={
            "cxx": ["-DUSE_CUDA", *HOST_FLAGS],
            "nvcc": ["-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", *HALF_CONVERSIONS],
        },
        py_limited_api=True,
    )


def first_with(file: str, folders: list[Path]) -> Path | None:
    return next((folder for folder in folders if (folder / file).exists()), None)


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
    package = find_spec("nvidia")
    folders = [Path(cpp_extension.CUDA_HOME, "include")] if cpp_extension.CUDA_HOME else []
    for place in (package.submodule_search_locations or []) if package else []:
        folders += sorted(Path(place).glob("*/include"))
    for header in ("cuda_runtime.h", "cublas_v2.h"):
        if first_with(header, folders) is None:
            raise RuntimeError(f"no {header} was found during installation: install a CUDA toolkit or set CUDA_HOME")
    return [str(folder) for folder in folders]


def faiss_module(name: str) -> Extension:
    require_torch_and_compiler()
    if switched_on("MEMTRANS_SKIP_CUDA_BUILD"):
        raise Skipped("MEMTRANS_SKIP_CUDA_BUILD was set during installation")
    if torch_cuda is None:
        raise Skipped("the PyTorch present during installation was built without CUDA")
    headers = faiss_headers()
    return cpp_extension.CppExtension(
        name,
        sources("faiss/*.cpp"),
        include_dirs=[str(ROOT / "csrc"), str(headers), *cuda_headers()],
        library_dirs=[str(faiss_library(headers))],
        libraries=["faiss", "torch_cuda"],  # the latter knows the current stream
        extra_compile_args={"cxx": ["-std=c++20", "-DUSE_CUDA", *HOST_FLAGS]},
        py_limited_api=True,
    )


MODULES: dict[str, Callable[[str], Extension]] = {"cpu": cpu_module, "cuda": cuda_module, "faiss": faiss_module}
# Why a module was not even tried, by its full name.
obstacles: dict[str, Exception] = {}


def extension_modules() -> list[Extension]:
    """One entry per module; one with an obstacle is an empty place, so that `BuildNative` can say why."""
    extensions = []
    for module, describe in MODULES.items():
        name = f"memtrans_kernels._native_{module}"
        try:
            extensions.append(describe(name))
        except Exception as error:
            obstacles[name] = error
            extensions.append(Extension(name, [], py_limited_api=True))
    return extensions


class BuildNative(BuildExtension):
    """Builds what can be built, and leaves the reason behind for every module that cannot."""

    def run(self) -> None:
        self.reasons: dict[str, str] = {}
        super().run()
        for extension in self.extensions:
            self.leave_note(extension.name)

    def build_extensions(self) -> None:
        modules = self.extensions
        for extension in modules:  # one by one, because an unfit nvcc must not cost the CPU module
            self.extensions = [extension]
            try:
                if extension.name in obstacles:
                    raise obstacles[extension.name]
                super().build_extensions()
            except Exception as error:
                self.give_up(extension, error)
        self.extensions = modules

    def give_up(self, extension: Extension, error: Exception) -> None:
        name = extension.name
        if switched_on("MEMTRANS_FORCE_BUILD") and not isinstance(error, Skipped):
            raise SystemExit(f"MEMTRANS_FORCE_BUILD is set and {name} could not be built: {error}") from error
        self.reasons[name] = str(error) if isinstance(error, Skipped) else f"it could not be built: {error}"
        extension.optional = True  # only now: setuptools would have passed over the error in silence
        Path(self.get_ext_fullpath(name)).unlink(missing_ok=True)

    def leave_note(self, name: str) -> None:
        library = Path(self.get_ext_fullpath(name))
        note = library.with_name(f"{name.rpartition('.')[2]}.txt")
        note.unlink(missing_ok=True)
        if name not in self.reasons:
            return
        library.unlink(missing_ok=True)  # one of an earlier installation would be out of date
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(self.reasons[name] + "\n", encoding="utf-8")
        print(f"WARNING: memtrans goes without {name}: {self.reasons[name]}", file=sys.stderr)


setup(
    ext_modules=extension_modules(),
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
