"""Plain lines, and a Ctrl-C that leaves nothing half done."""

from __future__ import annotations

import os
import signal

import pytest

from memtrans.progress import Interruption, Progress


def test_a_report_is_a_plain_line_where_there_is_no_terminal(capsys):
    progress = Progress(20, 0, plain=False)
    progress.step()
    progress.report({"step": 10, "bits_per_byte": 2.5, "tokens_per_second": 12345.6})
    progress.close()
    assert capsys.readouterr().out == "step 10/20: 2.500 bits per byte, 12,346 tokens/s\n"


def test_a_bar_on_a_terminal_shows_steps_bits_per_byte_and_speed(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = Progress(20, 9, plain=False)
    progress.step()
    progress.report({"step": 10, "bits_per_byte": 2.5, "tokens_per_second": 12345.6})
    progress.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "10/20" in captured.err
    assert "2.500 bits per byte, 12,346 tokens/s" in captured.err


def test_plain_wins_over_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = Progress(20, 0, plain=True)
    progress.say("hello")
    progress.close()
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("hello\n", "")


def test_the_first_ctrl_c_waits_for_a_check_and_the_second_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        interruption.check()
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.heard()
        with pytest.raises(KeyboardInterrupt):
            interruption.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
