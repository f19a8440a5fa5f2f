"""Plain lines, and signals to stop that leave nothing half done."""

from __future__ import annotations

import io
import os
import signal
import threading

import pytest

from memtrans.training.progress import Progress
from memtrans.training.signals import Interruption, StoppedError


def test_a_report_is_a_plain_line_where_there_is_no_terminal(capsys):
    progress = Progress(20, 0, plain=False)
    progress.step()
    progress.report({"step": 10, "bits_per_byte": 2.5, "tokens_per_second": 12345.6})
    progress.close()
    assert capsys.readouterr().out == "step 10/20: 2.500 bits per byte, 12,346 tokens/s\n"


def test_a_report_says_the_share_of_the_peak_where_that_is_known(capsys):
    progress = Progress(20, 0, plain=True)
    progress.report({"step": 10, "bits_per_byte": 2.5, "tokens_per_second": 12345.6, "peak_share": 0.2137})
    assert capsys.readouterr().out == "step 10/20: 2.500 bits per byte, 12,346 tokens/s, 21.4% of peak FLOP/s\n"


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


@pytest.mark.parametrize("terminal", [False, True])
def test_what_the_terminal_has_no_sign_for_is_said_by_number(monkeypatch, terminal):
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    progress = Progress(20, 0, plain=False)
    progress.say("d\u00e9j\u00e0 \u6771 \udcff")
    progress.close()
    out.flush()
    assert out.buffer.getvalue() == b"d\xe9j\xe0 \\u6771 \\udcff\n"


@pytest.mark.parametrize(
    ("number", "message", "status"), [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)]
)
def test_the_first_signal_waits_for_a_check_and_ctrl_c_after_it_stops_at_once(number, message, status):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interruption() as interruption:
        interruption.check()
        os.kill(os.getpid(), number)
        assert interruption.heard() == number
        with pytest.raises(StoppedError, match=f"^stopped by {message}$") as stopped:
            interruption.check()
        assert stopped.value.status == status
        os.kill(os.getpid(), signal.SIGTERM)  # as where a scheduler and torchrun both send it
        assert interruption.heard() == number
        with pytest.raises(StoppedError, match=r"^stopped by Ctrl-C$"):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_what_several_processes_agree_on_is_believed():
    with Interruption(lambda number: max(number, signal.SIGTERM)) as interruption:
        assert interruption.heard() == signal.SIGTERM


def test_outside_of_the_main_thread_nothing_is_heard():
    handler = signal.getsignal(signal.SIGTERM)
    found = []

    def enter() -> None:
        with Interruption() as interruption:
            found.append((interruption.heard(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(0, handler)]
