"""The texts of `hf_facts.py`, of Debian packages: four that are held out, and what a calibration reads.

    apt-get download anarchism perl-doc debian-handbook
    python benchmarks/hf_texts.py *.deb texts
    python benchmarks/hf_facts.py --model DIRECTORY --calibration texts/calibration.txt --texts texts/held_out_*.txt

Held out are two parts of an anarchist FAQ, the later half of Perl's manuals by their names, and the whole handbook of
Debian. A calibration reads the rest of the FAQ and of the manuals, in turn, so that every stretch of it has both.
"""

from __future__ import annotations

import argparse
from itertools import zip_longest
from pathlib import Path

from prose import files, prose

HELD_OUT_SECTIONS = {"sections_a_b": ("secA", "secB"), "section_h": ("secH",)}  # of the FAQ
FIRST_HELD_OUT_MANUAL = "perlop"
MANUALS_BESIDE_A_SECTION = 2


def main() -> None:
    """Reads the packages and writes a file a text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs=3, type=Path, help="anarchism, perl-doc and debian-handbook, .deb")
    parser.add_argument("out", type=Path, help="the folder to write to")
    options = parser.parse_args()
    faq, handbook, manuals = (texts(package) for package in sorted(options.packages))
    options.out.mkdir(parents=True, exist_ok=True)
    for name, text in {**held_out(faq, handbook, manuals), "calibration": calibration(faq, manuals)}.items():
        (options.out / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{name}: {len(text):,} characters")


def texts(package: Path) -> dict[str, str]:
    """The prose of a package by the names of its files, in their order."""
    found = {path.name: text.decode("utf-8", "replace") for path, text in prose(dict(files(package)))}
    return dict(sorted(found.items()))


def held_out(faq: dict[str, str], handbook: dict[str, str], manuals: dict[str, str]) -> dict[str, str]:
    """What no calibration reads."""
    parts = {
        f"held_out_{name}": [text for file, text in faq.items() if file.startswith(sections)]
        for name, sections in HELD_OUT_SECTIONS.items()
    }
    parts["held_out_manuals"] = [text for file, text in manuals.items() if file >= FIRST_HELD_OUT_MANUAL]
    parts["held_out_handbook"] = list(handbook.values())
    return {name: "\n\n".join(of) for name, of in parts.items()}


def calibration(faq: dict[str, str], manuals: dict[str, str]) -> str:
    """The rest: a section of the FAQ, some manuals, and so on."""
    out = tuple(section for sections in HELD_OUT_SECTIONS.values() for section in sections)
    sections = [text for file, text in faq.items() if not file.startswith(out)]
    rest = [text for file, text in manuals.items() if file < FIRST_HELD_OUT_MANUAL]
    step = MANUALS_BESIDE_A_SECTION
    beside = ["\n\n".join(rest[place : place + step]) for place in range(0, len(rest), step)]
    return "\n\n".join(text for pair in zip_longest(sections, beside) for text in pair if text)


if __name__ == "__main__":
    main()
