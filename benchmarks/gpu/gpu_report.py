"""The results of measure.py: written after every step as JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from illama.atomic_write import write_file


@dataclass
class Report:
    """The results; written after every step, so that a timeout loses nothing.

    Attributes:
        device: name of the device.
        numerics: rows of (what, largest error relative to the largest magnitude in float64).
        latency: rows of (network, contestant, batch, p50 ms, p99 ms).
        engines: rows of (network, library, scheme, mask, outcome).
        not_run: what was not run, and why.
        facts: command, machine and versions.
    """

    device: str
    numerics: list[dict[str, Any]] = field(default_factory=list)
    latency: list[dict[str, Any]] = field(default_factory=list)
    engines: list[dict[str, Any]] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, text in ((".json", json.dumps(asdict(self), indent=2) + "\n"), (".md", self.table())):
            with write_file(folder / f"{name}{suffix}") as draft:
                draft.write_text(text)

    def table(self) -> str:
        """Returns all results in Markdown."""
        parts = [f"# {self.device}\n"]
        for title, rows in (
            ("Latency", self.latency),
            ("Numerics, against float64", self.numerics),
            ("Engines", self.engines),
        ):
            if rows:
                heads = list(rows[0])
                parts += [f"\n## {title}\n", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
                parts += [f"| {' | '.join(str(row[head]) for head in heads)} |" for row in rows]
        return "\n".join([*parts, "", *(f"Not run: {reason}" for reason in self.not_run), ""])


@contextmanager
def note_failure(report: Report, what: str) -> Iterator[None]:
    """Reports an exception of the block in ``report.not_run``, and continues after it."""
    print(what, flush=True)
    try:
        yield
    except Exception as error:
        words = " ".join(str(error).split())[:200]
        report.not_run.append(f"{what}: {type(error).__name__}: {words}")


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Returns the largest difference relative to the largest magnitude."""
    return float((found.double().cpu() - exact.cpu()).abs().max() / exact.abs().max())


def add_latency(report: Report, where: str, contestant: str, batch: int, values: list[float]) -> None:
    """Adds a row with the median and 99th percentile of times in milliseconds."""
    p50, p99 = np.percentile(values, (50, 99))
    report.latency.append(
        {
            "network": where,
            "contestant": contestant,
            "batch": batch,
            "p50 ms": f"{p50:.3f}",
            "p99 ms": f"{p99:.3f}",
            "images/s": f"{1e3 * batch / p50:.0f}",
        }
    )
