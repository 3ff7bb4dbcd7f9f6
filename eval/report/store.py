"""Results of a command on disk: a Markdown table, and the figures in JSON with the command, machine and versions."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.report.schema import OtherResult
from illama.atomic_write import make_out, write_file
from illama.bundle import command_line, package_versions
from illama.errors import UserError
from illama.hardware import describe_machine
from illama.structured_files import read_json, read_text

# Titles of results in a report, by the name of the results or of their folder.
_TITLES = {
    "robustness": "Robustness to corrupted images",
    "out-of-distribution": "Out-of-distribution detection",
    "shape-bias": "Shape bias",
    "segmentation": "Segmentation",
    "sensitivity": "Sensitivity of each layer to quantization",
    "flops": "Operations",
    "roofline": "Predicted latency",
    "accuracy": "Accuracy, changes and calibration",
}


@dataclass(frozen=True)
class _Facts:
    command: str
    machine: Mapping[str, Any] = field(default_factory=dict)


def write_results(folder: Path, name: str, content: Mapping[str, Any], table: str) -> None:
    """Prints a Markdown table, and writes it and ``content``, with the command, machine and versions, into a folder."""
    make_out(folder)
    facts = {"command": command_line(), "machine": describe_machine(), "versions": package_versions()}
    for suffix, text in ((".json", json.dumps({**content, **facts}, indent=2) + "\n"), (".md", f"{table.rstrip()}\n")):
        with write_file(folder / f"{name}{suffix}") as draft:
            draft.write_text(text)
    print(table)
    print(f"results: {folder / name}.md and .json", file=sys.stderr)  # so that the output can become a Markdown file


def read_results(folder: Path) -> list[OtherResult]:
    """Reads all results that :func:`write_results` or python quant/sensitivity.py wrote into a folder, by name.

    Raises:
        UserError: there are no results, or some are damaged.
    """
    pairs = [(path, path.with_suffix(".json")) for path in sorted(folder.glob("*.md"))]
    results = []
    for table, figures in pairs:
        if not figures.exists():  # a Markdown file that is not a result
            continue
        facts = read_json(figures, _Facts, unknown="ignore")
        text = read_text(table)
        title = _TITLES.get(table.stem) or _TITLES.get(folder.resolve().name) or table.stem.replace("-", " ")
        results.append(OtherResult(title, str(table), facts.command, dict(facts.machine), text))
    if not results:
        raise UserError(f"{folder} holds no results: give a folder with NAME.md and NAME.json, such as runs/robustness")
    return results
