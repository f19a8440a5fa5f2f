"""Builds the optional C++/CUDA extension with what stands in `building`; everything else is in pyproject.toml.

Each module of the extension is a shared library of operators, `memtrans_kernels/_native_<module>.abi3.so`, loaded by
`memtrans_kernels/native.py`. A module that cannot be built never stops the installation: a warning is printed and the
reason is left beside the package as `_native_<module>.txt`, where `memtrans_kernels.native.status` finds it.

Switches (environment variables):
  MEMTRANS_SKIP_BUILD=1       build no module at all
  MEMTRANS_SKIP_CUDA_BUILD=1  leave the CUDA module and the Faiss module out
  MEMTRANS_BUILD_CUDA=1       build the CUDA module though neither an NVIDIA driver nor PyTorch's CUDA build is here
  MEMTRANS_FAISS_ROOT         a folder with Faiss's headers (include/faiss or faiss) and maybe lib/libfaiss.so, for the
                              Faiss module (default: the active conda environment); without it that module is left out
  MEMTRANS_FORCE_BUILD=1      a module that was not skipped and cannot be built is an error
  TORCH_CUDA_ARCH_LIST        GPU architectures to compile for (default: 9.0a, the one that the kernels are written for;
                              a list without it or 9.0 leaves the CUDA module out)
  CUDA_HOME                   the CUDA toolkit (default: the one on PATH, of PyPI's nvidia-cuda-nvcc, /usr/local/cuda)
  MAX_JOBS                    compilers to run at a time
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))
from building.commands import BuildNative, Wheel, extension_modules

setup(
    ext_modules=extension_modules(),
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    options={} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
