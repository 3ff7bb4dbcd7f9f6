"""What a rule finds in a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from deploy.versions import LoadedBy

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Rule:
    """A fault that a graph can have.

    Attributes:
        name: such as quantized-residual.
        severity: ``error`` if the file does not load or computes something else, ``warning`` if it is slower or less
            accurate than it could be, ``note`` for the rest.
        why: what it costs.
        fix: what to do.
        source: where this is stated, or what measured it.
    """

    name: str
    severity: Severity
    why: str
    fix: str
    source: str


@dataclass(frozen=True)
class Finding:
    """A fault of a graph.

    Attributes:
        node: name of the operator, value or file.
        detail: what is wrong there.
        severity: the rule's, or a lower one where it matters less.
    """

    rule: Rule
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


Check = Callable[[Subject], Iterator[Finding]]


def name_of(node: ir.Node) -> str:
    """Returns the name of an operator, or that of its result if it has none."""
    return node.name or str(node.outputs[0].name)


def found(rule: Rule, node: ir.Node | str, detail: str, severity: Severity | None = None) -> Finding:
    """Returns a finding of a rule, by default with the rule's severity."""
    return Finding(rule, node if isinstance(node, str) else name_of(node), detail, severity or rule.severity)
