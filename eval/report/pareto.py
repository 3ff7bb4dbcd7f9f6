"""Which engine to deploy: the Pareto front, the constraints, and the choice in two sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from eval.report.schema import Row
from illama.options import Constraints, check_constraints

_ALIKE = 1.05  # times of a call that are as good as equal: what they differ by from run to run


@dataclass(frozen=True)
class Choice:
    """The engine that was chosen.

    Attributes:
        row: None where no engine keeps to the constraints, or nothing was measured to choose by.
        sentence: which, by what rule, and what it gives and costs against the reference; for a headline.
        reasons: row's name -> the constraints that it breaks, in words; empty for one that keeps to all.
    """

    row: Row | None
    sentence: str
    reasons: dict[str, list[str]] = field(default_factory=dict)


def pareto_front(rows: Sequence[Row], batch: int = 1) -> set[str]:
    """Names of the rows timed at ``batch`` that no other row of the same device beats.

    One beats another that is at least as fast (p50) and at least as accurate (top-1), and is better in one of them.
    """
    timed = [(row, latency.p50) for row in rows if (latency := row.at(batch))]

    def beats(one: tuple[Row, float], other: tuple[Row, float]) -> bool:
        (a, fast), (b, slow) = one, other
        no_worse = a.device == b.device and fast <= slow and a.top1.percent >= b.top1.percent
        return no_worse and (fast < slow or a.top1.percent > b.top1.percent)

    return {each[0].name for each in timed if not any(beats(other, each) for other in timed)}


def fits(row: Row, constraints: Constraints) -> list[str]:
    """The constraints that a row breaks, in words; a row that was not timed at the batch breaks one on latency."""
    return [reason for _, reason in _broken(row, constraints)]


def _broken(row: Row, constraints: Constraints) -> list[tuple[float, str]]:
    """(by what share of the limit, in words) for each limit that is broken."""
    broken = []
    if constraints.latency_ms is not None:
        if (latency := row.at(constraints.batch)) is None:
            broken.append((math.inf, f"was not timed at batch {constraints.batch}"))
        elif latency.p50 > constraints.latency_ms:
            excess = latency.p50 / constraints.latency_ms - 1
            words = f"takes {latency.p50:.4g} ms at batch {constraints.batch}, more than {constraints.latency_ms:g}"
            broken.append((excess, words))
    if constraints.drop is not None and row.drop.high > constraints.drop:
        excess = (row.drop.high - constraints.drop) / max(
            abs(constraints.drop), 0.1
        )  # of a limit of 0, by tenths of a point
        broken.append((excess, f"may lose {row.drop.high:.2f} points of top-1, more than {constraints.drop:g}"))
    if constraints.megabytes is not None and row.megabytes > constraints.megabytes:
        excess = row.megabytes / constraints.megabytes - 1
        broken.append((excess, f"takes {row.megabytes:.4g} MB, more than {constraints.megabytes:g}"))
    return broken


def choose(rows: Sequence[Row], constraints: Constraints | None = None) -> Choice:
    """The engine to deploy.

    With a limit on the drop, or with none at all, it is the fastest of those that keep to the constraints; of several
    within 5% of it, the smallest. With constraints on latency and size alone, it is the most accurate of them (ties:
    the faster, then the smaller). Where none of those that keep to the constraints was timed, the smallest stands in
    for the fastest.

    Raises:
        UserError: for a limit that nothing could keep to.
    """
    constraints = constraints or Constraints()
    check_constraints(constraints)
    reasons = {row.name: fits(row, constraints) for row in rows}
    kept = [row for row in rows if not reasons[row.name]]
    within = _in_words(constraints)
    if not kept:
        return Choice(None, _nearest(rows, constraints, within), reasons)
    timed = [row for row in kept if row.at(constraints.batch)]
    if not timed and not within:
        return Choice(
            None, f"Nothing was timed at batch {constraints.batch}, and no limit was given to choose by.", reasons
        )
    pool, rule = kept, "the smallest"
    if within and constraints.drop is None:
        rule = "the most accurate"
        row = min(kept, key=lambda row: (-row.top1.percent, _p50(row, constraints.batch), row.megabytes))
    elif timed:
        pool, fastest = timed, min(_p50(row, constraints.batch) for row in timed)
        alike = [row for row in timed if _p50(row, constraints.batch) <= fastest * _ALIKE]
        row = min(alike, key=lambda row: (row.megabytes, _p50(row, constraints.batch), -row.top1.percent))
        fast = _p50(row, constraints.batch) == fastest
        rule = "the fastest" if fast else "as fast as any (within 5%), and then the smallest,"
    else:
        row = min(kept, key=lambda row: (row.megabytes, -row.top1.percent))
    what = f"engine{'s' * (len(pool) > 1)}" + (f" timed at batch {constraints.batch}" if pool is timed else "")
    place = f"{rule} of the {len(pool)} {what}" if len(pool) > 1 else f"the only {what}"
    gap = "" if row.at(constraints.batch) else f"; it was not timed at batch {constraints.batch}"
    if not any(each.at(constraints.batch) for each in rows):
        gap = f"; nothing was timed at batch {constraints.batch}"
    name = f"{row.name}, the reference itself," if row.reference else row.name
    return Choice(row, f"{name} is {place}{within}{gap}. {_figures(row, rows, constraints.batch)}", reasons)


def _in_words(constraints: Constraints) -> str:
    """Such as " within 3 ms at batch 1 and 2 MB"; empty without constraints."""
    parts = (
        [f"{constraints.latency_ms:g} ms at batch {constraints.batch}"] if constraints.latency_ms is not None else []
    )
    parts += [f"a loss of {constraints.drop:g} points of top-1"] if constraints.drop is not None else []
    parts += [f"{constraints.megabytes:g} MB"] if constraints.megabytes is not None else []
    return f" within {_listed(parts)}" if parts else ""


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _p50(row: Row, batch: int) -> float:
    latency = row.at(batch)
    return latency.p50 if latency else math.inf


def _nearest(rows: Sequence[Row], constraints: Constraints, within: str) -> str:
    """What to say where no row keeps to the constraints: which breaks the fewest, by the least."""
    if not rows:
        return "Nothing was measured."
    broken = {row.name: _broken(row, constraints) for row in rows}
    name = min(broken, key=lambda name: (len(broken[name]), max(excess for excess, _ in broken[name])))
    return f"No engine is{within}. {name} comes nearest: it {_listed([reason for _, reason in broken[name]])}."


def _figures(row: Row, rows: Sequence[Row], batch: int) -> str:
    """A sentence of what a row gives and costs against the reference, or of its own figures where it is that."""
    latency = row.at(batch)
    reference = next((each for each in rows if each.reference), None)
    if reference is None or row is reference:
        speed = f"takes {latency.p50:.2f} ms a call at batch {batch}, " if latency else ""
        return f"It {speed}has {row.megabytes:.2f} MB and is right on {row.top1.percent:.2f}% of {row.images:,} images."
    parts = []
    if latency and (other := reference.at(batch)):
        where = "" if row.device == reference.device else f", on {row.device} against {reference.device}"
        parts.append(
            f"it is {_speed(other.p50 / latency.p50)} {reference.name} at batch {batch} "
            f"({latency.p50:.2f} against {other.p50:.2f} ms{where})"
        )
    parts.append(
        f"its file is {_size(row.megabytes / reference.megabytes)} "
        f"({row.megabytes:.2f} against {reference.megabytes:.2f} MB)"
    )
    parts.append(f"it {_loss(row)} ({row.images:,} images)")
    sentence = _listed(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _speed(ratio: float) -> str:
    if 0.95 < ratio < 1.05:
        return "as fast as"
    return f"{ratio:.1f} times as fast as" if ratio > 1 else f"{1 / ratio:.1f} times slower than"


def _size(ratio: float) -> str:
    if 0.95 < ratio < 1.05:
        return "as big"
    return f"{ratio:.1f} times as big" if ratio > 1 else f"{1 / ratio:.1f} times smaller"


def _loss(row: Row) -> str:
    drop = row.drop
    if drop.points < 0:
        return f"gains {-drop.points:.2f} points of top-1 (95% interval {0 - drop.high:+.2f} to {0 - drop.low:+.2f})"
    return f"loses {drop.points:.2f} points of top-1 (95% interval {drop.low:+.2f} to {drop.high:+.2f})"
