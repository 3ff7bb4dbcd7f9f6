"""Findings of several files as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from deploy.findings.finding import SEVERITIES, Finding, Severity, printable, read_rules
from deploy.findings.lint_graph import lint_graph
from deploy.versions import find_target, newest_runtimes
from illama.bundle import CPU_ONNX, FUSED_ONNX, MANIFEST
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
    found = {}
    for path in paths:
        for file in _files_of(path, graphs):
            of_bundle = path.is_dir() or (file.parent / MANIFEST).exists()
            found[file] = lint_graph(file, graphs.get(file.name, other) if of_bundle else other)
    return found


def _files_of(path: Path, names: Collection[str]) -> list[Path]:
    """Returns a file, or the files of a bundle with one of these names."""
    files = [path / name for name in sorted(names) if (path / name).exists()] if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} has no {' and no '.join(sorted(names))}: give an ONNX file or a bundle with one")
    return files


def to_text(results: Mapping[Path, Sequence[Finding]]) -> str:
    """Returns findings for people: one paragraph for each rule, with the first operators that it names."""
    lines = []
    for path, findings in results.items():
        lines.append(f"{printable(str(path))}: {_count(findings)}")
        for (severity, name), group in _by_rule(findings).items():
            rule = read_rules()[name]
            lines.append(f"  {severity}: {name}, {len(group)}")
            lines += [f"    {each.node}: {each.detail}" for each in group[:_NODES]]
            if len(group) > _NODES:
                lines.append(f"    and {len(group) - _NODES} more")
            lines += [f"    why: {rule.why}.", f"    fix: {rule.fix}.", f"    source: {rule.source}"]
    return "\n".join(lines)


def describe(findings: Sequence[Finding]) -> list[str]:
    """Returns one line for each rule: how many operators it finds, and what is wrong with the first of them."""
    lines = []
    for (severity, name), group in _by_rule(findings).items():
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        lines.append(f"{severity}, {name}: {group[0].node}{more}: {group[0].detail}")
    return lines


def to_json(results: Mapping[Path, Sequence[Finding]]) -> str:
    """Returns findings as JSON: a list of files, each with its findings."""
    rules = read_rules()
    files = [
        {"file": str(path), "findings": [asdict(rules[each.rule]) | asdict(each) for each in findings]}
        for path, findings in results.items()
    ]
    return json.dumps({"files": files}, indent=2)


def _by_rule(findings: Sequence[Finding]) -> dict[tuple[Severity, str], list[Finding]]:
    groups: dict[tuple[Severity, str], list[Finding]] = {}
    for each in findings:
        groups.setdefault((each.severity, each.rule), []).append(each)
    return groups


def _count(findings: Sequence[Finding]) -> str:
    counts = {name: sum(each.severity == name for each in findings) for name in SEVERITIES}
    return ", ".join(f"{n} {name}{'s' * (n > 1)}" for name, n in counts.items() if n) or "nothing found"
