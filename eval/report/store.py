"""Results on disk: a table to read, and the figures with what made them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.report.schema import OtherResult
from illama.atomic_write import make_out, write_file
from illama.bundle import command_line, package_versions
from illama.errors import UserError
from illama.hardware import describe_machine

# What a reader is told of results, by their name or that of their folder.
_TITLES = {
    "robustness": "Corrupted images",
    "out-of-distribution": "Images of another kind",
    "shape-bias": "Shape or texture",
    "segmentation": "Segmentation",
    "sensitivity": "What quantizing each layer alone costs",
    "flops": "Operations",
    "roofline": "Predicted latency",
    "accuracy": "What changes behind a top-1",
}


def write_results(folder: Path, name: str, content: Mapping[str, Any], table: str) -> None:
    """Print a Markdown table, and write it and ``content`` with the command, machine and versions beside it."""
    make_out(folder)
    facts = {"command": command_line(), "machine": describe_machine(), "versions": package_versions()}
    for suffix, text in ((".json", json.dumps({**content, **facts}, indent=2) + "\n"), (".md", f"{table.rstrip()}\n")):
        with write_file(folder / f"{name}{suffix}") as draft:
            draft.write_text(text)
    print(table)


def read_results(folder: Path) -> list[OtherResult]:
    """Every result that :func:`write_results` or python quant/sensitivity.py wrote into a folder, by their names.

    Raises:
        UserError: there is none, or one that is damaged.
    """
    pairs = [(path, path.with_suffix(".json")) for path in sorted(folder.glob("*.md"))]
    results = []
    for table, figures in pairs:
        try:
            facts = json.loads(figures.read_text())
            command, machine, text = facts["command"], facts.get("machine", {}), table.read_text()
        except FileNotFoundError:  # a text beside the results
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{figures} is no result of a command in eval/: make it again") from error
        title = _TITLES.get(table.stem) or _TITLES.get(folder.resolve().name) or table.stem.replace("-", " ")
        results.append(OtherResult(title, str(table), command, machine, text))
    if not results:
        raise UserError(f"{folder} holds no results: a NAME.md with its NAME.json, as python eval/robustness.py writes")
    return results
