"""The record of a run is whole lines, and goes back to a checkpoint."""

from __future__ import annotations

import pytest

from memtrans.training.metrics import Metrics
from memtrans.training.plot import plot_metrics


def lines_of(*steps: int) -> list[dict]:
    return [{"step": step, "bits_per_byte": 8.0 / step} for step in steps]


def test_lines_come_back_in_order(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    assert metrics.read() == []
    for line in lines_of(1, 2, 3):
        metrics.append(line)
    assert Metrics(tmp_path / "metrics.jsonl").read() == lines_of(1, 2, 3)


def test_truncation_keeps_what_the_checkpoint_knew_and_drops_the_evaluation_that_is_made_again(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    evaluations = [{"step": step, "eval_bits_per_byte": 5.0} for step in (2, 4)]
    for line in [*lines_of(1, 2), evaluations[0], *lines_of(3, 4), evaluations[1], *lines_of(5)]:
        metrics.append(line)
    metrics.truncate(4, evaluates=False)
    assert metrics.read() == [*lines_of(1, 2), evaluations[0], *lines_of(3, 4), evaluations[1]]
    metrics.truncate(4, evaluates=True)
    assert metrics.read() == [*lines_of(1, 2), evaluations[0], *lines_of(3, 4)]
    metrics.append(lines_of(5)[0])
    assert metrics.read()[-1] == lines_of(5)[0]


def test_a_line_that_a_kill_cut_off_is_no_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.append(lines_of(1)[0])
    with path.open("a") as file:
        file.write('{"step": 2, "bi')
    assert metrics.read() == lines_of(1)
    metrics.truncate(2, evaluates=False)
    assert path.read_text().count("\n") == 1


@pytest.mark.parametrize("line", ["5", "{}", "step,loss", '{"step": "2"}'])
def test_a_whole_line_that_is_no_report_is_an_error_that_names_it(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl must hold a JSON object with a step in .* in 2"):
        Metrics(path).read()


def test_the_curves_become_a_picture_with_and_without_evaluations_and_answers(tmp_path):
    evaluation = {"step": 2, "eval_bits_per_byte": 5.0, "eval_bits_per_byte_without_memory": 6.0}
    answers = {"recall_accuracy": 0.5, "recall_accuracy_without_memory": 0.04, "recall_chance": 0.04}
    pictures, widths = set(), []
    for number, lines in enumerate(([], lines_of(1, 2), [*lines_of(1), evaluation], [{**evaluation, **answers}])):
        path = tmp_path / f"{number}.png"
        plot_metrics(lines, path)
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        pictures.add(content)
        widths.append(int.from_bytes(content[16:20], "big"))
    assert len(pictures) == 4
    assert widths[3] > widths[2] == widths[1], "the answers have a panel of their own"
