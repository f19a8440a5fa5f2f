"""The scripts in runs/: their options exist, they go on where they were, and their prose is what was written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest
from helpers.scripts import benchmark_script
from helpers.tiny_runs import TINY, written_text

from memtrans.cli.parser import build_parser, given_settings
from memtrans.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path for path in (ROOT / "runs").glob("*.sh") if path.name != "common.sh")
# In the place of what needs packages and hours.
STAND_IN = r"""
c_sources() { echo texts; }
prose() { echo texts; }
store() { echo "$2"; }
pace() { echo 700; }
piece() {
    [ -z "${STOPS:-}" ] || return 143
    [ -z "${FAILS:-}" ] || exit 3
    [ -z "${SAYS:-}" ] || sleep 0.05
    echo "${SAYS:+$CUDA_VISIBLE_DEVICES }train --out $*" >&2
}
evaluated() { echo '{}' > "$RESULTS/$1.json"; }
"""


def called(script: Path, tmp_path: Path, functions: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """The script with the functions that work replaced; what it would train goes to standard error."""
    runs = tmp_path / "runs"
    runs.mkdir(exist_ok=True)
    shutil.copy(script, runs)
    (runs / "common.sh").write_text((ROOT / "runs" / "common.sh").read_text() + STAND_IN + functions)
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
@pytest.mark.parametrize("script", ["late.sh", "five_minutes.sh"])
def test_what_has_not_ended_is_told(script, tmp_path):
    stopped = called(ROOT / "runs" / script, tmp_path, STOPS="yes")
    assert "4 runs have not ended: call this again" in stopped.stdout
    assert not list((tmp_path / "benchmarks").rglob("*.json"))


@pytest.mark.skipif(shutil.which("bash") is None, reason="a script of bash")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_runs_are_spread_over_several_devices(script, tmp_path):
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    alone.mkdir()
    spread.mkdir()
    expected = sorted(called(script, alone).stderr.splitlines())
    done = called(script, spread, DEVICES="0 3", SAYS="yes")
    used, commands = zip(*(line.split(" ", 1) for line in done.stderr.splitlines()), strict=True)
    assert set(used) == {"0", "3"} and sorted(commands) == expected
    assert "all is done" in done.stdout
    assert [path.name for path in sorted(spread.rglob("*.json"))] == [
        path.name for path in sorted(alone.rglob("*.json"))
    ]


@pytest.mark.skipif(shutil.which("bash") is None, reason="a script of bash")
@pytest.mark.parametrize(("devices", "at_once"), [("", "1"), ("0 3", "1"), ("0 0 3 3", "2"), ("3 3 3", "3")])
def test_a_gpu_named_twice_works_on_two_runs_and_says_so(tmp_path, devices, at_once):
    says = 'piece() { sleep 0.1; }\nevaluated() { echo "$CUDA_VISIBLE_DEVICES" "$(at_once)" > "$RESULTS/$1.json"; }\n'
    called(ROOT / "runs" / "late.sh", tmp_path, says, DEVICES=devices, CUDA_VISIBLE_DEVICES="")
    found = [path.read_text().split() for path in tmp_path.rglob("late-*.json")]
    assert len(found) == 4 and {said[-1] for said in found} == {at_once}
    assert sorted(said[0] for said in found if len(said) == 2) == sorted((devices.split() * 4)[:4])


@pytest.mark.skipif(shutil.which("bash") is None, reason="a script of bash")
def test_several_devices_tell_what_has_not_ended_and_what_failed(tmp_path):
    script = ROOT / "runs" / "late.sh"
    assert "4 runs have not ended" in called(script, tmp_path, DEVICES="0 1", STOPS="yes").stdout
    with pytest.raises(subprocess.CalledProcessError) as failed:
        called(script, tmp_path, DEVICES="0 1", FAILS="yes")
    assert failed.value.returncode == 3 and "all is done" not in failed.value.stdout


@pytest.mark.skipif(shutil.which("setsid") is None, reason="a command of Linux")
@pytest.mark.parametrize(
    ("ends", "status", "done"),
    [("exit 0", 0, "ended"), ("exit 143", 0, "goes on"), ("kill -SEGV $$", 139, ""), ("exit 1", 1, "")],
)
def test_a_piece_whose_time_is_over_may_only_have_been_stopped_for_it(tmp_path, ends, status, done):
    """Not have crashed on the way out. What the run started is not told to stop."""
    child = "sleep 2 > /dev/null 2>&1 & child=$!\n"
    run = f"trap 'kill -0 $child && {ends}' TERM\n{child}for i in $(seq 200); do sleep 0.05; done\n"
    python = tmp_path / "python"
    python.write_text("#!/usr/bin/env bash\n" + run)
    python.chmod(0o755)
    (tmp_path / "runs").mkdir()
    shutil.copy(ROOT / "runs" / "common.sh", tmp_path / "runs")
    (tmp_path / "runs" / "some.sh").write_text(
        "source runs/common.sh\nif piece some; then echo ended; else echo goes on; fi"
    )
    environment = {**os.environ, "PYTHON": str(python), "PIECE": "0.4"}
    found = subprocess.run(["bash", "runs/some.sh"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (found.returncode, found.stdout.strip()) == (status, done), found.stderr


@pytest.mark.skipif(not (shutil.which("pkill") and shutil.which("setsid")), reason="they stop the processes")
@pytest.mark.parametrize("command", ["train", "eval"])
@pytest.mark.parametrize("to", [os.kill, os.killpg], ids=["the script", "all its processes"])
@pytest.mark.parametrize(("name", "status"), [("TERM", 143), ("INT", 130)])
def test_what_several_devices_work_on_ends_with_the_script(tmp_path, name, status, to, command):
    """`kill` tells the script alone, a terminal's Ctrl-C and `timeout` all processes of its group."""
    python = tmp_path / "python"
    python.write_text(f'#!/usr/bin/env bash\nif [ "$3" = {command} ]; then echo > $$.pid; exec sleep 50; fi\n')
    python.chmod(0o755)
    for rate in ("1e-3", "5e-4"):
        (tmp_path / "runs" / f"late-0.1-{rate}").mkdir(parents=True)
    shutil.copy(ROOT / "runs" / "late.sh", tmp_path / "runs")
    common = (ROOT / "runs" / "common.sh").read_text()
    (tmp_path / "runs" / "common.sh").write_text(common + "c_sources() { echo texts; }\n")
    environment = {**os.environ, "PYTHON": str(python), "DEVICES": "0 1", "MACHINE": "none"}
    script = subprocess.Popen(
        ["bash", "runs/late.sh"],
        cwd=tmp_path,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    )
    eventually(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    processes = [file.stem for file in tmp_path.glob("*.pid")]
    to(script.pid, getattr(signal, f"SIG{name}"))
    assert script.wait(timeout=20) == status
    eventually(lambda: not any(Path(f"/proc/{process}").exists() for process in processes))
    assert not list((tmp_path / "benchmarks").rglob("*.json"))


def eventually(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(shutil.which("bash") is None, reason="a script of bash")
def test_five_minutes_are_as_many_steps_as_a_short_run_says(tmp_path):
    lines = called(ROOT / "runs" / "five_minutes.sh", tmp_path, RATES="1e-3 5e-4").stderr.splitlines()
    commands = [build_parser().parse_args(line.split()) for line in lines]
    assert [options.steps for options in commands] == [400, 700] * 8
    for short, long in zip(commands[::2], commands[1::2], strict=True):
        assert short.out.name == f"{long.out.name}-pace"
        assert {**given_settings(short), "steps": 700} == given_settings(long)
    runs = {(options.optimizer, options.memory, options.learning_rate) for options in commands}
    assert runs == {
        (name, memory, rate) for name in ("adamw", "muon") for memory in (0, 65536) for rate in (1e-3, 5e-4)
    }


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="a script of bash")
def test_a_run_of_some_seconds_takes_about_so_long(tmp_path):
    """For real: the functions work in a copy of the tree's scripts."""
    for name in ("runs", "benchmarks"):
        (tmp_path / name).mkdir()
    shutil.copy(ROOT / "runs" / "common.sh", tmp_path / "runs")
    shutil.copy(ROOT / "benchmarks" / "pace.py", tmp_path / "benchmarks")
    options = " ".join([*TINY, "--data", written_text(tmp_path), "--log-every", "20"])
    (tmp_path / "runs" / "some.sh").write_text(f"source runs/common.sh\ntimed_figure 4 some {options}\nended\n")
    environment = {**os.environ, "PYTHON": sys.executable, "MACHINE": "none", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "runs/some.sh"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert "all is done" in done.stdout, done.stderr
    written = json.loads((tmp_path / "benchmarks" / "results" / "none" / "text" / "some.json").read_text())
    assert written["result"]["steps"] == int((tmp_path / "runs" / "some.steps").read_text())
    assert 1 < written["seconds"] < 16


def report(step: int, tokens: int, rate: float) -> str:
    return json.dumps({"step": step, "tokens": tokens, "tokens_per_second": rate}) + "\n"


def test_the_pace_is_that_of_later_reports(tmp_path, capsys, monkeypatch):
    """10 steps of 100 tokens: twice 10 s with the compiler, then twice 2 s; an evaluation between does not count."""
    metrics, pace = tmp_path / "metrics.jsonl", benchmark_script("pace")
    evaluation = json.dumps({"step": 20, "tokens": 2000, "eval_bits_per_byte": 2.0}) + "\n"
    metrics.write_text(report(10, 1000, 100) + report(20, 2000, 100) + evaluation)
    with metrics.open("a") as file:
        file.write(report(30, 3000, 500) + report(40, 4000, 500))
    monkeypatch.setattr(sys, "argv", ["pace.py", str(metrics)])
    pace.main()
    monkeypatch.setattr(sys, "argv", ["pace.py", str(metrics), "--seconds", "300"])
    pace.main()
    assert capsys.readouterr().out.split() == ["24.0", "1500"]


def test_the_pace_of_a_run_without_reports_is_refused(tmp_path, capsys, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text("")
    monkeypatch.setattr(sys, "argv", ["pace.py", str(tmp_path / "metrics.jsonl")])
    with pytest.raises(SystemExit, match="2"):
        benchmark_script("pace").main()
    assert "must hold a report of a step" in capsys.readouterr().err


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
    rows = re.search(r"for sizes in (.*?); do", text)[1].split()
    assert {f"paper-{row}" for row in rows} <= set(PRESETS)
