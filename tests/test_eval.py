"""Drops with their intervals, latency, and the report."""

import html.parser
import json

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.accuracy_drop import Drop, paired_drop
from eval.latency import Latency, measure_latency
from eval.report import Row, Summary, headline, is_result, markdown_table, render_html, write_report


def _right(seed, count=500, accuracy=0.9):
    return np.random.default_rng(seed).random(count) < accuracy


def test_the_interval_is_a_paired_bootstrap_s():
    reference, other = _right(0), _right(0) & _right(1, accuracy=0.97)
    drop = paired_drop(reference, other, resamples=40_000)
    expected = scipy.stats.bootstrap(
        (reference.astype(float), other.astype(float)), lambda a, b: (a.mean() - b.mean()) * 100, paired=True,
        vectorized=False, n_resamples=4000, method="percentile", random_state=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    assert drop.points == pytest.approx((reference.mean() - other.mean()) * 100)
    assert (drop.low, drop.high) == pytest.approx((expected.low, expected.high), abs=0.2)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=50))
def test_drops_mirror_each_other_and_lie_in_their_interval(pairs):
    one, other = np.array(pairs).T
    drop, mirror = paired_drop(one, other), paired_drop(other, one)
    assert drop.points == -mirror.points
    assert drop.low - 1e-9 <= drop.points <= drop.high + 1e-9
    assert paired_drop(one, one) == Drop(0.0, 0.0, 0.0)


def test_arrays_that_are_not_pairs_are_refused():
    with pytest.raises(ValueError):
        paired_drop(np.ones(3, bool), np.ones(4, bool))
    with pytest.raises(ValueError):
        paired_drop(np.ones(0, bool), np.ones(0, bool))


def test_every_engine_is_timed_in_every_round():
    calls = []
    engines = {name: lambda images, name=name: calls.append(name) or images for name in "ab"}
    result = measure_latency(engines, np.zeros((4, 1)), rounds=5, calls=2, settle=1)
    assert calls == ["a", "a", "a", "b", "b", "b"] * 5
    assert result["a"].batch == 4 and 0 <= result["a"].p50 <= result["a"].p99


@pytest.fixture
def summary():
    rows = [
        Row("fp32", "ONNX Runtime, CPU", "onnxruntime", 1000, 93.1, Drop(0, 0, 0), "fp32/model.onnx", 6_000_000,
            latency=Latency(2.0, 3.0, 1), device="a <CPU>"),
        Row("int8", "ONNX Runtime, CPU", "onnxruntime", 1000, 93.0, Drop(0.1, -0.05, 0.25), "int8/model.onnx",
            2_000_000, latency=Latency(1.0, 1.5, 1), device="a <CPU>"),
        Row("fp8", "TensorRT-RTX", "onnxruntime", 1000, 93.2, Drop(-0.1, -0.3, 0.1), "fp8/model.fused.onnx", 2_000_000,
            "fp8/engines/tensorrt_rtx.engine", 9_000_000, note="not run"),
    ]  # fmt: skip
    return Summary(rows, "python quant/ptq.py", "a & b", "weights", 512, {"cpu": "a <CPU>", "cores": 2}, {"torch": "2"},
                   {"quantize": 1.5}, ["No GPU."])  # fmt: skip


def test_summary_json_has_the_promised_fields(summary):
    content = json.loads(json.dumps(summary.to_json()))
    row = content["rows"][1]
    assert row["drop"] == 0.1 and row["drop_ci95"] == [-0.05, 0.25]
    assert row["latency_ms"] == {"p50": 1.0, "p99": 1.5, "batch": 1}
    assert {
        "scheme",
        "runtime",
        "images",
        "top1",
        "onnx",
        "onnx_bytes",
        "engine",
        "engine_bytes",
        "device",
    } <= row.keys()
    assert content["rows"][2]["latency_ms"] is None
    assert {"machine", "versions"} <= content.keys()


def test_the_headline_and_the_table(summary):
    sentence = headline(summary.rows)
    assert "2.0 times as fast" in sentence and "3.0 times smaller" in sentence and "loses 0.10 points" in sentence
    table = markdown_table(summary.rows).splitlines()
    assert len(table) == 5 and len({len(line) for line in table}) == 1
    assert "+0.10 (-0.05 to +0.25)" in table[3] and " - " in table[4]
    assert headline(summary.rows[2:]) == "Nothing was timed."
    assert "faster" in headline(summary.rows[:1])


def test_only_a_result_of_ours_may_be_replaced(summary, tmp_path):
    write_report(summary, tmp_path)
    (tmp_path / "fp32").mkdir()
    assert is_result(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    assert not is_result(tmp_path)
    (tmp_path / "notes.txt").unlink()
    (tmp_path / "summary.json").write_text('{"results": []}')
    assert not is_result(tmp_path)


class _Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.outside, self.tags = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.outside += [v for k, v in attributes if k in ("src", "href") and v and not v.startswith("#")]


def test_the_html_report_stands_alone(summary):
    page = render_html(summary)
    parser = _Links()
    parser.feed(page)
    assert not parser.outside and "script" not in parser.tags and "svg" in parser.tags
    assert parser.tags.count("tr") == 4
    assert "a &lt;CPU&gt;" in page and "<CPU>" not in page
    assert "No GPU." in page and headline(summary.rows).split(",")[0] in page
