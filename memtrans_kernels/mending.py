"""The one command that installs this package again with its extension: that of the installer and place it came from."""

from __future__ import annotations

import json
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname


def mending_command() -> str:
    """What to type where a module of the extension is missing, after what was missing then is there.

    Of a wheel that an installer keeps in its cache, the copy there lacks the extension too, hence `--no-cache-dir`.

    >>> "pip install" in mending_command() or "setup.py" in mending_command()
    True
    """
    try:
        return _command(distribution("memtrans"))
    except PackageNotFoundError:  # a source tree on the path
        return f"cd {_quoted(str(Path(__file__).resolve().parents[1]))} && python setup.py build_ext --inplace"


def _command(installed: Distribution) -> str:
    by_uv = (installed.read_text("INSTALLER") or "").strip() == "uv"
    place = json.loads(installed.read_text("direct_url.json") or "{}")
    again = "--no-cache --reinstall-package memtrans" if by_uv else "--no-cache-dir --force-reinstall --no-deps"
    start = "uv pip install" if by_uv else "pip install"
    if not place:
        return f"{start} {again} memtrans=={installed.version}"
    source = _source(place)
    if place.get("dir_info", {}).get("editable"):
        return f"{start} -e {source}"
    return f"{start} {again} {source}"


def _source(place: dict) -> str:
    """What to name to the installer: a folder, a file, or an address with its version control."""
    url = place["url"]
    if "vcs_info" in place:
        return f"'memtrans @ {place['vcs_info']['vcs']}+{url}@{place['vcs_info']['commit_id']}'"
    path = urlsplit(url)
    return _quoted(url2pathname(path.path)) if path.scheme == "file" else url


def _quoted(path: str) -> str:
    return f'"{path}"' if " " in path else path
