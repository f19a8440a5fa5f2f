"""How many stations a segment makes on its way through the model, and that nothing is asked twice."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
from helpers.scripts import BENCHMARKS

pytestmark = pytest.mark.cpu

MOST_STATIONS = 10
SEGMENTS = 5  # of a training step
GIVEN = ("x", "lengths", "xl_length", "xl_memories[0]", "xl_memories[1]", "knn_memories[0]")


@pytest.fixture(scope="module")
def walks() -> dict[str, dict[str, Any]]:
    """What `make stations` counts, in a process of its own: other tests may be watched too."""
    script, environment = BENCHMARKS / "stations.py", {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    printed = subprocess.run([sys.executable, str(script), "--json"], env=environment, capture_output=True, check=True)
    return json.loads(printed.stdout)


def of_model(doors: dict[str, int]) -> dict[str, int]:
    """Without the arguments of the kernels, which have a dot in their names."""
    return {name: count for name, count in doors.items() if "." not in name}


def test_a_segment_makes_few_stations_in_the_model_layer(walks: dict[str, dict[str, Any]]) -> None:
    stations = walks["forward pass"]["stations"]
    assert 1 < len(stations) <= MOST_STATIONS, stations


def test_every_argument_of_the_forward_pass_is_checked_and_checked_once(walks: dict[str, dict[str, Any]]) -> None:
    assert of_model(walks["forward pass"]["doors"]) == dict.fromkeys(GIVEN, 1)


def test_a_call_of_a_kernel_checks_each_of_its_arguments_once(walks: dict[str, dict[str, Any]]) -> None:
    assert walks["forward pass"]["most"]
    assert not {name: count for name, count in walks["forward pass"]["most"].items() if count > 1}


def test_a_training_step_checks_each_argument_of_a_segment_once(walks: dict[str, dict[str, Any]]) -> None:
    doors = of_model(walks["training step"]["doors"])
    assert doors["x"] == SEGMENTS
    assert not {name: count for name, count in doors.items() if count > SEGMENTS}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_eager_training_step_launches_few_kernels() -> None:
    """857 of PyTorch at 48195b5: what is cast, copied or made anew in each layer shows here."""
    pytest.importorskip("triton")
    command = [sys.executable, str(BENCHMARKS / "host_time.py"), "4"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    of_torch, of_triton = map(int, re.search(r"(\d+) kernels of PyTorch and (\d+) of Triton", printed).groups())
    assert of_triton == 67  # 43 before biases were laid out for the tiles, and parts of gradients added up
    assert of_torch <= 465
