"""Today's benchmarks over another tree's packages, where modules may have other names (`against.py` says which tree).

A module that the tree does not have is looked for by the names that are imported from it: `from
memtrans.training.trainer import Trainer` finds the one `Trainer` that any module of the tree defines.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

TODAY = Path(__file__).resolve().parents[1]
PACKAGES = ("memtrans", "memtrans_kernels")


def measure_tree(tree: Path) -> None:
    """Makes sure that both packages are the tree's, and finds by name what it has elsewhere.

    Raises ImportError if a package would be imported from anywhere else.
    """
    for name in PACKAGES:
        package = importlib.import_module(name)
        found = Path(str(package.__file__)).resolve()
        if not found.is_relative_to(tree.resolve()):
            raise ImportError(f"MEMTRANS_BENCH_TREE is {tree}, but {name} is imported from {found.parent}")
    if tree.resolve() == TODAY:
        return
    # before the finder of an editable installation, which would give a module of the tree that is installed
    sys.meta_path.insert(sys.meta_path.index(importlib.machinery.PathFinder) + 1, Elsewhere())
    for room in (TODAY / "memtrans").iterdir():
        module = tree / "memtrans" / f"{room.name}.py"
        if room.is_dir() and module.exists():  # a room today, a file there: let imports look inside
            importlib.import_module(f"memtrans.{room.name}").__path__ = []


class Elsewhere:
    """Finds modules of today's tree that the other one does not have."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        place = TODAY.joinpath(*name.split("."))
        if name.partition(".")[0] not in PACKAGES or not (place.is_dir() or place.with_suffix(".py").exists()):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return Moved(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class Moved(ModuleType):
    """In place of a module: its names come from wherever the tree defines them."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        package = importlib.import_module(self.__name__.partition(".")[0])
        names = [module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
        modules = [vars(importlib.import_module(module)) for module in names if not module.endswith("__main__")]
        found = {id(module[name]): module[name] for module in modules if name in module}
        if len(found) != 1:
            raise AttributeError(
                f"{self.__name__}.{name}: the other tree has {len(found)} things of this name, not one"
            )
        return next(iter(found.values()))
