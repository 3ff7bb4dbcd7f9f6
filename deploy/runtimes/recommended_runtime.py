"""Recommends the file and the runtime for serving a bundle on this CPU: first the fastest of its report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from deploy.runtimes.names import RuntimeName
from deploy.runtimes.open_engine import cpu_runtime, files_of
from illama.bundle import CPU_ONNX, TORCHAO
from illama.errors import UserError
from illama.hardware import cpu_name, usable_cores
from illama.structured_files import read_json

REPORT = "report.json"  # beside the bundles of quant/ptq.py
CHOICE = "runtime.json"


@dataclass(frozen=True)
class RuntimeChoice:
    """A file and the runtime for it.

    Attributes:
        reason: why it was chosen, for the user.
        unverified: whether it is served even if its golden answers are wrong.
    """

    file: Path
    runtime: RuntimeName
    reason: str
    unverified: bool = False

    def write(self, folder: Path) -> None:
        """Writes the choice into the folder of a copy of the file."""
        (folder / CHOICE).write_text(json.dumps({**asdict(self), "file": self.file.name}) + "\n")

    @classmethod
    def read(cls, folder: Path) -> RuntimeChoice:
        """Reads what :meth:`write` wrote; raises UserError if it is missing or damaged."""
        choice = read_json(folder / CHOICE, cls)
        return replace(choice, file=folder / choice.file.name)


@dataclass(frozen=True)
class _Latency:
    p50: float


@dataclass(frozen=True)
class _Row:
    onnx: str
    runtime_id: str
    engine: str | None
    latency: tuple[_Latency, ...]


@dataclass(frozen=True)
class _Report:
    """The facts of a report that matter here."""

    machine: Mapping[str, Any]
    rows: tuple[_Row, ...]


def recommend_runtime(bundle: Path, asked: RuntimeName | None = None) -> RuntimeChoice:
    """Returns the file and the runtime with which to serve a bundle on a CPU.

    If the report beside the bundle was measured on the same kind of CPU, that is the runtime with the lowest median
    latency; otherwise it is the result of :func:`deploy.runtimes.open_engine.cpu_runtime`.

    Args:
        asked: the user's choice of a runtime.

    Raises:
        UserError: the bundle has no file for the runtime.
    """
    if asked is not None:
        return RuntimeChoice(_existing(files_of(bundle, asked)[0], bundle), asked, "as --runtime requests")
    if not (bundle / CPU_ONNX).exists() and (bundle / TORCHAO).exists():
        return RuntimeChoice(bundle / TORCHAO, "torch", "the only runtime that supports the file")
    file = _existing(bundle / CPU_ONNX, bundle)
    if fastest := _fastest(bundle.resolve().parent / REPORT, f"{bundle.resolve().name}/{CPU_ONNX}"):
        return RuntimeChoice(file, fastest, f"the fastest in {bundle.parent / REPORT}")
    return RuntimeChoice(file, cpu_runtime(file), "the default: there is no report for this CPU beside the bundle")


def _existing(file: Path, bundle: Path) -> Path:
    if not file.exists():
        raise UserError(f"{bundle} has no {file.name}: run python quant/ptq.py first")
    return file


def _fastest(report: Path, file: str) -> RuntimeName | None:
    """Returns the runtime with the lowest median latency of one file; None if the report is not of this kind of CPU."""
    try:
        content = read_json(report, _Report, unknown="ignore")
    except UserError:  # there is none, or it is of another version
        return None
    if (content.machine.get("cpu"), content.machine.get("cores")) != (cpu_name(), usable_cores()):
        return None
    timed = [
        (row.latency[0].p50, row.runtime_id)
        for row in content.rows
        if row.onnx == file and row.latency and row.engine is None
    ]
    runtime = min(timed, default=(0.0, None))[1]
    return cast(RuntimeName, runtime) if runtime in get_args(RuntimeName) else None
