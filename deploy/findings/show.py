"""Findings of several files as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from deploy.findings.finding import SEVERITIES, Finding, Rule
from deploy.findings.lint_graph import lint_graph
from deploy.versions import find_target, newest_runtimes
from illama.bundle import CPU_ONNX, FUSED_ONNX
from illama.errors import UserError

_NODES = 4  # named at most for each rule


def lint_files(paths: Sequence[Path], target: str | None = None) -> dict[Path, list[Finding]]:
    """Returns the findings of files, and of the graphs of bundles.

    Args:
        target: see :func:`deploy.versions.find_target`. A board has several runtimes: a bundle's graph is checked for
            its own, another file for TensorRT. If not given, a bundle's graph is checked for the newest release of its
            runtime, and another file for none.

    Raises:
        UserError: a path is a folder without a graph, or see :func:`deploy.findings.lint_graph.lint_graph`.
    """
    graphs = find_target(target).graphs if target else newest_runtimes()
    other = (graphs.get(FUSED_ONNX) or graphs.get(CPU_ONNX)) if target else None
    files = [file for path in paths for file in _files_of(path)]
    return {file: lint_graph(file, graphs.get(file.name, other)) for file in files}


def _files_of(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = [path / name for name in (CPU_ONNX, FUSED_ONNX) if (path / name).exists()]
    if not files:
        raise UserError(f"{path} has no {CPU_ONNX} and no {FUSED_ONNX}: give an ONNX file or a bundle")
    return files


def to_text(results: Mapping[Path, Sequence[Finding]]) -> str:
    """Returns findings for people: one paragraph for each rule, with the first operators that it names."""
    lines = []
    for path, findings in results.items():
        lines.append(f"{path}: {_count(findings)}")
        rules: dict[tuple[Rule, str], list[Finding]] = {}
        for each in findings:
            rules.setdefault((each.rule, each.severity), []).append(each)
        for (rule, severity), group in rules.items():
            lines.append(f"  {severity}: {rule.name}, {len(group)}")
            lines += [f"    {each.node}: {each.detail}" for each in group[:_NODES]]
            if len(group) > _NODES:
                lines.append(f"    and {len(group) - _NODES} more")
            lines += [f"    why: {rule.why}.", f"    fix: {rule.fix}.", f"    source: {rule.source}"]
    return "\n".join(lines)


def _count(findings: Sequence[Finding]) -> str:
    if not findings:
        return "nothing found"
    counts = {name: sum(each.severity == name for each in findings) for name in SEVERITIES}
    return ", ".join(f"{count} {name}{'s' * (count > 1)}" for name, count in counts.items() if count)


def describe(findings: Sequence[Finding]) -> list[str]:
    """Returns one line for each rule: how many operators it finds, and what is wrong with the first of them."""
    rules: dict[str, list[Finding]] = {}
    for each in findings:
        rules.setdefault(f"{each.severity}, {each.rule.name}", []).append(each)
    more = {name: f" and {len(group) - 1} more" if len(group) > 1 else "" for name, group in rules.items()}
    return [f"{name}: {group[0].node}{more[name]}: {group[0].detail}" for name, group in rules.items()]


def to_json(results: Mapping[Path, Sequence[Finding]]) -> str:
    """Returns findings as JSON: a list of files, each with its findings."""
    files = []
    for path, findings in results.items():
        rows = [
            {**asdict(each.rule), "severity": each.severity, "node": each.node, "detail": each.detail}
            for each in findings
        ]
        files.append({"file": str(path), "findings": rows})
    return json.dumps({"files": files}, indent=2)
