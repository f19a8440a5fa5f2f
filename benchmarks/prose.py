"""Prose that is no code: the manuals of Debian packages, each directory a document, for `tokenize` and `train --data`.

    apt-get download linux-doc-6.1 perl-doc anarchism python3.11-doc debian-handbook
    python benchmarks/prose.py *.deb prose.zip

Files that were written by hand are taken (Markdown, reStructuredText, POD, plain text), and pages of HTML, as their
text, of a package that has no others. Of files with the same text the first one is taken. The same packages always give
the same documents.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html.parser
import io
import subprocess
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

WRITTEN = (".md", ".rst", ".txt", ".pod")
PAGE = ".html"
BLOCKS = {"p", "div", "li", "br", "tr", "td", "dt", "dd", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "title"}
NOT_PROSE = {"changelog", "copyright", "robots.txt", "objects.txt"}
SHORTEST_FILE = 1000  # bytes; what is shorter is a list of names or links


def main() -> None:
    """Reads packages, writes an archive with a member for each document, and says how much it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", type=Path, help="Debian packages, .deb")
    parser.add_argument("out", help="the zip archive to write")
    options = parser.parse_args()
    texts = documents(sorted(options.packages))
    with zipfile.ZipFile(options.out, "w") as out:
        for name, text in sorted(texts.items()):
            entry = zipfile.ZipInfo(name.replace("/", "_") + ".txt")  # dated 1980: the same bytes every time
            out.writestr(entry, text, zipfile.ZIP_DEFLATED)
    sizes = sorted(map(len, texts.values()))
    print(f"{len(sizes)} documents, {sum(sizes):,} bytes, the median {sizes[len(sizes) // 2]:,}")


def documents(packages: list[Path]) -> dict[str, bytes]:
    """The prose of each directory, its files one after the other in the order of their names."""
    found: dict[str, list[bytes]] = defaultdict(list)
    seen = set()
    for package in packages:
        for path, text in prose(dict(files(package))):
            digest = hashlib.sha256(text).digest()
            if digest not in seen and len(text) >= SHORTEST_FILE:
                seen.add(digest)
                found[str(path.parent)].append(text)
    return {directory: b"".join(texts) for directory, texts in found.items()}


def files(package: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """The regular files of a package, unpacked where they are compressed."""
    archive = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None and path.suffix == ".gz":
                yield path.with_suffix(""), gzip.decompress(content.read())
            elif content is not None:
                yield path, content.read()


def prose(found: dict[PurePosixPath, bytes]) -> Iterator[tuple[PurePosixPath, bytes]]:
    """What was written by hand, in path order; the text of pages where nothing was."""
    taken = {path: text for path, text in found.items() if path.stem not in NOT_PROSE and path.name not in NOT_PROSE}
    written = [path for path in taken if path.suffix in WRITTEN]
    pages = [path for path in taken if path.suffix == PAGE]
    for path in sorted(written or pages):
        yield path, taken[path] if written else text_of(taken[path])


def text_of(page: bytes) -> bytes:
    r"""What a page of HTML says.

    >>> text_of(b"<p>One &amp; <b>two</b></p><script>no</script><p>three</p>")
    b'One & two\nthree'
    """
    reader = _Reader()
    reader.feed(page.decode(errors="replace"))
    lines = (line.strip() for line in "".join(reader.parts).splitlines())
    return "\n".join(line for line in lines if line).encode()


class _Reader(html.parser.HTMLParser):
    """Keeps the text of a page but for its scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in ("script", "style")
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


if __name__ == "__main__":
    main()
