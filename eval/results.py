"""Results on disk: a table to read, and the figures with what made them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.machine import describe_machine
from illama.bundle import command_line, make_out, package_versions, write_file


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows))


def write_results(folder: Path, name: str, content: Mapping[str, Any], table: str) -> None:
    """Print a Markdown table, and write it and ``content`` with the command, machine and versions beside it."""
    make_out(folder)
    facts = {"command": command_line(), "machine": describe_machine(), "versions": package_versions()}
    for suffix, text in ((".json", json.dumps({**content, **facts}, indent=2) + "\n"), (".md", f"{table.rstrip()}\n")):
        with write_file(folder / f"{name}{suffix}") as draft:
            draft.write_text(text)
    print(table)
