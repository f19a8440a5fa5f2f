"""Settings in a file: TOML or JSON, read for `train --config` and written by `presets NAME`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from memtrans.files import MOST_JSON, parse_json, read_file
from memtrans.presets import PRESETS
from memtrans.training.settings import Settings

PRESET = "preset"  # names, in a file, the values that it overrides


def read_settings(file: Path) -> tuple[str | None, dict[str, Any]]:
    """The preset that a file names, if any, and its settings by name; dashes in a name are as good as underscores.

    Raises:
        ValueError: neither .toml nor .json, not the language that its name promises, a name that is no setting, or a
        preset that does not exist.
        OSError: it cannot be read.
    """
    if file.suffix not in (".toml", ".json"):
        raise ValueError(f"--config must end in .toml or .json, got {file}")
    content = read_file("config", file, MOST_JSON)
    try:
        values = parse_json(content) if file.suffix == ".json" else _toml(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # of both languages, of another encoding, or nested without end
        raise ValueError(f"--config {file} is no {file.suffix[1:].upper()}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {file} must hold names with values, got {type(values).__name__}")
    names = {field.name for field in dataclasses.fields(Settings)}
    values = {name.replace("-", "_"): value for name, value in values.items()}
    preset = values.pop(PRESET, None)
    if preset is not None and preset not in list(PRESETS):
        raise ValueError(f"--config {file} must name one of {', '.join(sorted(PRESETS))} as its preset, got {preset!r}")
    if unknown := sorted(values.keys() - names):
        raise ValueError(f"--config {file} has {unknown[0]}, which is no setting: `presets demo` prints all of them")
    return preset, {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def written(preset: str) -> str:
    """A preset's name and settings in TOML, each with what it means.

    What is None is left out, for TOML has no word for it: whoever reads the file takes it from the preset.

    >>> written("demo").splitlines()[6]
    'window_segments = 5  # segments of a window, with --windows'
    """
    settings = PRESETS[preset]
    lines = [f"{PRESET} = {json.dumps(preset)}  # whose values hold for what is not set here"]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        value = list(value) if isinstance(value, tuple) else value
        start = f"# {field.name} is not set" if value is None else f"{field.name} = {json.dumps(value)}"
        lines.append(f"{start}  # {field.metadata['help']}")
    return "\n".join(lines)


def _toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)
