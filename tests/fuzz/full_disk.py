"""Runs train, build and ptq on disks (tmpfs) of growing sizes, all but the last of which fill up:

python tests/fuzz/full_disk.py --sizes 10 --out results/fuzz

A command whose disk is full must end with status 2 and one line, leave the earlier result intact and no draft, and
succeed when the disk is larger. Needs the right to mount: as root, or under ``unshare -Urm``.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # threads do not survive a fork

import argparse
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from forked_command import TEMPORARY, Fork
from kill_harness import Build, Command, Ptq, Train, check, import_parts_of, write_inputs

from deploy.trt.library import find_library
from eval.report.store import write_results
from illama.errors import MAX_MESSAGE
from illama.markdown_table import markdown

LARGE = 1 << 30
PAGE = 4096
DIGESTS = "find {} -type f ! -name '*.lock' -exec sha256sum {{}} + | sort"


class Disk:
    """A tmpfs of a size in bytes that can be changed."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)

    def resize(self, size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", self.folder], check=True)

    @property
    def used(self) -> int:
        state = os.statvfs(self.folder)
        return (state.f_blocks - state.f_bfree) * state.f_frsize

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", self.folder], check=True)


def digests(folder: Path) -> str:
    """Returns the SHA-256 of every file in a folder."""
    return subprocess.run(DIGESTS.format(folder), shell=True, capture_output=True, text=True).stdout


def start(disk: Disk, command: Command, earlier: bool) -> Path:
    """Writes what a command adds to, and its earlier result."""
    place = disk.folder / "run"
    (disk.folder / TEMPORARY).mkdir()
    place.mkdir()
    command.prepare(place)
    if earlier:
        check(command.start(place).wait().status == 0, "the first run failed")
        command.age(place)
    return place


def needed(folder: Path, command: Command, earlier: bool) -> tuple[int, int]:
    """Returns the bytes on the disk before a run, and after it."""
    with Disk(folder, LARGE) as disk:
        place = start(disk, command, earlier)
        before = disk.used
        check((run := command.start(place).wait()).status == 0, run.output)
        return before, disk.used


def fill(folder: Path, command: Command, earlier: bool, free: int) -> str:
    """Runs a command with ``free`` bytes; returns the last line of a run that fails, or "" if it succeeds."""
    with Disk(folder, LARGE) as disk:
        place = start(disk, command, earlier)
        result = place / command.swap
        before = digests(result)
        disk.resize(max(PAGE, (disk.used + free) // PAGE * PAGE))
        run = command.start(place).wait()
        if run.status == 0:
            return ""
        lines = [line for line in run.output.splitlines() if line.strip()]
        check(run.status == 2 and "Traceback" not in run.output, f"status {run.status}: {run.output[-3000:]}")
        check(len(lines[-1]) <= MAX_MESSAGE + len("error: "), f"a long message: {lines[-1]}")
        check(digests(result) == before, "the earlier result is not intact")
        check(not [path for path in place.rglob(".*.draft-*") if path.suffix != ".lock"], "a draft was left")
        disk.resize(LARGE)
        check((again := command.start(place).wait()).status == 0, f"the next run failed: {again.output[-3000:]}")
        command.check_whole(result)
        return lines[-1].replace(str(folder), "")


def run_sizes(command: Command, folder: Path, earlier: bool, sizes: int) -> list[str]:
    """Returns the messages of the runs of one command; its failures begin with "FAULT"."""
    before, after = needed(folder, command, earlier)
    most, messages = max(after - before, after // 2), []
    for number in range(sizes):
        try:
            messages.append(fill(folder, command, earlier, most * number // sizes))
        except AssertionError as error:
            messages.append(f"FAULT with {most * number // sizes} bytes free: {error}")
    return messages


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, default=10, help="number of disk sizes for each command")
    parser.add_argument("--few", action="store_true", help="only builds and training over an earlier result")
    parser.add_argument("--out", type=Path, default=Path("results/fuzz"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, messages = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        Fork(partial(write_inputs, folder / "inputs")).result()
        commands: list[Command] = [Train(folder / "inputs")]
        if not options.few:
            commands.append(Ptq(folder / "inputs"))
        if find_library() is not None:
            commands.insert(1, Build(folder / "inputs"))
        for command in commands:
            import_parts_of(command.script)
            for earlier in (True,) if options.few else (False, True):
                found = run_sizes(command, folder / "disk", earlier, options.sizes)
                messages[f"{command.script}, {'over an earlier result' if earlier else 'new'}"] = found
                counts = [sum(map(bool, found)), sum(not each for each in found)]
                faults = [each for each in found if each.startswith("FAULT")]
                rows.append((command.script, "yes" if earlier else "no", *map(str, (*counts, len(faults)))))
                for each in faults:
                    print(f"{command.script}: {each}", flush=True)
    table = markdown(("command", "over an earlier result", "full disks", "finished", "faults"), rows)
    write_results(options.out, "full-disk", {"messages": messages}, table)
    print(table)
    return int(any(row[-1] != "0" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
