"""Kills commands before their file operations, and checks what they leave:

python tests/helpers/kill_harness.py --out results/kills

A process imports all modules and forks for each run. In the fork, an audit hook counts the file operations below the
run's folder, and kills the process before one of them (tests/helpers/forked_command.py).
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # threads do not survive a fork

import argparse
import ast
import importlib
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from forked_command import AFTER, BEFORE, TEMPORARY, Fork, KillAt, Run
from safetensors.numpy import load_file
from support import ROOT, SMALL, write_bundle, write_images

from deploy.trt.library import find_library
from deploy.trt.record import EngineRecord, find_engines
from eval.report.store import write_results
from illama.bundle import FUSED_ONNX, sha256
from illama.checkpoints.load import load_checkpoint
from illama.errors import UserError
from illama.manifest import Manifest
from illama.markdown_table import markdown
from illama.training.log import read_log
from quant.export.onnx_export import export_onnx

TINY = replace(SMALL, depth=1)
AGE = "no kill: the result is changed so that the next run replaces it"


def check(true: object, message: str) -> None:
    """Raises AssertionError unless ``true``."""
    if not true:
        raise AssertionError(message)


def check_names(folder: Path, names: set[str]) -> None:
    """Raises AssertionError unless a folder contains exactly these names."""
    found = {path.name for path in folder.iterdir()}
    check(found == names, f"{folder} contains {sorted(found)}, not {sorted(names)}")


class Command:
    """A command. A killed run must leave the earlier or the new result, complete, and the next run must succeed.

    Attributes:
        script: path in the repository.
        swap: path in the run's folder that the command replaces by a rename.
        few: kills of consecutive runs in the same folder.
    """

    script: str
    swap: str
    few: tuple[KillAt, ...]

    def __init__(self, inputs: Path) -> None:
        self.inputs = inputs

    def start(self, place: Path, kill_at: KillAt = None, kill_by: signal.Signals = signal.SIGKILL) -> Run:
        return Run([self.script, *self.arguments(place)], place, place / self.swap, kill_at, kill_by)

    def arguments(self, place: Path) -> list[object]:
        raise NotImplementedError

    def prepare(self, place: Path) -> None:
        """Creates what the command adds to."""

    def age(self, place: Path) -> None:
        """Changes the result so that the command replaces it."""

    def check_whole(self, result: Path) -> None:
        """Raises AssertionError unless a result can be read and is complete."""
        raise NotImplementedError

    def check_finished(self, place: Path) -> None:
        """Raises AssertionError unless a finished command left exactly its result."""
        raise NotImplementedError


class Train(Command):
    """After any kill, its weights are those of an uninterrupted run."""

    script, swap, few = "illama/train.py", "out/bundle", (2, 20, BEFORE, AFTER, BEFORE, AFTER)
    weights: str | None = None

    def arguments(self, place: Path) -> list[object]:
        return [
            "--data",
            self.inputs / "images",
            "--out",
            place / "out",
            "--epochs",
            2,
            "--batch-size",
            4,
            "--micro-batch",
            4,
            "--depth",
            1,
            "--width",
            32,
            "--heads",
            1,
            "--image-size",
            32,
            "--patch-size",
            16,
            "--in-channels",
            3,
            "--checkpoint-steps",
            2,
            "--workers",
            0,
        ]

    def check_whole(self, result: Path) -> None:
        Manifest.read(result)
        load_file(result / "model.safetensors")
        check(len(read_log(result / "log.csv")) == 2 and (result / "curve.png").stat().st_size, "an incomplete bundle")
        digest = sha256(result / "model.safetensors")
        check(self.weights in (None, digest), "the weights differ from those of an uninterrupted run")
        self.weights = digest

    def check_finished(self, place: Path) -> None:
        check_names(place, {"out"})
        check_names(place / "out", {"bundle", "checkpoint.pt", "log.csv", "losses.csv", "tensorboard"})
        check_names(place / self.swap, {"model.safetensors", "manifest.json", "log.csv", "curve.png"})


TIMED = ("latency", "device", "engine_bytes", "sha256", "note")  # fields of a report's row; two engines can differ


def _outputs(result: Path) -> list[Path]:
    return [path for path in result.rglob("*") if path.suffix in (".onnx", ".safetensors", ".yaml")]


class Ptq(Command):
    """Writes bundles with engines, if TensorRT-RTX is installed, and a report.

    After any kill, its graphs, weights and accuracies are those of an uninterrupted run.
    """

    script, swap, few = "quant/ptq.py", "out", (AFTER, 6, 40, 34, BEFORE)
    schemes: tuple[str, ...] = ("int8",)
    facts: dict[str, Any] | None = None

    def arguments(self, place: Path) -> list[object]:
        return [
            "--checkpoint",
            self.inputs / "bundle",
            "--data",
            self.inputs / "images",
            "--out",
            place / "out",
            "--calibration-images",
            4,
            "--batches",
            1,
            "--seconds",
            0.01,
            "--schemes",
            *self.schemes,
        ]

    def check_whole(self, result: Path) -> None:
        for row in json.loads((result / "report.json").read_text())["rows"]:
            for path, digest in row["sha256"].items():
                check(sha256(result / path) == digest, f"{path} is not the file of the report")
        for bundle in ("fp32", "fp16", *self.schemes):
            Manifest.read(result / bundle)
        check(not list(result.rglob(".*")), "a draft in the result")
        facts: dict[str, Any] = {path.relative_to(result).as_posix(): sha256(path) for path in _outputs(result)}
        for row in json.loads((result / "report.json").read_text())["rows"]:
            facts[row["name"]] = {key: value for key, value in row.items() if key not in TIMED}
        check(self.facts in (None, facts), "files or accuracies differ from those of an uninterrupted run")
        self.facts = facts

    def check_finished(self, place: Path) -> None:
        check_names(place, {"out"})
        check_names(
            place / "out",
            {"fp32", "fp16", *self.schemes, "report.html", "report.json", "report.md", "summary.json", "tradeoff.png"},
        )


class Build(Command):
    """Writes an engine into a bundle, and does not change its other files."""

    aged = "{"  # a damaged record, so that the engine is built again
    script, swap, few = "deploy/build.py", "bundle/engines/tiny", (2, BEFORE, AFTER, AGE, 2, BEFORE, AFTER, AGE)

    def arguments(self, place: Path) -> list[object]:
        return [place / "bundle", "--name", "tiny", "--batch", "1:1:1"]

    def prepare(self, place: Path) -> None:
        shutil.copytree(self.inputs / "fused", place / "bundle")

    def age(self, place: Path) -> None:
        (place / self.swap / "record.json").write_text(self.aged)

    def check_whole(self, result: Path) -> None:
        check_names(result, {"model.engine", "record.json"})
        if (result / "record.json").read_text() != self.aged:
            EngineRecord.read(result / "model.engine")

    def check_finished(self, place: Path) -> None:
        check_names(place, {"bundle"})
        check_names(place / "bundle", {"manifest.json", "model.safetensors", FUSED_ONNX, "engines"})
        check_names(place / "bundle" / "engines", {"tiny"})
        (engine,) = find_engines(place / "bundle")
        EngineRecord.read(engine)


def import_parts_of(script: str) -> None:
    """Imports every module that a command names, also in its functions, so that its forks start at once."""
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            importlib.import_module(node.module)


def write_inputs(folder: Path) -> None:
    """Writes the inputs of the commands: images, a trained bundle, and one with a graph for TensorRT."""
    write_images(folder / "images", train=4, val=2)
    for name in ("bundle", "fused"):
        write_bundle(folder / name, TINY)
    export_onnx(load_checkpoint(folder / "fused").model, folder / "fused" / FUSED_ONNX, "fused", torch.float16)


def version(path: Path) -> int | None:
    """Returns a number that differs for every folder at the path; None if nothing is there."""
    return path.stat().st_ino if path.exists() else None


def run_killed(command: Command, place: Path, kill_at: KillAt) -> str:
    """Runs and kills a command, and returns what it leaves: "old", "new" or "none", or "not reached"."""
    before = version(place / command.swap)
    run = command.start(place, kill_at).wait()
    after = version(place / command.swap)
    check(run.status in (0, -signal.SIGKILL), f"it ended with {run.status}: {run.output}")
    if after is not None:
        command.check_whole(place / command.swap)
    check(after or not before, "the old result is lost, and there is no new one")
    return "not reached" if run.status == 0 else "none" if after is None else "old" if after == before else "new"


def run_whole(command: Command, place: Path) -> Run:
    """Runs a command, and checks that it leaves exactly its result."""
    run = command.start(place).wait()
    check(run.status == 0, f"the next run ended with {run.status}: {run.output}")
    check_finished(command, place)
    return run


def check_finished(command: Command, place: Path) -> None:
    """Raises AssertionError unless a finished command left exactly a complete result, and no temporary files."""
    command.check_whole(place / command.swap)
    command.check_finished(place)
    check_names(place.parent / TEMPORARY, set())


def run_a_few(command: Command, folder: Path) -> list[str]:
    """Runs a command repeatedly in a folder, and kills all runs but the last two; returns what the killed ones left."""
    place, left = folder / "few" / Path(command.script).stem, []
    for each in (place, place.parent / TEMPORARY):
        each.mkdir(parents=True, exist_ok=True)
    command.prepare(place)
    for kill_at in command.few:
        if kill_at == AGE:
            command.age(place)
        else:
            left.append(run_killed(command, place, kill_at))
    write_twice(command, place)
    check_finished(command, place)
    return left


def write_twice(command: Command, place: Path) -> None:
    """Runs two processes with the same output folder; both must succeed, but where work resumes the second is rejected.

    The first is stopped before its swap until the second has ended.
    """
    first = command.start(place, BEFORE, signal.SIGSTOP)
    first.wait_until_stopped()
    second = command.start(place).wait()
    first.resume()
    check(first.status == 0, first.output)
    if isinstance(command, Train | Ptq):
        lines = second.output.strip().splitlines()
        check(second.status == 2 and "in use by another process" in lines[-1], second.output)
    else:
        check(second.status == 0, second.output)


@dataclass
class Counts:
    """What the kills of a command left, and its failures, for an empty folder or over an earlier result."""

    command: str
    earlier: bool
    operations: int
    left: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("none", "old", "new", "not reached"), 0))
    failures: list[str] = field(default_factory=list)

    def cells(self) -> tuple[str, ...]:
        """Returns the row under ``HEADINGS``."""
        return (
            self.command,
            "yes" if self.earlier else "no",
            str(self.operations),
            *(str(self.left[each]) for each in ("none", "old", "new")),
            str(len(self.failures)),
        )


HEADINGS = (
    "command",
    "over an earlier result",
    "kills",
    "left no result",
    "left the earlier one",
    "left the new one",
    "failures",
)


def run_all(command: Command, folder: Path, earlier: bool) -> dict[str, Any]:
    """Kills a command before each file operation, each time in a new folder, runs it again, and returns the counts.

    A failure is an incomplete result, a lost earlier result, a next run that fails, or a remaining temporary file.
    """
    start, place = folder / "start", folder / "run"
    for each in (folder, folder / TEMPORARY, start):
        each.mkdir()
    command.prepare(start)
    if earlier:
        run_whole(command, start)
        command.age(start)
    shutil.copytree(start, place)
    operations = run_whole(command, place).operations.splitlines()
    counts = Counts(command.script, earlier, len(operations))
    for number, operation in enumerate(operations, 1):
        for each in (place, folder / TEMPORARY):
            shutil.rmtree(each)
        (folder / TEMPORARY).mkdir()
        shutil.copytree(start, place)
        try:
            counts.left[left := run_killed(command, place, number)] += 1
            check(left != "not reached", "it ended before this operation")
            run_whole(command, place)
        except (AssertionError, UserError, OSError, ValueError) as error:
            counts.failures.append(f"{operation}: {error}")
            print(f"FAILED: killed before {counts.failures[-1]}", flush=True)
        print(f"{folder.name}: {number} of {len(operations)}", flush=True)
    return asdict(counts)


def run_all_at_once(commands: Sequence[Command], folder: Path) -> list[Counts]:
    """:func:`run_all` of each command with and without an earlier result, in parallel processes."""
    forks = []
    for command in commands:
        for earlier in (False, True):
            place = folder / f"{Path(command.script).stem}-{'again' if earlier else 'first'}"
            forks.append(Fork(partial(run_all, command, place, earlier)))
    return [Counts(**fork.result()) for fork in forks]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/kills"))
    parser.add_argument("--few", action="store_true", help="a few kills of each command; prints what they left")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # In a new process, since threads of PyTorch do not exist in later forks.
        Fork(partial(write_inputs, folder / "inputs")).result()
        commands = [Train(folder / "inputs"), Ptq(folder / "inputs")]
        if find_library() is not None:
            commands.insert(1, Build(folder / "inputs"))
        for command in commands:
            import_parts_of(command.script)
        if options.few:
            Ptq.schemes = ()
            print(json.dumps({command.script: run_a_few(command, folder) for command in commands}))
            return 0
        counts = run_all_at_once(commands, folder)
    write_results(
        options.out,
        "kills",
        {"commands": [asdict(each) for each in counts]},
        markdown(HEADINGS, [each.cells() for each in counts]),
    )
    return int(any(each.failures for each in counts))


if __name__ == "__main__":
    sys.exit(main())
