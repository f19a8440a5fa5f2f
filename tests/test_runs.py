"""The scripts in runs/: their options exist, they go on where they were, and their prose is what was written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest

from memtrans.cli.parser import build_parser, given_settings
from memtrans.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path for path in (ROOT / "runs").glob("*.sh") if path.name != "common.sh")
# In the place of what needs packages and hours.
STAND_IN = r"""
c_sources() { echo texts; }
prose() { echo texts; }
store() { echo "$2"; }
piece() { [ -n "${STOPS:-}" ] && return 124; echo "train --out $*" >&2; }
evaluated() { echo '{}' > "$RESULTS/$1.json"; }
"""


def called(script: Path, tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script with the functions that work replaced; what it would train goes to standard error."""
    runs = tmp_path / "runs"
    runs.mkdir(exist_ok=True)
    shutil.copy(script, runs)
    (runs / "common.sh").write_text((ROOT / "runs" / "common.sh").read_text() + STAND_IN)
    environment = {**os.environ, "PYTHON": sys.executable, "MACHINE": "none", **variables}
    return subprocess.run(["bash", runs / script.name], capture_output=True, text=True, env=environment, check=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="a script of bash")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_trains_with_options_that_exist_and_does_nothing_twice(script, tmp_path):
    first = called(script, tmp_path)
    commands = first.stderr.splitlines()
    assert commands and all(line.startswith("train ") for line in commands), first.stderr
    for command in commands:
        options = build_parser().parse_args(command.split())
        PRESETS[options.preset].from_json({**PRESETS[options.preset].to_json(), **given_settings(options)})
    assert len(commands) == len(set(commands)) and "all is done" in first.stdout
    again = called(script, tmp_path)
    assert (again.stderr, again.stdout) == ("", first.stdout)


@pytest.mark.skipif(shutil.which("bash") is None, reason="a script of bash")
def test_what_has_not_ended_is_told(tmp_path):
    stopped = called(ROOT / "runs" / "late.sh", tmp_path, STOPS="yes")
    assert "4 runs have not ended: call this again" in stopped.stdout
    assert not list((tmp_path / "benchmarks").rglob("*.json"))


def test_prose_is_what_was_written_by_hand_else_the_text_of_pages():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from prose import prose, text_of
    finally:
        sys.path.pop(0)
    page = b"<html><title>T</title><p>One &amp; <b>two</b></p><script>no</script><p>three</p></html>"
    assert text_of(page) == b"T\nOne & two\nthree"
    paths = {PurePosixPath(name): name.encode() for name in ("a/b.rst", "a/c.html", "a/changelog", "a/d.png", "a/a.md")}
    assert [path.name for path, _ in prose(paths)] == ["a.md", "b.rst"]
    assert list(prose({PurePosixPath("c.html"): page})) == [(PurePosixPath("c.html"), text_of(page))]


def test_a_calibration_reads_nothing_that_is_held_out():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from hf_texts import calibration, held_out
    finally:
        sys.path.pop(0)
    faq = {name: f"[{name}]" for name in ("secA1.md", "secB2.md", "secC1.md", "secD1.md", "secH3.md")}
    manuals = {name: f"[{name}]" for name in ("perl.pod", "perlfunc.pod", "perlmod.pod", "perlop.pod", "perlvar.pod")}
    held = held_out(faq, {"a.html": "[a.html]"}, manuals)
    read = calibration(faq, manuals)
    assert read.split() == ["[secC1.md]", "[perl.pod]", "[perlfunc.pod]", "[secD1.md]", "[perlmod.pod]"]
    assert [text.split() for text in held.values()] == [
        ["[secA1.md]", "[secB2.md]"], ["[secH3.md]"], ["[perlop.pod]", "[perlvar.pod]"], ["[a.html]"],
    ]  # fmt: skip


def test_the_presets_of_the_paper_that_the_script_names_exist():
    text = (ROOT / "runs" / "paper.sh").read_text()
    rows = re.search(r"for row in (.*); do", text)[1].split()
    assert {f"paper-{row}" for row in rows} <= set(PRESETS)
