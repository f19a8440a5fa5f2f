"""setuptools' commands: the extension's modules one by one, and a wheel whose name says whether it holds them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from setuptools import Command, Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

from building import common, cuda, faiss
from building.common import HOST_FLAGS, ROOT, Skipped, switched_on

BuildExtension = build_ext if common.torch_missing else common.cpp_extension.BuildExtension


def cpu_module(name: str) -> Extension:
    common.require_torch_and_compiler()
    return common.cpp_extension.CppExtension(
        name,
        common.sources("*.cpp", "cpu/*.cpp"),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": HOST_FLAGS},
        extra_link_args=["-Wl,-s"] if sys.platform == "linux" else [],
        py_limited_api=True,
    )


MODULES: dict[str, Callable[[str], Extension]] = {
    "cpu": cpu_module,
    "cuda": cuda.cuda_module,
    "faiss": faiss.faiss_module,
}
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
            try:
                self.build_module(extension)
            except Exception as error:
                self.give_up(extension, error)
        self.extensions = modules

    def build_module(self, extension: Extension) -> None:
        if extension.name in obstacles:
            raise obstacles[extension.name]
        if isinstance(extension, cuda.CudaExtension):
            target = Path(self.get_ext_fullpath(extension.name))
            cuda.build(extension.home, target, Path(self.build_temp).resolve() / "cuda")
            return
        self.extensions = [extension]
        super().build_extensions()

    def give_up(self, extension: Extension, error: Exception) -> None:
        name = extension.name
        if switched_on("MEMTRANS_FORCE_BUILD") and not isinstance(error, Skipped):
            raise SystemExit(f"MEMTRANS_FORCE_BUILD is set and {name} could not be built: {error}") from error
        self.reasons[name] = str(error) if isinstance(error, Skipped) else f"it could not be built: {error}"
        extension.optional = True  # only now: setuptools would have passed over the error in silence
        Path(self.get_ext_fullpath(name)).unlink(missing_ok=True)  # in the build folder, where an earlier one may be

    def leave_note(self, name: str) -> None:
        """Says beside the package why a module was not built; a library that an editable tree has stays in use."""
        library = Path(self.get_ext_fullpath(name))
        note = library.with_name(f"{name.rpartition('.')[2]}.txt")
        note.unlink(missing_ok=True)
        if name not in self.reasons:
            return
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(self.reasons[name] + "\n", encoding="utf-8")
        kept = f"; {library.name} of an earlier build stays" if library.exists() else ""
        print(f"WARNING: memtrans goes without {name}: {self.reasons[name]}{kept}", file=sys.stderr)


class Wheel(bdist_wheel):
    """A wheel without the extension is `py3-none-any`, so that no cache mistakes one for the other."""

    def run(self) -> None:
        build = self.get_finalized_command("build")
        for package in Path(build.build_lib).glob("memtrans*"):  # modules that were moved since would be packed too
            shutil.rmtree(package)
        self.run_command("build")
        if not list(Path(build.build_lib).glob("memtrans_kernels/_native_*.so")):
            self.distribution.ext_modules = None
            self.root_is_pure, self.py_limited_api = True, False
        super().run()

    def reinitialize_command(self, command: str, reinit_subcommands: bool = False) -> Command:
        """`build_ext` has run; forgotten, it would build everything a second time."""
        if command == "build_ext":
            return self.get_finalized_command(command)
        return super().reinitialize_command(command, reinit_subcommands)
