"""The Pareto front, constraints and the choice: properties of any table, and hand-written answers for one."""

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.measure.latency import Latency
from eval.metrics.calibration import Reliability
from eval.metrics.paired import Share
from eval.report.pareto import Violation, choose, find_violations, pareto_front
from eval.report.schema import Row
from illama.errors import UserError
from illama.manifest import Drop
from illama.options import Constraints


def make_row(name, p50, top1, megabytes=5.0, drop=None, device="a CPU", reference=False, batch=1, **more):
    latency = [] if p50 is None else [Latency(batch, p50, p50, p50, p50, 10)]
    return Row(
        scheme=name,
        runtime="somewhere",
        runtime_id="onnxruntime",
        file="model.onnx",
        evaluated_with="something",
        top1=Share(top1, top1 - 1, top1 + 1),
        top5=Share(99, 98, 100),
        reliability=Reliability(0, 0, 0, 0, ()),
        drop=drop or Drop(92 - top1, 91.5 - top1, 92.5 - top1),
        onnx=f"{name}/model.onnx",
        onnx_bytes=int(megabytes * 1e6),
        latency=latency,
        device=device,
        reference=reference,
        **{"images": 1000, **more},
    )


@st.composite
def tables(draw):
    few = st.integers(1, 6)
    values = draw(st.lists(st.tuples(st.one_of(st.none(), few), few, few, st.sampled_from("ab")), max_size=8))
    return [
        make_row(str(i), p50 and float(p50), 86.0 + top1, mb, device=device, reference=i == 0)
        for i, (p50, top1, mb, device) in enumerate(values)
    ]


def dominates(one, other):
    a, b = ((row.latency[0].p50, -row.top1.percent) for row in (one, other))
    return one.device == other.device and a != b and a[0] <= b[0] and a[1] <= b[1]


@settings(deadline=None)
@given(tables())
def test_no_row_dominates_the_pareto_front_and_the_front_dominates_all_others(rows):
    timed, keys = [row for row in rows if row.latency], pareto_front(rows)
    best = [row for row in timed if row.key in keys]
    assert set(keys) <= {row.key for row in timed}
    assert not any(dominates(one, other) for one in timed for other in best)
    assert all(any(dominates(one, row) for one in best) for row in timed if row.key not in keys)


@settings(deadline=None)
@given(tables(), st.integers(0, 7))
def test_a_dominated_row_changes_nothing(rows, place):
    timed = [row for row in rows if row.latency]
    if timed:
        model = timed[place % len(timed)]
        worse = make_row("worse", model.latency[0].p50 + 1, model.top1.percent, device=model.device)
        assert pareto_front([*rows, worse]) == pareto_front(rows)
        assert choose([*rows, worse]).row == choose(rows).row


maybe = st.one_of(st.none(), st.integers(1, 6).map(float))


def satisfies(row, latency_ms, drop, megabytes):
    """The constraints in numbers, apart from the code under test."""
    fast = latency_ms is None or (bool(row.latency) and row.latency[0].p50 <= latency_ms)
    return fast and (drop is None or row.drop.high <= drop) and (megabytes is None or row.onnx_bytes <= megabytes * 1e6)


@settings(deadline=None)
@given(tables(), maybe, maybe, maybe)
def test_a_choice_satisfies_the_constraints_and_is_the_best_that_does(rows, latency_ms, drop, megabytes):
    constraints = Constraints(1, latency_ms, drop, megabytes)
    choice = choose(rows, constraints)
    kept = [row for row in rows if satisfies(row, latency_ms, drop, megabytes)]
    assert {each.key for each in choice.rejected} == {row.key for row in rows} - {row.key for row in kept}
    assert choice.sentence.endswith(".") and "nan" not in choice.sentence and "inf" not in choice.sentence
    timed = [row for row in kept if row.latency]
    if not kept or (megabytes is None and not timed):
        assert choice.row is choice.rule is None
        return
    best = next(row for row in kept if row.key == choice.row)
    if drop is None and constraints != Constraints():
        assert choice.rule == "most accurate" and choice.among == len(kept)
        assert best.top1.percent == max(row.top1.percent for row in kept)
    elif timed:
        fastest = min(row.latency[0].p50 for row in timed)
        tied = [row for row in timed if row.latency[0].p50 <= 1.05 * fastest]
        assert best in tied and best.megabytes == min(row.megabytes for row in tied) and choice.among == len(timed)
        assert choice.rule == ("fastest" if best.latency[0].p50 == fastest else "smallest of the fastest")
    else:
        assert choice.rule == "smallest" and best.megabytes == min(row.megabytes for row in kept)


REFERENCE = make_row("fp32 in A", 4.0, 92.0, 6.0, Drop(0, 0, 0), reference=True)
FAST = make_row("int8 in B", 1.0, 91.5, 2.0, Drop(0.5, 0.1, 0.9))
BIG = make_row("fp16 in C", 2.0, 92.1, 9.0, Drop(-0.1, -0.3, 0.1))
SLOW = make_row("odd in D", 6.0, 91.9, 1.0, Drop(0.1, -0.1, 0.3))
NEVER = make_row("fp8 in E", None, 91.9, 1.5, Drop(0.1, -0.1, 0.3))
ROWS = [REFERENCE, FAST, BIG, SLOW, NEVER]


@pytest.mark.parametrize(
    ("constraints", "name", "rule", "among", "figures"),
    [
        (Constraints(), "int8 in B", "fastest", 4, "4.0 1.00 4.00 3.0 2.00 6.00 0.50 +0.10 +0.90"),
        (Constraints(drop=0.2), "fp16 in C", "fastest", 2, "0.2 2.0 2.00 4.00 1.5 9.00 6.00 0.10 -0.10 +0.30"),
        (Constraints(drop=0), "fp32 in A", "fastest", 1, "4.00 6.00 92.00"),
        (Constraints(latency_ms=3, megabytes=3), "int8 in B", "most accurate", 1, "3 4.0 3.0 0.50"),
        (Constraints(latency_ms=3), "fp16 in C", "most accurate", 2, "3 2.0 1.5 0.10"),
        (Constraints(drop=0.35, megabytes=1.2), "odd in D", "fastest", 1, "0.35 1.2 1.5 6.00 4.00"),
        (Constraints(megabytes=1.8), "odd in D", "most accurate", 2, "1.8 6.0 1.00 6.00"),
        (Constraints(batch=8, drop=1.0), None, None, 0, "8 1"),
        (Constraints(batch=8, drop=1.0, megabytes=9), "odd in D", "smallest", 5, "8 1 9 6.0 1.00"),
        (Constraints(batch=8), None, None, 0, "8"),
        (Constraints(latency_ms=0.9, drop=2), None, None, 0, "0.9 2 1"),
        (Constraints(batch=8, latency_ms=3), None, None, 0, "3 8"),
    ],
)
def test_the_row_its_rule_and_its_figures(constraints, name, rule, among, figures):
    choice = choose(ROWS, constraints)
    assert ((choice.row.scheme if choice.row else None), choice.rule, choice.among) == (name, rule, among)
    assert set(figures.split()) <= set(re.findall(r"[-+]?\d+(?:\.\d+)?", choice.sentence))
    assert name is None or (choice.sentence.startswith(name) and "1,000" in choice.sentence)


def test_of_two_equally_fast_engines_it_is_the_smaller():
    nearly = make_row("small", 1.04, 91.5, 1.0, Drop(0.5, 0.1, 0.9))
    choice = choose([*ROWS, nearly])
    assert choice.row == nearly.key and choice.rule == "smallest of the fastest"
    slower = make_row("small", 1.06, 91.5, 1.0, Drop(0.5, 0.1, 0.9))
    assert choose([*ROWS, slower]).row == FAST.key


def test_violations_are_numbers():
    assert find_violations(FAST, Constraints(1, 0.8, 0.6, 1.0)) == (
        Violation("latency", 1.0, 0.8),
        Violation("drop", 0.9, 0.6),
        Violation("size", 2.0, 1.0),
    )
    assert [each.excess for each in find_violations(FAST, Constraints(1, 0.8, 0.6, 1.0))] == pytest.approx(
        [0.25, 0.5, 1]
    )
    (untimed,) = find_violations(NEVER, Constraints(8, 3.0))
    assert untimed == Violation("latency", None, 3.0, 8) and untimed.excess == math.inf
    (worse,) = find_violations(FAST, Constraints(drop=0.0))
    assert worse.excess == pytest.approx(9)  # in tenths of a point
    assert find_violations(REFERENCE, Constraints(1, 4.0, 0.0, 6.0)) == ()


@pytest.mark.parametrize(
    ("constraints", "closest"),
    [
        (Constraints(latency_ms=0.9, drop=2), "int8 in B"),
        (Constraints(latency_ms=1.5, drop=0.35), "fp16 in C"),
        (Constraints(drop=-0.2, megabytes=1.2), "odd in D"),
    ],
)
def test_where_no_row_satisfies_them_the_closest_is_named(constraints, closest):
    sentence = choose(ROWS, constraints).sentence
    assert [row.scheme for row in ROWS if row.name in sentence] == [closest]


def make_quantized(p50, name="int8", **more):
    return make_row(name, p50, 91.9, 2.0, Drop(0.1, -0.1, 0.3), quantized=True, **more)


@pytest.mark.parametrize(
    ("p50", "constraints", "pays"),
    [
        (1.0, Constraints(), True),
        (3.9, Constraints(), True),
        (3.93, Constraints(), False),  # 1.018 times as fast, and smaller: but nobody asked for size
        (5.0, Constraints(drop=1), False),
        (5.0, Constraints(latency_ms=6), False),
        (5.0, Constraints(latency_ms=6, megabytes=3), True),
        (5.0, Constraints(drop=1, megabytes=9), False),  # the float file satisfies it, and is faster
    ],
)
def test_quantization_must_pay(p50, constraints, pays):
    quantized = make_quantized(p50)
    choice = choose([REFERENCE, quantized], constraints)
    assert choice.row == (quantized if pays else REFERENCE).key
    said = constraints.megabytes is None and not pays
    assert choice.not_worth_it == (quantized.key if said else None)
    assert choice.sentence.startswith("INT8 does not pay here: ") == said


def test_the_fastest_quantized_row_is_the_one_that_does_not_pay():
    rows = [REFERENCE, make_quantized(5.0), make_quantized(4.5, "fp8")]
    choice = choose(rows)
    assert choice.row == REFERENCE.key and choice.sentence.startswith("FP8 does not pay here: at batch 1, fp8")
    assert "0.89 times as fast as fp32" in choice.sentence and "the only float file" in choice.sentence
    both = choose([REFERENCE, make_quantized(1.0), make_quantized(4.5, "fp8")])
    assert both.row.scheme == "int8" and both.among == 3 and "the 3 files timed" in both.sentence
    on_gpu = make_quantized(3.99, "int4", device="a GPU")  # no float row was timed there
    assert choose([*rows, on_gpu]).row == on_gpu.key
    assert choose([*rows, make_quantized(1.0, "w4")]).row.scheme == "w4"


def test_the_closest_of_equally_close_rows_is_the_fastest_and_too_few_images_are_named():
    """With 100 images the interval of every drop ends above 0.3 points, whatever is lost."""
    few = [make_row(f"s{p50}", p50, 92.0, drop=Drop(0.0, -3.6, 3.6), images=100) for p50 in (6.0, 2.0, 1.0, 4.0)]
    sentence = choose(few, Constraints(drop=0.3)).sentence
    assert "s1.0, somewhere is the closest" in sentence and "s6.0" not in sentence
    assert "100 test images are too few to tell 0.3 points: at least 1,228 are needed" in sentence
    enough = [replace(row, images=1228) for row in few]
    assert "1,228 test images are too few to tell 0.3 points." in choose(enough, Constraints(drop=0.3)).sentence
    lossy = [make_row("lossy", 1.0, 82.0, drop=Drop(10, 9, 11))]
    assert "too few" not in choose(lossy, Constraints(drop=0.3)).sentence


@pytest.mark.parametrize(
    ("drop", "kept"),
    [
        (Drop(0.0, 0.0, 0.0), "99.9%"),
        (Drop(-0.5, -1, 0.09), "99.9%"),
        (Drop(0.0, -0.2, 0.2), "99%"),
        (Drop(0.5, 0.1, 0.92), "99%"),
        (Drop(0.5, 0.1, 0.94), "too few images"),
        (Drop(0.94, 0.8, 1.1), "too few images"),
    ],
)
def test_a_row_says_what_share_of_the_reference_it_keeps(drop, kept):
    """The reference has 92%, of which a hundredth is 0.92."""
    assert make_row("x", 1.0, 92 - drop.points, drop=drop).kept == kept


def test_another_device_and_an_untimed_choice_are_named():
    gpu = make_row("int8 on it", 0.5, 91.9, device="a GPU")
    sentence = choose([REFERENCE, gpu]).sentence
    assert all(text in sentence for text in ("0.50", "4.00", "a GPU", "a CPU"))
    tiny = make_row("small", None, 99.0, 1.0)
    assert choose([*ROWS, tiny], Constraints(megabytes=7)).row == tiny.key
    assert pareto_front([REFERENCE, gpu]) == (REFERENCE.key, gpu.key)
    assert choose([]).row is None and choose([]).rejected == ()


@pytest.mark.parametrize(
    "constraints",
    [
        Constraints(latency_ms=0),
        Constraints(megabytes=-1),
        Constraints(batch=0),
        Constraints(drop=math.nan),
        Constraints(latency_ms=math.nan),
    ],
)
def test_constraints_that_no_row_can_satisfy_are_refused(constraints):
    with pytest.raises(UserError):
        choose(ROWS, constraints)
