"""What installers call (PEP 517): setuptools' own, which asks for nvcc's wheels where there is a GPU and no nvcc."""

from __future__ import annotations

from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

from building.common import switched_on
from building.cuda import nvcc_wheels, toolkit, wanted


def missing() -> list[str]:
    skipped = switched_on("MEMTRANS_SKIP_BUILD") or switched_on("MEMTRANS_SKIP_CUDA_BUILD")
    return nvcc_wheels() if wanted() and not skipped and toolkit() is None else []


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *missing()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *missing()]
