"""What the command line says before anything runs: help, presets, settings from files, completion, `info`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from memtrans import __version__
from memtrans.cli.main import main
from memtrans.cli.parser import build_parser
from memtrans.cli.settings_file import read_settings, written
from memtrans.cli.train import _given, _settings
from memtrans.presets import PRESETS
from memtrans.training.settings import Settings
from memtrans_kernels import native


def text_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that answers at once prints."""
    with contextlib.suppress(SystemExit):
        assert main(arguments) == 0
    return capsys.readouterr().out


def test_help_needs_no_pytorch() -> None:
    says = "build_parser().format_help(); print('torch' in sys.modules)"
    script = f"import sys; from memtrans.cli.parser import build_parser; {says}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_help_shows_the_default_of_every_number(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(text_of(["train", "--help"], capsys).split())
    for field in dataclasses.fields(PRESETS["demo"]):
        value = getattr(PRESETS["demo"], field.name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert f"{' '.join(field.metadata['help'].split())} ({value})" in text, field.name


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert text_of(["--version"], capsys) == f"memtrans {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [["train", "--preset", "dmeo"], ["presets", "dmeo"], ["nothing"], ["train", "--no"], ["eval", "--out", ""]],
)
def test_what_is_mistyped_is_told_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("memtrans")


@pytest.mark.parametrize("option", [["--data", "none.txt"], ["--config", "none.toml"]])
def test_a_missing_file_is_told_in_one_line(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *option]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no such file" in line.lower()
    assert option[1] in line


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_that_was_printed_is_read_again(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "preset.toml"
    file.write_text(text_of(["presets", name], capsys), encoding="utf-8")
    present = {key: value for key, value in dataclasses.asdict(PRESETS[name]).items() if value is not None}
    assert read_settings(file) == (name, present)
    assert settings_of("--config", str(file)) == PRESETS[name]


def settings_of(*arguments: str) -> Settings:
    """Those of a new run."""
    return _settings(*_given(build_parser().parse_args(["train", *arguments])), None)


def test_options_override_the_file_and_the_file_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"steps": 7, "head-width": 64, "memory_layers": [1, 2]}))
    expected = dataclasses.replace(PRESETS["code"], steps=9, head_width=64, memory_layers=(1, 2))
    assert settings_of("--preset", "code", "--config", str(file), "--steps", "9") == expected


def test_a_file_may_name_a_preset_and_the_command_line_another(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"preset": "recall", "steps": 7}))
    assert settings_of("--config", str(file)) == dataclasses.replace(PRESETS["recall"], steps=7)
    assert settings_of("--config", str(file), "--preset", "code") == dataclasses.replace(PRESETS["code"], steps=7)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "steps: 1", r"--config must end in .toml or .json, got .*a.yaml"),
        ("a.toml", "steps: 1", "is no TOML: "),
        ("a.json", "{", "is no JSON: "),
        ("a.json", "[1]", "must hold names with values, got list"),
        ("a.toml", "step = 1", "has step, which is no setting"),
        ("a.toml", 'preset = "dmeo"', "must name one of code, demo, .* as its preset, got 'dmeo'"),
        ("a.json", '{"preset": [1]}', r"must name one of code, demo, .* as its preset, got \[1\]"),
    ],
)
def test_a_file_that_will_not_do_is_an_error(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_settings(tmp_path / name)


def test_a_setting_of_another_type_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.toml").write_text('steps = "many"\n')
    assert main(["train", "--config", str(tmp_path / "a.toml")]) == 2
    assert "steps must be" in capsys.readouterr().err


def test_settings_without_a_value_are_left_out() -> None:
    assert "# memory_heads is not set" in written("demo")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_the_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = text_of(["completion", shell], capsys)
    assert "--memory-layers" in text
    assert "completion" in text


def test_completion_without_shtab_names_what_brings_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'memtrans[completion]'" in capsys.readouterr().err


def test_info_begins_with_the_verdicts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda module: False)
    monkeypatch.setattr(
        native, "verdict", lambda module: {"cpu": "not built: no compiler", "cuda": "built, loaded"}[module]
    )
    lines = text_of(["info"], capsys).splitlines()
    assert lines[0].split(maxsplit=1) == ["cpu", "not built: no compiler"]
    assert lines[1].split(maxsplit=1) == ["cuda", "built, loaded"]
    assert lines[2].startswith("mend ")


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(text_of(["info", "--json"], capsys))
    assert found["extension"] == {module: native.verdict(module) for module in ("cpu", "cuda")}
    assert found["versions"]["memtrans"] == __version__
    assert {"operator", "backend", "device", "live", "reason"} == found["backends"][0].keys()
