"""Names of old: arguments of `memorizing-transformers-pytorch` that mean nothing here, and modules that moved.

The arguments are accepted, told once and ignored. The modules are found under their former names, because pickles
(`torch.save(model)`) name the module of every class.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Where the classes that a pickle can name live now.
MOVED = {
    "memtrans.blocks": "memtrans.transformer",
    "memtrans.local_context": "memtrans.attention",
    "memtrans.memory_list": "memtrans.memory.memory_list",
    "memtrans.sampling": "memtrans.generation.sampling",
    "memtrans.settings": "memtrans.training.settings",
}

UNUSED: Any = object()  # the default of such an argument


def warn_unused(**arguments: Any) -> None:
    """One DeprecationWarning for the arguments that were given although they have no meaning any more."""
    given = [name for name, value in arguments.items() if value is not UNUSED]
    if given:
        warnings.warn(
            f"{', '.join(given)}: accepted for compatibility and ignored; the memory lives on the device in one tensor "
            "and is searched exactly, so there are no files, no processes and no probes to choose",
            DeprecationWarning,
            stacklevel=3,
        )


class _FormerModules(MetaPathFinder, Loader):
    """Finds a module of MOVED: a stand-in that looks every name up where it is now."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name, f"Now `{MOVED[spec.name]}`.")
        module.__dict__["__getattr__"] = lambda name: getattr(import_module(MOVED[spec.name]), name)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def find_former_modules() -> None:
    """Lets `import` find the modules of MOVED, behind all that exist."""
    if not any(isinstance(finder, _FormerModules) for finder in sys.meta_path):
        sys.meta_path.append(_FormerModules())
