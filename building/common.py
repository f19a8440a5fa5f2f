"""What the modules of the extension share: switches, flags, and who may leave a module out."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

try:
    from torch import version
    from torch.utils import cpp_extension

    torch_missing, torch_cuda = "", version.cuda
except Exception as error:  # a broken PyTorch fails in many ways, and none of them may stop the installation
    torch_missing = f"PyTorch could not be imported during installation ({error}): without --no-build-isolation it can"
    torch_cuda = None

ROOT = Path(__file__).resolve().parents[1]
# LibTorch's stable ABI as of 2.10: one build works with every later PyTorch (and, through abi3, every Python >= 3.10).
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
# Errors name their source line; without the folder that the package happened to be built in. Debug information, which
# Python's own flags ask for, would be two thirds of the library.
HOST_FLAGS = ["-O3", "-g0", "-fopenmp-simd", "-fvisibility=hidden", f"-ffile-prefix-map={ROOT}{os.sep}=", *STABLE_ABI]


class Skipped(Exception):
    """A module is left out on purpose or has nothing to run on here: no failure, also under MEMTRANS_FORCE_BUILD."""


def switched_on(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off")


def sources(*patterns: str) -> list[str]:
    found = sorted(path for pattern in patterns for path in (ROOT / "csrc").glob(pattern))
    return [path.relative_to(ROOT).as_posix() for path in found]


def compiler() -> list[str]:
    return shlex.split(cpp_extension.get_cxx_compiler())


def require_torch_and_compiler() -> None:
    if switched_on("MEMTRANS_SKIP_BUILD"):
        raise Skipped("MEMTRANS_SKIP_BUILD was set during installation")
    if os.name == "nt":
        raise Skipped("the extension is not built on Windows")
    if torch_missing:
        raise RuntimeError(torch_missing)
    if shutil.which(compiler()[0]) is None:
        raise RuntimeError(f"no C++ compiler was found during installation ({compiler()[0]}): install one or set CXX")
