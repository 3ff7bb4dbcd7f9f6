"""Which row of a report to deploy: the Pareto front, the constraints, and a summary of the choice in two sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from eval.metrics.paired import images_to_tell, unseen_points
from eval.report.decision import Choice, Decision, Rejected, RowKey, Rule, Violation
from eval.report.schema import Row
from illama.options import Constraints, check_bounds

PAYS = 1.02  # how many times as fast as the best float file a quantized file must be
_TIE = 1.05  # latencies whose ratio is smaller count as equal: runs differ by as much
_RULES: dict[Rule, str] = {
    "fastest": "the fastest of",
    "smallest of the fastest": "the smallest of those within 5% of the fastest of",
    "most accurate": "the most accurate of",
    "smallest": "the smallest of",
}


def decide(rows: Sequence[Row], constraints: Constraints) -> Decision:
    """Returns the decision of a report with these rows; raises UserError as :func:`choose` does."""
    batches = sorted({constraints.batch, *(each.batch for row in rows for each in row.latency)})
    reference = find_reference(rows)
    fronts = {batch: pareto_front(rows, batch) for batch in batches}
    return Decision(reference.key if reference else None, fronts, choose(rows, constraints))


def find_reference(rows: Sequence[Row]) -> Row | None:
    """Returns the row that the others are compared with; None if there is none."""
    return next((row for row in rows if row.reference), None)


def pareto_front(rows: Sequence[Row], batch: int = 1) -> tuple[RowKey, ...]:
    """Returns the Pareto-optimal rows, among the rows of each device that were timed at ``batch``.

    A row dominates another if it is at least as fast (p50) and at least as accurate (top-1), and better in one of them.
    """
    timed = [(row, latency.p50) for row in rows if (latency := row.at(batch))]

    def dominates(one: tuple[Row, float], other: tuple[Row, float]) -> bool:
        (a, fast), (b, slow) = one, other
        no_worse = a.device == b.device and fast <= slow and a.top1.percent >= b.top1.percent
        return no_worse and (fast < slow or a.top1.percent > b.top1.percent)

    return tuple(each[0].key for each in timed if not any(dominates(other, each) for other in timed))


def find_violations(row: Row, constraints: Constraints) -> tuple[Violation, ...]:
    """Returns the constraints that a row violates; a row that was not timed violates one on latency."""
    latency, batch = row.at(constraints.batch), constraints.batch
    measured = {
        "latency": (latency.p50 if latency else None, constraints.latency_ms),
        "drop": (row.drop.high, constraints.drop),
        "size": (row.megabytes, constraints.megabytes),
    }
    return tuple(
        Violation(name, value, limit, batch)  # type: ignore[arg-type]
        for name, (value, limit) in measured.items()
        if limit is not None and (value is None or value > limit)
    )


def choose(rows: Sequence[Row], constraints: Constraints | None = None) -> Choice:
    """Chooses the row to deploy.

    With a limit on the drop, or without constraints, it is the fastest row that satisfies the constraints; of those
    within 5% of the fastest, the smallest. With constraints on latency or size alone, it is the most accurate (ties:
    the faster, then the smaller).

    Quantization must pay: a quantized row is chosen only if it is :data:`PAYS` times as fast as every float row on its
    device that satisfies the constraints, or if there is a limit on the size. A row that was not timed is chosen only
    for its size.

    Raises:
        UserError: a limit is not a number, or one on latency or size is not positive.
    """
    constraints = constraints or Constraints()
    check_bounds(constraints)
    batch, for_size = constraints.batch, constraints.megabytes is not None
    rejected = tuple(Rejected(row.key, found) for row in rows if (found := find_violations(row, constraints)))
    refused = {each.key for each in rejected}
    satisfying = [row for row in rows if row.key not in refused]
    timed = [row for row in satisfying if row.at(batch)]
    if not satisfying:
        return Choice(None, _closest(rows, rejected, constraints), rejected=rejected)
    if not timed and not for_size:
        sentence = f"There is no recommendation: no file{_limits(constraints)} was timed at batch {batch}."
        return Choice(None, sentence, rejected=rejected)
    worth = timed if for_size else [row for row in timed if not row.quantized or _pays(row, timed, batch)]
    worthy = {row.key for row in worth}
    lost = [row for row in timed if row.key not in worthy]
    rule: Rule
    if constraints.drop is None and _limits(constraints):
        pool = satisfying if for_size else worth
        row = min(pool, key=lambda each: (-each.top1.percent, _p50(each, batch), each.megabytes))
        rule = "most accurate"
    elif timed:
        row, rule = _fastest(worth, batch)
        pool = timed if row.quantized else worth  # it is faster than those left out
    else:
        row, rule, pool = min(satisfying, key=lambda row: (row.megabytes, -row.top1.percent)), "smallest", satisfying
    reason, not_worth_it = _sentence(row, rule, pool, rows, constraints), None
    if lost and not row.quantized:
        best = min(lost, key=lambda each: _p50(each, batch))
        reason, not_worth_it = f"{_does_not_pay(best, timed, batch)} {reason}", best.key
    sentence = f"{reason} {_figures(row, rows, batch)}"
    return Choice(row.key, sentence, rule, len(pool), rejected, not_worth_it, reason)


def _fastest_float(row: Row, timed: Sequence[Row], batch: int) -> Row | None:
    """Returns the fastest float row on the device of a row; None if there is none."""
    floats = [each for each in timed if not each.quantized and each.device == row.device]
    return min(floats, key=lambda each: _p50(each, batch), default=None)


def _pays(row: Row, timed: Sequence[Row], batch: int) -> bool:
    """Whether a quantized row is worth it for its speed alone."""
    best = _fastest_float(row, timed, batch)
    return best is None or _p50(best, batch) >= PAYS * _p50(row, batch)


def _does_not_pay(row: Row, timed: Sequence[Row], batch: int) -> str:
    best = _fastest_float(row, timed, batch)
    assert best is not None
    speed = f"{_p50(best, batch) / _p50(row, batch):.2f} times as fast as {best.name}"
    return f"{row.scheme.upper()} does not pay here: at batch {batch}, {row.name} is {speed}."


def _fastest(timed: Sequence[Row], batch: int) -> tuple[Row, Rule]:
    fastest = min(_p50(row, batch) for row in timed)
    tied = [row for row in timed if _p50(row, batch) <= fastest * _TIE]
    row = min(tied, key=lambda row: (row.megabytes, _p50(row, batch), -row.top1.percent))
    return row, "fastest" if _p50(row, batch) == fastest else "smallest of the fastest"


def _p50(row: Row, batch: int) -> float:
    latency = row.at(batch)
    return latency.p50 if latency else math.inf


def _limits(constraints: Constraints) -> str:
    """Returns the constraints as text, such as " within 3 ms at batch 1 and 2 MB"; empty without constraints."""
    parts = []
    if constraints.latency_ms is not None:
        parts.append(f"{constraints.latency_ms:g} ms at batch {constraints.batch}")
    if constraints.drop is not None:
        parts.append(f"a drop of {constraints.drop:g} points")
    if constraints.megabytes is not None:
        parts.append(f"{constraints.megabytes:g} MB")
    return f" within {_listed(parts)}" if parts else ""


def _listed(parts: Sequence[object]) -> str:
    *first, last = map(str, parts)
    return " and ".join(filter(None, [", ".join(first), last]))


def _sentence(row: Row, rule: Rule, pool: Sequence[Row], rows: Sequence[Row], constraints: Constraints) -> str:
    """Returns the sentence that names the chosen row and the rule."""
    batch = constraints.batch
    left_out = any(row.quantized and row.at(batch) for row in rows) and not any(row.quantized for row in pool)
    files = ("float file" if left_out else "file") + ("s" if len(pool) > 1 else "")
    if rule in ("fastest", "smallest of the fastest"):
        files += f" timed at batch {batch}"
    place = f"{_RULES[rule]} the {len(pool)} {files}" if len(pool) > 1 else f"the only {files}"
    untimed = "" if row.at(batch) else f"; it was not timed at batch {batch}"
    if not any(each.at(batch) for each in rows):
        untimed = f"; nothing was timed at batch {batch}"
    name = f"{row.name}, the reference itself," if row.reference else row.name
    return f"{name} is {place}{_limits(constraints)}{untimed}."


def _closest(rows: Sequence[Row], rejected: Sequence[Rejected], constraints: Constraints) -> str:
    """Returns the text if no row satisfies the constraints: the row that violates the fewest, by the least.

    Of rows that are equally close, it is the fastest. If a row is rejected only because there are too few test images
    for the limit on the drop, the text says so.
    """
    if not rows:
        return "Nothing was measured."
    found = {row.key: row for row in rows}

    def distance(each: Rejected) -> tuple[int, float, float]:
        row = found[each.key]
        measured = [replace(one, value=row.drop.points) if one.constraint == "drop" else one for one in each.violations]
        return len(measured), max(0.0, *(one.excess for one in measured)), _p50(row, constraints.batch)

    least = min(rejected, key=distance)
    row, limit = found[least.key], constraints.drop
    sentence = f"No file is{_limits(constraints)}. {row.name} is the closest: it {_listed(least.violations)}."
    if limit is not None and limit > 0 and any(each.drop.points <= limit < each.drop.high for each in rows):
        needed = f": at least {images_to_tell(limit):,} are needed" if unseen_points(row.images) > limit else ""
        sentence += f" {row.images:,} test images are too few to tell {limit:g} points{needed}."
    return sentence


def _figures(row: Row, rows: Sequence[Row], batch: int) -> str:
    """Returns a sentence that compares a row with the reference; for the reference, one with its own figures."""
    latency = row.at(batch)
    reference = find_reference(rows)
    if reference is None or row is reference:
        speed = f"It takes {latency.p50:.2f} ms per call at batch {batch}, its" if latency else "Its"
        accuracy = f"its {row.metric} is {row.top1.percent:.2f}% ({row.images:,} images)"
        accuracy = accuracy if row.labeled else f"the others are compared with it on {row.images:,} images"
        return f"{speed} file has {row.megabytes:.2f} MB and {accuracy}."
    parts = []
    if latency and (other := reference.at(batch)):
        devices = "" if row.device == reference.device else f", on {row.device} against {reference.device}"
        parts.append(
            f"it is {_times(other.p50 / latency.p50, 'as fast as', 'slower than')} {reference.name} at batch {batch} "
            f"({latency.p50:.2f} against {other.p50:.2f} ms{devices})"
        )
    parts.append(
        f"its file is {_times(row.megabytes / reference.megabytes, 'as large', 'smaller')} "
        f"({row.megabytes:.2f} against {reference.megabytes:.2f} MB)"
    )
    parts.append(f"it {_loss(row) if row.labeled else _agreement(row, reference)} ({row.images:,} images)")
    sentence = _listed(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _times(ratio: float, same: str, less: str) -> str:
    """Returns a ratio in words: "2.0 times as large", "as large" or "2.0 times smaller"."""
    if 0.95 < ratio < 1.05:
        return same
    return f"{ratio:.1f} times {same}" if ratio > 1 else f"{1 / ratio:.1f} times {less}"


def _agreement(row: Row, reference: Row) -> str:
    sqnr = "" if row.sqnr is None else f", with an SQNR of {row.sqnr:.1f} dB"
    same = f"{row.top1.percent:.2f}% of the images (95% interval {row.top1.low:.2f} to {row.top1.high:.2f})"
    if row.features:
        return f"finds the nearest image that {reference.name} finds for {same}{sqnr}"
    return f"predicts the class that {reference.name} predicts for {same}{sqnr}"


def _loss(row: Row) -> str:
    drop, metric = row.drop, row.metric
    if drop.points < 0:
        return f"gains {-drop.points:.2f} points of {metric} (95% interval {0 - drop.high:+.2f} to {0 - drop.low:+.2f})"
    return f"loses {drop.points:.2f} points of {metric} (95% interval {drop.low:+.2f} to {drop.high:+.2f})"
