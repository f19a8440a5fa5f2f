"""The CUDA module, built without PyTorch's CUDA build: its kernels include no PyTorch header.

The CUDA runtime is linked statically, so that builds of PyTorch for CUDA 12 and 13 load the same library. It calls one
function of PyTorch's CUDA library; a stand-in for it to link against makes PyTorch's CUDA build needless here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from setuptools import Extension

from building import common
from building.common import HOST_FLAGS, ROOT, Skipped, switched_on

HOPPER = "9.0a"  # what the kernels are written for: wgmma and the bulk copy engine
# What installers bring where a GPU is and nvcc is not; nvcc's wheels are made for Linux.
NVCC_PARTS = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
NVCC_WHEELS = [f"{name}==13.0.*" for name in NVCC_PARTS]
STAND_IN = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n'


class CudaExtension(Extension):
    """The module's name, and the toolkit that compiles it."""

    def __init__(self, name: str, home: Path) -> None:
        super().__init__(name, [], py_limited_api=True)
        self.home = home


def cuda_module(name: str) -> CudaExtension:
    common.require_torch_and_compiler()
    if switched_on("MEMTRANS_SKIP_CUDA_BUILD"):
        raise Skipped("MEMTRANS_SKIP_CUDA_BUILD was set during installation")
    if sys.platform != "linux":
        raise Skipped("the CUDA module is built on Linux only")
    if not wanted() and common.torch_cuda is None:
        raise Skipped(
            "neither an NVIDIA driver nor a PyTorch with CUDA was there during installation; "
            "MEMTRANS_BUILD_CUDA=1 builds it all the same"
        )
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", HOPPER).replace(";", " ").split()
    if not {HOPPER, "9.0"} & {name.removesuffix("+PTX") for name in architectures}:
        raise Skipped(
            f"TORCH_CUDA_ARCH_LIST is {' '.join(architectures)}, and the kernels are written for {HOPPER} only"
        )
    home = toolkit()
    if home is None:
        raise RuntimeError("no nvcc was found during installation: install a CUDA toolkit or set CUDA_HOME")
    return CudaExtension(name, home)


def wanted() -> bool:
    """Whether the module has a GPU to run on, or was asked for."""
    return switched_on("MEMTRANS_BUILD_CUDA") or Path("/proc/driver/nvidia/version").exists()


def nvcc_wheels() -> list[str]:
    """NVCC_WHEELS, beside a PyTorch for CUDA 13 those of its minor version.

    PyTorch has brought some of them itself, in versions that it asks for; installers give up where a build asks for
    another one.
    """
    runtime = installed("nvidia-cuda-runtime")
    if runtime is None:
        return NVCC_WHEELS
    series = ".".join(runtime.split(".")[:2])
    return [f"{name}=={installed(name) or f'{series}.*'}" for name in NVCC_PARTS]


def installed(name: str) -> str | None:
    """The version of a package that is here."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def toolkit() -> Path | None:
    """The folder whose bin/ holds nvcc: the one CUDA_HOME names, else on PATH, of PyPI's wheels, of the system."""
    if given := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        candidates = [Path(given)]
    else:
        on_path = shutil.which("nvcc")
        candidates = [Path(on_path).resolve().parents[1]] if on_path else []
        candidates += [*wheel_folders(), Path("/usr/local/cuda")]
    return next((folder for folder in candidates if is_toolkit(folder)), None)


def wheel_folders() -> list[Path]:
    """Where PyPI's wheels of CUDA lie: in several folders, of which an import of `nvidia` may find the first alone."""
    places = [Path(place) / "nvidia" for place in sys.path]
    return [folder for place in places for folder in sorted(place.glob("cu[0-9]*"), reverse=True)]


def other_parts(home: Path) -> list[Path]:
    """Where the rest of a toolkit lies that is made of wheels.

    pip keeps what a build asks for later apart from what came with PyTorch.
    """
    folders = wheel_folders()
    return [folder for folder in folders if folder != home] if home in folders else []


def is_toolkit(folder: Path) -> bool:
    """A compiler and what it links: a script named nvcc on PATH has neither beside it."""
    return (folder / "bin" / "nvcc").exists() and (folder / "include" / "cuda_runtime.h").exists()


def build(home: Path, target: Path, temporary: Path) -> None:
    """Compiles every source below csrc/cuda, MAX_JOBS at a time, and links them into `target`."""
    temporary.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    files = common.sources("cuda/**/*.cpp", "cuda/**/*.cu")
    objects = [temporary / f"{Path(file).stem}{Path(file).suffix.replace('.', '_')}.o" for file in files]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as workers:
        commands = [compilation(home, *pair) for pair in zip(files, objects, strict=True)]
        list(workers.map(execute, [*commands, stand_in(temporary)]))
    execute(linking(home, objects, target, temporary))


def compilation(home: Path, file: str, output: Path) -> list[str]:
    include = [f"-I{ROOT / 'csrc'}", *(f"-I{folder / 'include'}" for folder in other_parts(home))]
    if file.endswith(".cu"):
        flags = ["-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        flags += ["-Xfatbin", "-compress-all"]  # else the library is five times as large
        host = ["-ccbin", os.environ["CXX"]] if os.environ.get("CXX") else []
        return [str(home / "bin" / "nvcc"), *host, *flags, *include, "-c", str(ROOT / file), "-o", str(output)]
    include += [f"-I{path}" for path in (*common.cpp_extension.include_paths(), home / "include")]
    flags = ["-std=c++17", "-fPIC", "-DUSE_CUDA", *HOST_FLAGS]
    return [*common.compiler(), *flags, *include, "-c", str(ROOT / file), "-o", str(output)]


def stand_in(folder: Path) -> list[str]:
    """Makes the libtorch_cuda.so to link against."""
    source = folder / "stand_in.cpp"
    source.write_text(STAND_IN, encoding="utf-8")
    name = "libtorch_cuda.so"
    return [*common.compiler(), "-shared", "-fPIC", f"-Wl,-soname,{name}", str(source), "-o", str(folder / name)]


def linking(home: Path, objects: list[Path], target: Path, stand_in_folder: Path) -> list[str]:
    of_cuda = [folder / name for folder in (*other_parts(home), home) for name in ("lib64", "lib")]
    folders = [stand_in_folder, *common.cpp_extension.library_paths(), *of_cuda]
    libraries = ["torch_cuda", "torch_cpu", "torch", "c10", "cudart_static", "rt", "pthread", "dl"]
    return [
        *common.compiler(),
        *("-shared", "-Wl,-s", "-Wl,--no-as-needed"),
        *map(str, objects),
        *(f"-L{folder}" for folder in folders),
        *(f"-l{library}" for library in libraries),
        *("-o", str(target)),
    ]


def execute(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(" ".join(command) + "\n" + done.stdout, end="", flush=True)  # at once: several run side by side
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} ended with status {done.returncode}: {done.stdout.strip()[-500:]}")
