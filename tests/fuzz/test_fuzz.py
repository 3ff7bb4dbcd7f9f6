"""Some hundreds of mutated files and command lines, and a few full disks. `make fuzz` reads any number."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from fork_input import run_in_fork
from support import ROOT

from illama.errors import UserError


def _raises(error):
    raise error


def test_every_mutated_input_is_read_or_refused_in_one_line(tmp_path):
    command = [sys.executable, "tests/fuzz/campaign.py", "--count", "204", "--seed", "11", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=_environment())
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (lambda: None, "correct"),
        (lambda: _raises(UserError("a line")), "clean"),
        (lambda: _raises(UserError("")), "fault"),
        (lambda: _raises(ValueError("x")), "fault"),
        (lambda: sys.exit(0), "fault"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "fault"),
        (lambda: bytearray(8 << 30), "fault"),
    ],
    ids=["returns", "one line", "no line", "traceback", "exit", "death", "gigabytes"],
)
def test_the_child_finds_each_kind_of_fault(act, kind):
    assert run_in_fork(act).kind == kind


def test_a_hang_is_a_fault(monkeypatch):
    monkeypatch.setattr("fork_input.SECONDS", 1)
    assert "SIGALRM" in run_in_fork(lambda: time.sleep(60)).message


def _can_mount(*before):
    probe = [*before, "sh", "-c", "mkdir -p $0 && mount -t tmpfs tmpfs $0 && umount $0", "/tmp/mount-probe"]
    return shutil.which("mount") is not None and subprocess.run(probe, capture_output=True).returncode == 0


def test_a_full_disk_leaves_the_earlier_result(tmp_path):
    namespace = next((each for each in ((), ("unshare", "-Urm")) if _can_mount(*each)), None)
    if namespace is None:
        pytest.skip("this machine does not let the tests mount a tmpfs")
    command = [*namespace, sys.executable, "tests/fuzz/full_disk.py", "--sizes", "1", "--few", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=_environment())
    assert result.returncode == 0, result.stdout + result.stderr


def _environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests" / "helpers")))}
