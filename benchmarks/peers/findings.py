"""What the linter finds in a file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from deploy.findings.lint_graph import lint_graph
from deploy.versions import LoadedBy


def count_findings(path: Path, runtime: LoadedBy | None = None) -> tuple[str, str]:
    """Returns (warnings and errors, notes) that the linter has on a file, as counts by rule; empty for none.

    Args:
        runtime: the runtime that the file is for.
    """
    findings = lint_graph(path, runtime)
    notes = Counter(each.rule for each in findings if each.severity == "note")
    others = Counter(each.rule for each in findings if each.severity != "note")
    serious, minor = (", ".join(f"{name} {count}" for name, count in each.items()) for each in (others, notes))
    return serious, minor
