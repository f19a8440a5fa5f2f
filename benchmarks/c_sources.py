"""Long documents of C: each directory of a source tree becomes one document of a zip archive, for `train --data`.

    python benchmarks/c_sources.py linux-source-6.1.tar.xz c-sources.zip --bytes 330000000

The archive is Debian's `linux-source` package (/usr/src/linux-source-6.1.tar.xz in it). Directories are taken in an
order that depends on their names alone, so the same archive always gives the same documents.
"""

from __future__ import annotations

import argparse
import hashlib
import tarfile
import zipfile
from collections import defaultdict
from pathlib import PurePosixPath

SUFFIXES = {".c", ".h", ".S"}
LARGEST_FILE = 1_000_000  # bytes; what is larger was generated
SHORTEST_DOCUMENT = 65_536  # bytes


def directories(archive: str) -> dict[str, bytes]:
    """The sources of each directory, its files one after the other in the order of their names."""
    files: dict[str, list[tuple[str, bytes]]] = defaultdict(list)
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if member.isfile() and path.suffix in SUFFIXES and member.size <= LARGEST_FILE:
                content = tar.extractfile(member)
                assert content is not None
                files[str(path.parent)].append((path.name, content.read()))
    return {directory: b"".join(text for _, text in sorted(members)) for directory, members in files.items()}


def chosen(found: dict[str, bytes], size: int) -> dict[str, bytes]:
    """Long ones among the documents, `size` bytes of them or a little more."""
    long = [name for name, text in found.items() if len(text) >= SHORTEST_DOCUMENT]
    taken: dict[str, bytes] = {}
    for name in sorted(long, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if sum(map(len, taken.values())) < size:
            taken[name] = found[name]
    return dict(sorted(taken.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", help="a source tree as a tar archive, compressed or not")
    parser.add_argument("out", help="the zip archive to write")
    parser.add_argument("--bytes", type=int, default=330_000_000, help="size of all documents (330,000,000)")
    options = parser.parse_args()
    documents = chosen(directories(options.archive), options.bytes)
    with zipfile.ZipFile(options.out, "w", zipfile.ZIP_LZMA) as out:
        for name, text in documents.items():
            entry = zipfile.ZipInfo(name.replace("/", "_") + ".txt")  # dated 1980: the same bytes every time
            out.writestr(entry, text, zipfile.ZIP_LZMA)
    sizes = sorted(map(len, documents.values()))
    print(f"{len(sizes)} documents, {sum(sizes):,} bytes, the median {sizes[len(sizes) // 2]:,}")


if __name__ == "__main__":
    main()
