"""`make test-install`: every way to install, each in a fresh environment, and the table in CONTRIBUTING.md of them.

    python tests/install/paths.py            all of them
    python tests/install/paths.py plain uv   those two

A line of the table is written as soon as its way has ended, so that what was made stays. PyTorch comes by constraint,
so that a machine without a GPU gets the build without CUDA. Times hold what the installer does after its downloads,
which its cache holds from the first way on; beside other work the time of the processors is the fairer one.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
CONSTRAINTS = REPOSITORY / "constraints.txt"
BEGIN, END = "<!-- table: installing -->", "<!-- end of table -->"
HEADER = ["| path | result | time | of processors | `info` of the CPU module |", "| --- | --- | --- | --- | --- |"]
BUILD_TOOLS = ("torch", "numpy", "ninja", "setuptools>=77", "wheel")


class Place(NamedTuple):
    """A fresh environment, and a clone of this commit to install from."""

    folder: Path
    source: Path

    @property
    def python(self) -> Path:
        return self.folder / "environment" / "bin" / "python"

    def run(self, *command: str | Path, **environment: str) -> None:
        pinned = {"PIP_CONSTRAINT": str(CONSTRAINTS), "PIP_BUILD_CONSTRAINT": str(CONSTRAINTS)}
        variables = inherited() | pinned | environment
        done = subprocess.run(command, cwd=self.folder, env=variables, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError((done.stdout + done.stderr).strip()[-1500:])

    def info(self) -> str:
        """What `memtrans info` says of the CPU module."""
        command = (self.python, "-m", "memtrans", "info", "--json")
        done = subprocess.run(command, cwd="/", env=inherited(), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-1500:])
        return json.loads(done.stdout)["extension"]["cpu"]

    def files(self) -> set[Path]:
        """Everything in the environment."""
        return set((self.folder / "environment").rglob("*"))

    def pip(self, *arguments: str | Path, **environment: str) -> None:
        self.run(self.python, "-m", "pip", "--disable-pip-version-check", "install", *arguments, **environment)

    def with_build_tools(self) -> None:
        self.pip(*BUILD_TOOLS)


def inherited() -> dict[str, str]:
    """The variables of this process that tell neither a build nor an import what to do."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MEMTRANS_", "PYTHONPATH"))}


def plain(place: Place) -> None:
    place.pip(place.source)


def without_isolation(place: Place) -> None:
    place.with_build_tools()
    place.pip("--no-build-isolation", place.source)


def editable_twice(place: Place) -> None:
    """The second time without a compiler: the library of the first stays."""
    place.with_build_tools()
    place.pip("--no-build-isolation", "--editable", place.source)
    place.pip("--no-build-isolation", "--editable", place.source, CXX="/nowhere/c++")


def git_address(place: Place) -> None:
    place.pip(f"git+{place.source.as_uri()}")


def sdist(place: Place) -> None:
    place.with_build_tools()
    place.pip("build")
    place.run(place.python, "-m", "build", "--sdist", "--no-isolation", "--outdir", place.folder / "dist", place.source)
    place.pip(*(place.folder / "dist").iterdir())


def wheel(place: Place) -> None:
    place.with_build_tools()
    command = (place.python, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    place.run(*command, "--wheel-dir", place.folder / "dist", place.source)
    place.pip(*(place.folder / "dist").iterdir())


def uv(place: Place) -> None:
    place.pip("uv")
    command = (place.python, "-m", "uv", "pip", "install", "--python", place.python)
    pinned = ("--constraint", CONSTRAINTS, "--build-constraint", CONSTRAINTS)
    place.run(*command, *pinned, *uv_links(), place.source)


def uv_sync(place: Place) -> None:
    """uv takes constraints of a project from pyproject.toml alone."""
    place.pip("uv")
    file = place.source / "pyproject.toml"
    pinned = json.dumps(CONSTRAINTS.read_text(encoding="utf-8").splitlines()[-1:])
    more = f"[tool.uv]\nconstraint-dependencies = {pinned}"
    file.write_text(file.read_text(encoding="utf-8").replace("[tool.uv]", more), encoding="utf-8")
    command = (place.python, "-m", "uv", "sync", "--project", place.source, *uv_links())
    place.run(*command, UV_PROJECT_ENVIRONMENT=str(place.folder / "environment"))


def uv_links() -> tuple[str, ...]:
    """uv's option for what pip is told by a variable."""
    links = os.environ.get("PIP_FIND_LINKS")
    return ("--find-links", links) if links else ()


def no_compiler(place: Place) -> None:
    place.with_build_tools()
    place.pip("--no-build-isolation", place.source, CXX="/nowhere/c++", CC="/nowhere/cc")


def no_network(place: Place) -> None:
    """Everything that it needs is there already."""
    place.with_build_tools()
    place.pip("safetensors")
    place.pip("--no-build-isolation", "--no-index", place.source, PIP_NO_INDEX="1", PIP_FIND_LINKS="")


def read_only(place: Place) -> None:
    """Nothing is written beside the package when it is used by somebody who may not."""
    place.pip(place.source)
    for path in place.files():
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & ~0o222)


def skip_build(place: Place) -> None:
    place.with_build_tools()
    place.pip("--no-build-isolation", place.source, MEMTRANS_SKIP_BUILD="1")


WAYS: dict[str, tuple[str, Callable[[Place], None]]] = {
    "plain": ("`pip install .`", plain),
    "without-isolation": ("`pip install --no-build-isolation .`", without_isolation),
    "editable-twice": ("`pip install -e .`, then again without a compiler", editable_twice),
    "git": ("`pip install git+file://...`", git_address),
    "sdist": ("`pip install` an sdist", sdist),
    "wheel": ("`pip install` a wheel", wheel),
    "uv": ("`uv pip install .`", uv),
    "uv-sync": ("`uv sync`", uv_sync),
    "no-compiler": ("without a compiler", no_compiler),
    "no-network": ("`--no-build-isolation`, without a network", no_network),
    "read-only": ("used in an environment that is read-only", read_only),
    "umlauts": ("from `Bücher und Übungen/`", plain),
    "skip-build": ("`MEMTRANS_SKIP_BUILD=1`", skip_build),
}


def try_way(name: str) -> str:
    """Installs in one way and returns its line of the table."""
    title, install = WAYS[name]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        place = Place(Path(folder), Path(folder) / ("Bücher und Übungen" if name == "umlauts" else "source"))
        subprocess.run(["git", "clone", "--quiet", REPOSITORY, place.source], check=True)
        subprocess.run([sys.executable, "-m", "venv", place.folder / "environment"], check=True)
        begin, processors = time.monotonic(), processor_seconds()
        try:
            install(place)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return f"| {title} | failed | – | – | – |"
        times = f"{time.monotonic() - begin:.0f} s | {processor_seconds() - processors:.0f} s"
        before = place.files()
        try:
            says = place.info()
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return f"| {title} | installed, does not work | {times} | – |"
        if more := place.files() - before:
            print(*sorted(more), sep="\n", file=sys.stderr)
            return f"| {title} | installed, writes beside itself | {times} | {says} |"
        return f"| {title} | installed | {times} | {says} |"


def processor_seconds() -> float:
    """Of everything that this process has started and that has ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def put(line: str) -> None:
    """Writes one line of the table, in the place of that way's former one."""
    file = REPOSITORY / "CONTRIBUTING.md"
    before, _, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    table, _, after = rest.partition(END)
    lines = {title: former for former in table.splitlines() if (title := title_of(former))} | {title_of(line): line}
    ordered = [lines[title] for title, _ in WAYS.values() if title in lines]
    file.write_text("\n".join([before + BEGIN, *HEADER, *ordered, END + after]), encoding="utf-8")


def title_of(line: str) -> str:
    return line.split(" | ")[0].removeprefix("| ")


def main() -> int:
    names = sys.argv[1:] or list(WAYS)
    if unknown := [name for name in names if name not in WAYS]:
        print(f"no such way: {', '.join(unknown)}; there are {', '.join(WAYS)}", file=sys.stderr)
        return 2
    lines = []
    for name in names:
        lines.append(try_way(name))
        print(lines[-1], flush=True)
        put(lines[-1])
    return int(not all("| installed |" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
