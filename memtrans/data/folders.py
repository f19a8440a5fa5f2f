"""The files of a folder that are read: each real file once, whatever links lead to it."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from memtrans.data.store import is_store
from memtrans.locks import LOCK

CHECKPOINT, METRICS = "checkpoint", "metrics.jsonl"  # in the directory of a run
NOTHING = (errno.ENOENT, errno.ELOOP)  # where a link may lead


def files_below(folder: Path) -> list[Path]:
    """Its regular files, and those of all folders in it, in path order; hidden ones are left out.

    So are stores of tokens and directories of runs in it, whose files are no texts.

    What lies in the folder is found where it lies. Links are followed to what is then still missing, the first one to
    it in path order. A link to nothing is none.

    Raises OSError where one of the folders cannot be listed.
    """
    walk = _Walk(str(folder))
    pending = [str(folder)]
    while pending:
        pending = sorted(pending)
        for link in pending:
            walk.follow(link)
        pending, walk.links = walk.links, []
    return sorted(map(Path, walk.files))


class _Walk:
    """What was found so far: files, and links that are still to be followed."""

    def __init__(self, root: str) -> None:
        self._root = root
        self.files: list[str] = []
        self.links: list[str] = []
        self._seen: set[str] = set()  # real paths

    def follow(self, link: str) -> None:
        """Finds what a link leads to, and all that lies below it."""
        real, mode = os.path.realpath(link), _mode(link)
        if stat.S_ISREG(mode):
            self._add(link, real)
        folders = [(link, real)] if stat.S_ISDIR(mode) else []
        while folders:
            path, real = folders.pop()
            if real not in self._seen and (path == self._root or not _is_ours(Path(path))):
                self._seen.add(real)
                folders += self._listed(path, real)

    def _listed(self, path: str, real: str) -> list[tuple[str, str]]:
        """The folders in a folder, with their real paths."""
        folders = []
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink():
                    self.links.append(entry.path)
                elif entry.is_dir(follow_symlinks=False):
                    folders.append((entry.path, os.path.join(real, entry.name)))
                elif entry.is_file(follow_symlinks=False):
                    self._add(entry.path, os.path.join(real, entry.name))
        return folders

    def _add(self, path: str, real: str) -> None:
        if real not in self._seen:
            self._seen.add(real)
            self.files.append(path)


def _is_ours(folder: Path) -> bool:
    """Whether a command wrote what is there: a store of tokens, or a run."""
    is_run = (folder / LOCK).is_file() and any((folder / name).exists() for name in (CHECKPOINT, METRICS))
    return is_run or is_store(folder)


def _mode(path: str) -> int:
    """What is there; 0 where a link leads to nothing."""
    try:
        return os.stat(path).st_mode
    except OSError as error:
        if error.errno in NOTHING:
            return 0
        raise
