"""How many stations a segment makes on its way through the model, and that nothing is asked twice."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import stations  # noqa: E402

pytestmark = pytest.mark.cpu

MOST_STATIONS = 10
SEGMENTS = 5  # of a training step


@pytest.fixture(scope="module")
def forward_pass() -> stations.Walk:
    return stations.forward_pass()


def test_a_segment_makes_few_stations_in_the_model_layer(forward_pass: stations.Walk) -> None:
    assert len(forward_pass.stations) <= MOST_STATIONS, forward_pass.stations


def test_every_argument_of_the_forward_pass_is_checked_and_checked_once(forward_pass: stations.Walk) -> None:
    of_model = {name: count for name, count in forward_pass.doors.items() if "." not in name}
    given = ("x", "lengths", "xl_length", "xl_memories[0]", "xl_memories[1]", "knn_memories[0]")
    assert of_model == dict.fromkeys(given, 1)


def test_a_training_step_checks_each_argument_of_a_segment_once() -> None:
    step = stations.training_step()
    more = {name for name, count in step.doors.items() if "." not in name and count > SEGMENTS}
    assert step.doors["x"] == SEGMENTS
    assert not more
