"""Progress: bars on a terminal, lines in a log, and nothing after the end of the work."""

import contextlib
import os
import pty
import re
import struct
import sys
import termios
import threading
import time
from fcntl import ioctl
from pathlib import Path

import pytest

from illama import progress
from illama.progress import Activity, say, track
from illama.steps import Steps

INTERVAL = 0.05
COUNTED = re.compile(r"(\d+)/(\d+) img, ([\d.]+) (img/s|s/img), (\d\d:\d\d)\b")


@pytest.fixture
def log(monkeypatch, capsys):
    """A short interval between lines, and a function that returns the lines since its last call."""
    monkeypatch.setattr(progress, "INTERVAL", INTERVAL)
    return lambda: capsys.readouterr().err.splitlines()


def wait_for_thread():
    """Waits for the thread that shows progress to end."""
    for thread in threading.enumerate():
        if thread.name == "progress":
            thread.join(1)
            assert not thread.is_alive()


def test_a_log_gets_a_line_with_all_facts_every_interval(log, capsys):
    start = time.monotonic()
    assert list(track((time.sleep(0.01) or number for number in range(20)), "read", "img")) == list(range(20))
    for _ in track(range(40), "evaluate", "img"):
        time.sleep(0.01)
    seconds = time.monotonic() - start
    text = capsys.readouterr().err
    assert "\r" not in text and text.endswith("\n")
    lines = text.splitlines()
    assert 4 <= len(lines) <= seconds / INTERVAL
    found = [COUNTED.search(line) for line in lines if "evaluate" in line]
    assert len(found) >= 3 and all(found)
    counts = [int(match[1]) for match in found]
    assert counts == sorted(counts) and {match[2] for match in found} == {"40"}
    assert all(1 <= float(match[3]) <= 100 and match[4] == "img/s" for match in found)
    assert all("read" in line and "/" not in line.partition(",")[0] for line in lines[:2])  # the total is not known


def test_short_work_and_hidden_work_give_nothing(log, monkeypatch):
    for _ in track(range(3), "short", "img"):
        pass
    for _ in track(range(2), "hidden", "img", shown=False):
        time.sleep(2 * INTERVAL)
    monkeypatch.setenv("RANK", "1")
    with Activity("another process"):
        time.sleep(2 * INTERVAL)
    assert log() == []


def test_a_long_first_iteration_has_no_rate_yet(log):
    with Activity("train", "img", 1000, 100) as activity:  # resumed at 100
        time.sleep(3 * INTERVAL)
        before = log()
        activity.update(50)
        activity.note = "loss 1.5"
        time.sleep(2 * INTERVAL)
        after = log()
    assert len(before) >= 2 and len(after) >= 1
    assert all("100/1000 img" in line and "/s" not in line and "left" not in line for line in before)
    done, _, rate, unit, left = COUNTED.search(after[0]).groups()
    assert done == "150" and unit == "img/s" and 0 < float(rate) <= 50 / (3 * INTERVAL) and "loss 1.5" in after[0]
    assert int(left[:2]) * 60 + int(left[3:]) == pytest.approx(850 / float(rate), abs=1)
    assert not re.search(r"inf|nan|-\d", "".join(before + after))


def test_more_than_the_total_is_no_negative_time(log):
    with Activity("evaluate", "img", 2) as activity:
        activity.update(5)
        time.sleep(2 * INTERVAL)
    assert COUNTED.search(log()[0])[5] == "00:00"


def test_a_step_says_how_long_it_takes_and_a_loop_inside_speaks_for_it(log, capsys):
    steps = Steps()
    with steps.show("export"):
        time.sleep(2.5 * INTERVAL)
        alone = capsys.readouterr()
        for _ in track(range(5), "outer", "cell"):
            for _ in track(range(5), "inner", "img"):
                time.sleep(INTERVAL / 5)
        inside = log()
    assert "export" in alone.out and "export" in alone.err and "00:00" in alone.err
    assert inside and not any("export" in line for line in inside)
    assert all("/5 cell" in line for line in inside) and any("/5 img" in line for line in inside)
    assert steps.seconds["export"] >= 5 * INTERVAL


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_shown_after_the_end_of_a_step(error, log):
    def work():
        with Steps().show("build"):
            for _ in track(range(3), "loop", "img"):
                time.sleep(2 * INTERVAL)
                raise error

    with pytest.raises(error):
        work()
    wait_for_thread()
    assert len(log()) >= 1
    time.sleep(2 * INTERVAL)
    assert log() == []


def test_a_log_that_cannot_be_written_stops_no_work(log, monkeypatch):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert len(list(track((time.sleep(INTERVAL) for _ in range(3)), "evaluate", "img"))) == 3
        monkeypatch.undo()
        wait_for_thread()
        with contextlib.suppress(OSError):
            full.close()


@contextlib.contextmanager
def terminal(monkeypatch, rows=30, columns=100):
    """The standard streams are a terminal; yields a function that returns what was written since its last call."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    os.set_blocking(ours, False)

    def read():
        parts = []
        with contextlib.suppress(BlockingIOError):
            while True:
                parts.append(os.read(ours, 4096))
        return b"".join(parts).decode()

    with monkeypatch.context() as patch, os.fdopen(theirs, "w", buffering=1) as stream:
        patch.setattr(progress, "DELAY", 0.1)
        patch.setattr(progress, "REFRESH", 0.02)
        patch.setattr(sys, "stderr", stream)
        patch.setattr(sys, "stdout", stream)
        yield read
        wait_for_thread()
    os.close(ours)


def read_until(read, text, lines):
    """Returns ``text`` and what follows it, as soon as a terminal shows that number of lines."""
    end = time.monotonic() + 5
    while len(screen(text)) != lines:
        assert time.monotonic() < end, screen(text)
        time.sleep(0.01)
        text += read()
    return text


def screen(text):
    """Returns what a terminal shows after ``text``, without blank lines."""
    lines, row, column = [""], 0, 0
    for each in re.findall(r"\x1b\[\w|[^\x1b]", text):
        if each == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        elif each in ("\r", "\x1b[A"):
            row, column = (row, 0) if each == "\r" else (row - 1, column)
        else:
            lines[row] = lines[row].ljust(column)[:column] + each + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines if line.strip()]


def test_a_terminal_shows_a_bar_after_a_moment_and_clears_it(monkeypatch):
    text, start = "", time.monotonic()
    with terminal(monkeypatch) as read:
        for number in track(range(20), "evaluate", "img"):
            time.sleep(0.02)
            text += read()
            assert not text or time.monotonic() > start + 0.1
            if number == 18:
                (bar,) = screen(text)
        text += read()
        wait_for_thread()
        assert read() == ""
    assert re.search(r"evaluate: +\d+%\|.*\| 1\d/20 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+ img/s\]", bar)
    assert screen(text) == [] and text.endswith("\r")


def test_a_terminal_shows_a_step_and_its_loop_and_what_is_printed_between(monkeypatch):
    with terminal(monkeypatch) as read:
        with Activity("quantize"):
            alone = screen(text := read_until(read, "", 1))
            with Activity("calibrate", "batch", 8, 2) as activity:
                activity.note = "so far"
                both = screen(text := read_until(read, text, 2))
                say("a message")
                three = screen(text := read_until(read, text, 3))
        text += read()
    assert len(alone) == 1 and re.search(r"quantize.*00:00", alone[0])
    assert len(both) == 2 and re.search(r"calibrate.* 2/8 .*so far", both[1])
    assert [each.split(":")[0] for each in three] == ["a message", "quantize", "calibrate"]
    assert screen(text) == ["a message"]


def test_short_work_shows_nothing_on_a_terminal(monkeypatch):
    with terminal(monkeypatch) as read:
        for _ in track(range(3), "short", "img"):
            time.sleep(0.02)
        assert read() == ""


def test_a_terminal_without_a_size_gets_the_lines_of_a_log(monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", INTERVAL)
    with terminal(monkeypatch, 0, 0) as read, Activity("build"):
        time.sleep(2.5 * INTERVAL)
        lines = read().splitlines()
    assert lines and all(line.startswith("build") for line in lines)
