"""`make test-install`: every way to install, each in a fresh environment, and the table in CONTRIBUTING.md of them.

    python tests/install/paths.py            all of them; writes the table
    python tests/install/paths.py plain uv   those two; prints their lines

PyTorch comes by constraint, so that a machine without a GPU gets the build without CUDA. Times hold what the installer
does after its downloads, which its cache holds from the first way on.
"""

from __future__ import annotations

import json
import os
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
VERDICTS = "{m: native.verdict(m) for m in ('cpu', 'cuda')}"
PROBE = f"import json; from memtrans_kernels import native; print(json.dumps({VERDICTS}))"
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
        pinned |= {"UV_CONSTRAINT": str(CONSTRAINTS), "UV_BUILD_CONSTRAINT": str(CONSTRAINTS)}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MEMTRANS_", "PYTHONPATH"))}
        done = subprocess.run(command, cwd=self.folder, env=kept | pinned | environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError((done.stdout + done.stderr).strip()[-1500:])

    def pip(self, *arguments: str | Path, **environment: str) -> None:
        self.run(self.python, "-m", "pip", "--disable-pip-version-check", "install", *arguments, **environment)

    def with_build_tools(self) -> None:
        self.pip(*BUILD_TOOLS)


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
    links = os.environ.get("PIP_FIND_LINKS")
    more = ("--find-links", links) if links else ()
    place.run(place.python, "-m", "uv", "pip", "install", "--python", place.python, *more, place.source)


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
    for path in (place.folder / "environment").rglob("*"):
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
        begin = time.monotonic()
        try:
            install(place)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return f"| {title} | failed | – | – |"
        seconds = time.monotonic() - begin
        done = subprocess.run([place.python, "-c", PROBE], cwd="/", capture_output=True, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return f"| {title} | installed, does not work | {seconds:.0f} s | – |"
        found = json.loads(done.stdout)
        return f"| {title} | installed | {seconds:.0f} s | {found['cpu']} |"


def main() -> int:
    names = sys.argv[1:] or list(WAYS)
    if unknown := [name for name in names if name not in WAYS]:
        print(f"no such way: {', '.join(unknown)}; there are {', '.join(WAYS)}", file=sys.stderr)
        return 2
    lines = ["| path | result | time | `info` of the CPU module |", "| --- | --- | --- | --- |"]
    for name in names:
        lines.append(try_way(name))
        print(lines[-1], flush=True)
    if names == list(WAYS):
        file = REPOSITORY / "CONTRIBUTING.md"
        before, _, rest = file.read_text(encoding="utf-8").partition(BEGIN)
        file.write_text("\n".join([before + BEGIN, *lines, END + rest.partition(END)[2]]), encoding="utf-8")
    return int(any("failed" in line or "does not work" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
