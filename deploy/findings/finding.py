"""What a rule finds in a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from deploy.versions import LoadedBy
from illama.structured_files import read_yaml

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Rule:
    """A fault that a graph can have, as rules.yaml describes it: what it costs, what to do, where this is stated."""

    severity: Severity
    why: str
    fix: str
    source: str


@dataclass(frozen=True)
class Finding:
    """A fault of a graph.

    Attributes:
        rule: name of the rule, such as quantized-residual.
        node: name of the operator, value or file.
        detail: what is wrong there.
        severity: the rule's, or another where it matters less or more.
    """

    rule: str
    node: str
    detail: str
    severity: Severity


@dataclass(frozen=True)
class Subject:
    """A graph that is checked.

    Attributes:
        path: its file.
        model: the graph; dtypes and shapes are known as far as they can be inferred.
        runtime: the runtime that it is for; None if not given.
    """

    path: Path
    model: ir.Model
    runtime: LoadedBy | None = None

    @property
    def for_tensorrt(self) -> bool:
        return self.runtime is not None and self.runtime.runtime == "tensorrt"

    @property
    def for_cpu(self) -> bool:
        return self.runtime is not None and not self.for_tensorrt


Check = Callable[[Subject], Iterator[Finding]]


@cache
def read_rules() -> Mapping[str, Rule]:
    """Returns name -> rule."""
    return read_yaml(Path(__file__).with_name("rules.yaml"), dict[str, Rule])


def found(rule: str, node: ir.Node | str, detail: str, severity: Severity | None = None) -> Finding:
    """Returns a finding of a rule, by default with the rule's severity."""
    name = node if isinstance(node, str) else node.name or str(node.outputs[0].name)
    return Finding(rule, printable(name), printable(detail), severity or read_rules()[rule].severity)


def printable(text: str) -> str:
    """Returns text of a file without what could move a terminal's cursor, or end a line."""
    return "".join(each if each.isprintable() else "?" for each in text)
