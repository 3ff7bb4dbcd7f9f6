"""Killed commands: what they leave, and that the next run works. `make kill` kills at every step."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT, run_command

from deploy.trt.library import find_library
from illama.manifest import Manifest

NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]

WAITS_WHILE_IT_WRITES = """
import runpy, sys, time
from illama.checkpoints import conversion
conversion.write_converted = lambda *_: time.sleep(600)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def can_unshare():
    return bool(shutil.which("unshare")) and subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0


def test_a_few_kills_of_every_command_and_two_at_once():
    """tests/helpers/kill_harness.py checks each result; this test checks whether it is the earlier or the new one."""
    result = run_command("tests/helpers/kill_harness.py", "--few")
    assert result.returncode == 0, result.stdout + result.stderr
    left = json.loads(result.stdout.splitlines()[-1])
    first, again = ["none", "none", "new"], ["old", "old", "new"]
    assert left.pop("illama/train.py") == ["none", *first, *again[1:]]
    if find_library() is not None:
        assert left.pop("deploy/build.py") == [*first, *again]
    assert left == {"quant/ptq.py": ["new", "old", "old", "old", "old"]}


@pytest.mark.skipif(not can_unshare(), reason="this machine does not let the tests make a PID namespace")
def test_a_kill_of_process_1_of_a_container(small_bundle, tmp_path):
    """In a container every command is process 1, so a process ID does not tell whether a writer is alive."""
    command = [*NAMESPACE, sys.executable, "illama/convert.py", str(small_bundle), "--out", str(tmp_path / "out")]
    waiting = [*NAMESPACE, sys.executable, "-c", WAITS_WHILE_IT_WRITES, *command[len(NAMESPACE) + 1 :]]
    process = subprocess.Popen(waiting, cwd=ROOT)
    while process.poll() is None and not any(path.is_dir() for path in tmp_path.glob(".out.draft-*")):
        time.sleep(0.01)
    child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().strip()
    ids = next(line for line in Path(f"/proc/{child}/status").read_text().splitlines() if line.startswith("NSpid:"))
    assert ids.split()[-1] == "1"
    process.kill()
    process.wait()
    assert sorted(path.suffix for path in tmp_path.glob(".out*"))[-1] == ".lock" and not (tmp_path / "out").exists()
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert Manifest.read(tmp_path / "out") and {path.name for path in tmp_path.iterdir()} == {"bundle", "out"}
