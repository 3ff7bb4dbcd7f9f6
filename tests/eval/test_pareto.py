"""The front, limits and the choice: properties of any table, and the sentences of a few."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.benchmark.latency import Latency
from eval.metrics.calibration import Reliability
from eval.metrics.paired import Drop, Share
from eval.report.pareto import choose, fits, pareto_front
from eval.report.schema import Row
from illama.errors import UserError
from illama.options import Constraints


def make_row(name, p50, top1, megabytes=5.0, drop=None, device="a CPU", reference=False, batch=1):
    latency = [] if p50 is None else [Latency(batch, p50, p50, p50, p50, 10)]
    return Row(
        name=name,
        scheme="int8",
        runtime="somewhere",
        runtime_id="onnxruntime",
        evaluated_with="something",
        images=1000,
        top1=Share(top1, top1 - 1, top1 + 1),
        top5=Share(99, 98, 100),
        reliability=Reliability(0, 0, 0, 0, ()),
        drop=drop or Drop(92 - top1, 91.5 - top1, 92.5 - top1),
        onnx=f"{name}/model.onnx",
        onnx_bytes=int(megabytes * 1e6),
        latency=latency,
        device=device,
        reference=reference,
    )


@st.composite
def tables(draw):
    few = st.integers(1, 6)
    values = draw(st.lists(st.tuples(st.one_of(st.none(), few), few, few, st.sampled_from("ab")), max_size=8))
    return [
        make_row(str(i), p50 and float(p50), 86.0 + top1, mb, device=device, reference=i == 0)
        for i, (p50, top1, mb, device) in enumerate(values)
    ]


def beats(one, other):
    a, b = (one.at(1).p50, -one.top1.percent), (other.at(1).p50, -other.top1.percent)
    return one.device == other.device and a != b and a[0] <= b[0] and a[1] <= b[1]


@settings(deadline=None)
@given(tables())
def test_nothing_beats_the_front_and_the_front_beats_all_else(rows):
    timed, names = [row for row in rows if row.at(1)], pareto_front(rows)
    best = [row for row in timed if row.name in names]
    assert names <= {row.name for row in timed}
    assert not any(beats(one, other) for one in timed for other in best)
    assert all(any(beats(one, row) for one in best) for row in timed if row.name not in names)


@settings(deadline=None)
@given(tables(), st.integers(0, 7))
def test_a_beaten_row_changes_nothing(rows, place):
    timed = [row for row in rows if row.at(1)]
    if timed:
        model = timed[place % len(timed)]
        worse = make_row("worse", model.at(1).p50 + 1, model.top1.percent, device=model.device)
        assert pareto_front([*rows, worse]) == pareto_front(rows)
        assert choose([*rows, worse]).row is choose(rows).row


maybe = st.one_of(st.none(), st.integers(1, 6).map(float))


@settings(deadline=None)
@given(tables(), maybe, maybe, maybe)
def test_a_choice_keeps_to_the_limits_and_is_the_best_that_does(rows, latency_ms, drop, megabytes):
    limits = Constraints(1, latency_ms, drop, megabytes)
    choice = choose(rows, limits)
    kept = [row for row in rows if not fits(row, limits)]
    assert choice.reasons == {row.name: fits(row, limits) for row in rows}
    assert choice.sentence.endswith(".") and "nan" not in choice.sentence and "inf" not in choice.sentence
    if choice.row is None:
        assert not kept or (limits == Constraints() and not any(row.at(1) for row in rows))
        return
    best = choice.row
    assert best in kept
    assert drop is None or best.drop.high <= drop
    assert latency_ms is None or best.at(1).p50 <= latency_ms
    if drop is None and limits != Constraints():
        assert best.top1.percent == max(row.top1.percent for row in kept)
    elif any(row.at(1) for row in kept):
        timed = [row for row in kept if row.at(1)]
        alike = [row for row in timed if row.at(1).p50 <= 1.05 * min(row.at(1).p50 for row in timed)]
        assert best in alike and best.megabytes == min(row.megabytes for row in alike)
    else:
        assert best.megabytes == min(row.megabytes for row in kept)


REFERENCE = make_row("fp32 in A", 4.0, 92.0, 6.0, Drop(0, 0, 0), reference=True)
FAST = make_row("int8 in B", 1.0, 91.5, 2.0, Drop(0.5, 0.1, 0.9))
BIG = make_row("fp16 in C", 2.0, 92.1, 9.0, Drop(-0.1, -0.3, 0.1))
SLOW = make_row("odd in D", 6.0, 91.9, 1.0, Drop(0.1, -0.1, 0.3))
NEVER = make_row("fp8 in E", None, 91.9, 1.5, Drop(0.1, -0.1, 0.3))
ROWS = [REFERENCE, FAST, BIG, SLOW, NEVER]


@pytest.mark.parametrize(
    ("limits", "name", "words"),
    [
        (
            Constraints(),
            "int8 in B",
            "int8 in B is the fastest of the 4 engines timed at batch 1. It is 4.0 times as fast as "
            "fp32 in A at batch 1 (1.00 against 4.00 ms), its "
            "file is 3.0 times smaller (2.00 against 6.00 MB) and it loses 0.50 points of top-1 (95% interval "
            "+0.10 to +0.90) (1,000 images).",
        ),
        (
            Constraints(drop=0.2),
            "fp16 in C",
            "fastest of the 2 engines timed at batch 1 within a loss of 0.2 points of top-1. "
            "It is 2.0 times as fast as fp32 in A at batch 1 (2.00 against 4.00 ms), its file is 1.5 times as big "
            "(9.00 "
            "against 6.00 MB) and it gains 0.10 points of top-1 (95% interval -0.10 to +0.30)",
        ),
        (
            Constraints(drop=0),
            "fp32 in A",
            "fp32 in A, the reference itself, is the only engine timed at batch 1 within a loss "
            "of 0 points of top-1. It takes 4.00 ms a call at batch 1, has 6.00 MB and is right on 92.00% of 1,000 "
            "images.",
        ),
        (Constraints(latency_ms=3, megabytes=3), "int8 in B", "the only engine within 3 ms at batch 1 and 3 MB."),
        (
            Constraints(latency_ms=3),
            "fp16 in C",
            "fp16 in C is the most accurate of the 2 engines within 3 ms at batch 1.",
        ),
        (Constraints(drop=0.35, megabytes=1.2), "odd in D", "1.5 times slower than fp32 in A"),
        (Constraints(megabytes=1.8), "odd in D", "most accurate of the 2 engines within 1.8 MB."),
        (
            Constraints(batch=8, drop=1.0),
            "odd in D",
            "is the smallest of the 5 engines within a loss of 1 points of top-1; "
            "nothing was timed at batch 8. Its file is 6.0 times smaller",
        ),
        (Constraints(batch=8), None, "Nothing was timed at batch 8"),
        (
            Constraints(latency_ms=0.9, drop=2),
            None,
            "No engine is within 0.9 ms at batch 1 and a loss of 2 points of top-1. "
            "int8 in B comes nearest: it takes 1 ms at batch 1, more than 0.9.",
        ),
        (Constraints(batch=8, latency_ms=3), None, "it was not timed at batch 8."),
    ],
)
def test_the_sentence_names_the_engine_its_rule_and_its_figures(limits, name, words):
    choice = choose(ROWS, limits)
    assert (choice.row.name if choice.row else None) == name
    assert words in choice.sentence


def test_another_device_and_an_untimed_choice_are_named():
    gpu = make_row("int8 on it", 0.5, 91.9, device="a GPU")
    assert "(0.50 against 4.00 ms, on a GPU against a CPU)" in choose([REFERENCE, gpu]).sentence
    tiny = make_row("small", None, 99.0, 1.0)
    assert "small is the most accurate" in (said := choose([*ROWS, tiny], Constraints(megabytes=7)).sentence)
    assert "; it was not timed at batch 1." in said
    assert pareto_front([REFERENCE, gpu]) == {"fp32 in A", "int8 on it"}
    assert choose([]).sentence == "Nothing was measured."


@pytest.mark.parametrize(
    "limits",
    [
        Constraints(latency_ms=0),
        Constraints(megabytes=-1),
        Constraints(batch=0),
        Constraints(drop=math.nan),
        Constraints(latency_ms=math.nan),
    ],
)
def test_limits_that_nothing_could_keep_to_are_refused(limits):
    with pytest.raises(UserError):
        choose(ROWS, limits)
