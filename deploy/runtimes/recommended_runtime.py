"""Recommends the file and the runtime for serving a bundle on this CPU."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from deploy.runtimes.cpu_runtime import cpu_latencies
from deploy.runtimes.names import RuntimeName
from deploy.runtimes.open_engine import files_of
from illama.bundle import CPU_ONNX, TORCHAO, sha256
from illama.errors import UserError
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
class _Row:
    sha256: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Report:
    """The facts of a report that matter here: SHA-256 of the files that were measured, by their paths."""

    rows: tuple[_Row, ...]


def recommend_runtime(bundle: Path, asked: RuntimeName | None = None) -> RuntimeChoice:
    """Returns the file and the runtime with which to serve a bundle on a CPU.

    The runtime is the faster one on this CPU (:func:`deploy.runtimes.cpu_runtime.cpu_latencies`).

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
    latencies = [*cpu_latencies(file).items()]
    if len(latencies) == 1:
        return RuntimeChoice(file, latencies[0][0], "the only runtime that runs the file")
    (name, fastest), (other, slower) = latencies
    return RuntimeChoice(file, name, f"the faster here: {fastest:.3g} ms, against {slower:.3g} ms in {other}")


def note_unmeasured(engine: Path, bundle: Path) -> str:
    """Returns a note if the report beside a bundle is not of this engine, such as one that was built again."""
    folder = bundle.resolve().parent
    path = os.path.relpath(engine.resolve(), folder)
    try:
        rows = read_json(folder / REPORT, _Report, unknown="ignore").rows
    except UserError:  # there is none, or it is of another version
        return ""
    if any(row.sha256.get(path) == sha256(engine) for row in rows):
        return ""
    return f"not in {bundle.parent / REPORT}; measure it on its GPU by python eval/tradeoff.py {bundle.parent}"


def _existing(file: Path, bundle: Path) -> Path:
    if not file.exists():
        raise UserError(f"{bundle} has no {file.name}: run python quant/ptq.py first")
    return file
