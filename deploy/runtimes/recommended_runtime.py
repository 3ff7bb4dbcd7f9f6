"""Which file of a bundle to serve on this machine's CPU, and in which runtime: what the report found the fastest."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from deploy.runtimes.names import RuntimeName
from deploy.runtimes.open_engine import cpu_runtime, files_of
from illama.bundle import CPU_ONNX, TORCHAO
from illama.errors import UserError
from illama.hardware import cpu_name
from illama.inference import usable_cores

REPORT = "report.json"  # beside the bundles of quant/ptq.py
CHOICE = "runtime.json"


@dataclass(frozen=True)
class RuntimeChoice:
    """A file, what is to run it, and why.

    Attributes:
        reason: ends a sentence such as "int8 runs in openvino, ...".
    """

    file: Path
    runtime: RuntimeName
    reason: str

    def write(self, folder: Path) -> None:
        """Note it beside a copy of the file."""
        (folder / CHOICE).write_text(json.dumps({**asdict(self), "file": self.file.name}) + "\n")

    @classmethod
    def read(cls, folder: Path) -> RuntimeChoice:
        """What :meth:`write` noted in a folder."""
        values = json.loads((folder / CHOICE).read_text())
        return cls(**{**values, "file": folder / values["file"]})


def recommend_runtime(bundle: Path, asked: RuntimeName | None = None) -> RuntimeChoice:
    """The file and the runtime to serve a bundle with on a CPU.

    That is the runtime with the lowest median latency of the report beside the bundle, where the report was measured
    on a CPU like this one; else what :func:`deploy.runtimes.open_engine.cpu_runtime` prefers.

    Args:
        asked: a runtime that the user chose.

    Raises:
        UserError: the bundle has no file for it.
    """
    if asked is not None:
        return RuntimeChoice(_existing(files_of(bundle, asked)[0], bundle), asked, "as --runtime asks")
    if not (bundle / CPU_ONNX).exists() and (bundle / TORCHAO).exists():
        return RuntimeChoice(bundle / TORCHAO, "torch", "the only runtime of its file")
    file = _existing(bundle / CPU_ONNX, bundle)
    if fastest := _fastest(bundle.resolve().parent / REPORT, f"{bundle.resolve().name}/{CPU_ONNX}"):
        return RuntimeChoice(file, fastest, f"the fastest in {bundle.parent / REPORT}")
    return RuntimeChoice(file, cpu_runtime(file), "the usual choice, for want of a report of this CPU beside it")


def _existing(file: Path, bundle: Path) -> Path:
    if not file.exists():
        raise UserError(f"{bundle} has no {file.name}: make one with python quant/ptq.py")
    return file


def _fastest(report: Path, file: str) -> RuntimeName | None:
    """The runtime with the lowest median latency of one file; None without a report of a CPU like this one."""
    try:
        content: dict[str, Any] = json.loads(report.read_text())
        machine = content["machine"]
        if (machine["cpu"], machine["cores"]) != (cpu_name(), usable_cores()):
            return None
        timed = [
            (row["latency"][0]["p50"], row["runtime_id"])
            for row in content["rows"]
            if row["onnx"] == file and row["latency"] and row["engine"] is None
        ]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    runtime = min(timed, default=(0.0, None))[1]
    return runtime if runtime in get_args(RuntimeName) else None
