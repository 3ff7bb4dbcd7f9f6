"""Every figure that README.md and docs/ show, printed again: python docs/figures.py --run NAME

In a document, comments mark what is not its own words but a command's:

    <!-- figures: results/qat/qat.md --> on a line, and <!-- end --> on one after it: the file comes between

    It took <!-- value: results/ptq/report.json seconds/all .0f -->138<!-- /value --> s.

The first takes a whole file of results, or one of its tables, named in YAML; a row is named by its first cells:

    <!-- figures: {file: results/qat/qat.md, table: 1, rows: [w4a4, w6a6], without: [epochs]} -->

The second takes one number: a JSON file, the place in it, and how Python formats it. ``figures.yaml`` says which
command makes which of these files. Every call writes them all into the documents, but for ``--check``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from textwrap import shorten
from typing import Any

import yaml

from illama.cli import run_command
from illama.atomic_write import write_file
from illama.errors import UserError
from illama.markdown_table import markdown

ROOT = Path(__file__).parents[1]
DONE = "runs/figures/done.txt"
DOCUMENTS = ("README.md", "docs/*.md", "illama/weights/README.md")
_MARK = re.compile(r"<!-- (figures:|end|value:|/value)")
_BLOCK = re.compile(r"(<!-- figures:(.*?)-->\n)(.*?)(<!-- end -->)", re.DOTALL)
_VALUE = re.compile(r"(<!-- value:(.*?)-->)(.*?)(<!-- /value -->)", re.DOTALL)


@dataclass(frozen=True)
class FigureOptions:
    """Bring every figure in the documents up to date with the results files, and run the commands that make those.

    Attributes:
        run: commands to run first, by their names in docs/figures.yaml, done before or not.
        minutes: also run every command that takes at most so many minutes.
        all: run every command there is; the training runs take hours.
        check: write nothing, name each figure that is not what its results file holds, and exit with 1 if one is.
    """

    run: tuple[str, ...] = ()
    minutes: float = 0
    all: bool = False
    check: bool = False


@dataclass(frozen=True)
class Part:
    """What of a Markdown file of results a document shows.

    Attributes:
        table: its number in the file, from 1; the whole file if not given.
        rows: beginnings of the rows to show, their cells joined by " | "; all if not given.
        without: columns left out.
    """

    file: str
    table: int | None = None
    rows: Sequence[str] = ()
    without: Sequence[str] = ()

    def read(self, root: Path) -> str:
        """The text; UserError if the file has no such part."""
        text = _read(root, self.file).strip("\n")
        tables = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
        if self.table is None:
            return text
        if not 1 <= self.table <= len(tables):
            raise UserError(f"{self.file} has no table {self.table}")
        table = tables[self.table - 1].strip("\n")
        return self._select(table) if self.rows or self.without else table

    def _select(self, table: str) -> str:
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
        named = {name: [row for row in rows if f"{' | '.join(row)} | ".startswith(f"{name} | ")] for name in self.rows}
        lost = [name for name in self.without if name not in head] + [name for name in named if not named[name]]
        if lost:
            raise UserError(f"table {self.table} of {self.file} has no column or row {lost[0]!r}")
        kept = [place for place, name in enumerate(head) if name not in self.without]
        shown = [row for row in rows if not named or any(row in found for found in named.values())]
        return markdown([head[place] for place in kept], [[row[place] for place in kept] for row in shown])


def _read(root: Path, file: str) -> str:
    try:
        return (root / file).read_text()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; make it with docs/figures.py --run") from error


def block_text(spec: str, root: Path) -> str:
    """What belongs into a block; ``spec``, from the document, is a file, or the fields of :class:`Part`, in YAML."""
    try:
        fields = yaml.safe_load(spec)
        part = Part(**fields) if isinstance(fields, dict) else Part(fields)
    except (yaml.YAMLError, TypeError) as error:
        raise UserError(f"cannot read the mark {shorten(spec, 100)!r}: {shorten(str(error), 100)}") from error
    return part.read(root) + "\n"


def value_text(spec: str, root: Path) -> str:
    """The number that a value shows; ``spec`` is a JSON file, the place in it, and how to format it."""
    file, _, rest = " ".join(spec.split()).partition(" ")
    place, _, form = rest.rpartition(" ")
    try:
        value: Any = json.loads(_read(root, file))
        for name in place.split("/"):
            value = value[int(name)] if isinstance(value, list) else value[name]
        return format(value, form)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"no value {place!r} to be written as {form!r} in {file}") from error


def _line(match: re.Match[str]) -> int:
    return match.string.count("\n", 0, match.start()) + 1


def fill(text: str, root: Path) -> tuple[str, list[tuple[int, str]]]:
    """A document with all its figures as the results files have them, and those that differed: line and mark.

    Raises:
        UserError: for a mark without its end, or of something that is not there.
    """
    marks = list(_MARK.finditer(text))
    for first, second in zip_longest(marks[::2], marks[1::2]):
        if second is None or (first[1], second[1]) not in (("figures:", "end"), ("value:", "/value")):
            raise UserError(f"line {_line(first)}: <!-- {first[1]} lacks its other half")
        if first[1] == "value:" and text[: first.start()].endswith("\n"):  # Markdown would end the paragraph there
            raise UserError(f"line {_line(first)}: a value must not start a line: break the line elsewhere")
    differing = []

    def fresh(match: re.Match[str], content: str) -> str:
        if content != match[3]:
            differing.append((_line(match), shorten(match[2], 100)))
        return f"{match[1]}{content}{match[4]}"

    filled = _BLOCK.sub(lambda match: fresh(match, block_text(match[2], root)), text)
    return _VALUE.sub(lambda match: fresh(match, value_text(match[2], root)), filled), differing


def update(root: Path, write: bool = True) -> list[str]:
    """Bring the documents under ``root`` up to date, all or none; a line for each figure that was not."""
    drafts, lines = {}, []
    for path in (path for pattern in DOCUMENTS for path in sorted(root.glob(pattern))):
        try:
            drafts[path], differing = fill(path.read_text(), root)
        except UserError as error:
            raise UserError(f"{path.relative_to(root)}: {error}") from error
        lines += [f"{path.relative_to(root)}, line {line}: differs from {mark}" for line, mark in differing]
    for path, text in drafts.items() if write else ():
        if text != path.read_text():
            with write_file(path) as draft:
                draft.write_text(text)
    return lines


def run_all(names: Sequence[str], commands: Mapping[str, Any], done: Path, again: Sequence[str] = ()) -> list[str]:
    """Run commands one after another, their output on the terminal; the names of those that failed.

    The file ``done`` names those that have succeeded, which are not run again, until all have: so a run of hours goes
    on where it was interrupted, or with what failed. Those in ``again`` are run whatever it says.
    """
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    earlier = [name for name in (done.read_text().split() if done.exists() else []) if name not in again]
    ahead, failed = [name for name in names if name not in earlier], []
    if len(ahead) < len(names):
        print(f"done before: {', '.join(name for name in names if name in earlier)} (delete {done} to run all again)")
    for place, name in enumerate(ahead):
        left = sum(commands[each]["minutes"] for each in ahead[place:])
        print(f"\n[{place + 1}/{len(ahead)}] {name}: about {commands[name]['minutes']} minutes of {left}", flush=True)
        start = time.perf_counter()
        if subprocess.run(["bash", "-euxc", commands[name]["run"]], cwd=ROOT, env=environment).returncode:
            failed.append(name)
            print(f"{name}: FAILED", flush=True)
            continue
        print(f"{name}: took {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)
        done.parent.mkdir(parents=True, exist_ok=True)
        with done.open("a") as file:
            file.write(f"{name}\n")
    if not failed and set(earlier) <= set(names):
        done.unlink(missing_ok=True)
    return failed


def main(options: FigureOptions) -> None:
    commands = yaml.safe_load((ROOT / "docs" / "figures.yaml").read_text())
    for name in options.run:
        if name not in commands:
            raise UserError(f"no commands named {name!r} in docs/figures.yaml: choose from {', '.join(commands)}")
    chosen = [
        name
        for name, each in commands.items()
        if options.all or name in options.run or each["minutes"] <= options.minutes
    ]
    failed = run_all(chosen, commands, ROOT / DONE, options.run)
    differing = update(ROOT, write=not options.check)
    print("\n".join(differing) or "every figure is what its results file holds")
    if failed:
        raise UserError(f"these commands failed, and their figures are as they were: {', '.join(failed)}")
    if options.check and differing:
        sys.exit(1)


if __name__ == "__main__":
    run_command(FigureOptions, main)
