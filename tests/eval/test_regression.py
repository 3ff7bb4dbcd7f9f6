"""What is a regression compared with a baseline, and what is not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from project_files import ROOT
from sample_report import make_reliability, make_report, make_row

from eval.measure.targets import BenchmarkTarget, scheme_names
from eval.report.decision import RowKey
from eval.report.regression import Baseline, Tolerances, compare_markdown, find_regressions
from illama.errors import UserError
from illama.manifest import Drop

BASELINE = Baseline.of(make_report())


def _changed(index=1, **fields):
    report = make_report()
    report.rows[index] = replace(report.rows[index], **fields)
    return report


def _slower(row, factor):
    return [replace(each, p50=each.p50 * factor, p90=each.p90 * factor) for each in row.latency]


def test_a_report_is_no_worse_than_itself():
    assert find_regressions(BASELINE, make_report()) == []
    assert "\n- " not in compare_markdown(BASELINE, make_report(), [])


@settings(deadline=None, max_examples=30)
@given(st.floats(0.01, 100))
def test_the_speed_of_the_machine_cancels(factor):
    report = make_report()
    report.rows = [replace(row, latency=_slower(row, factor)) for row in report.rows]
    assert find_regressions(BASELINE, report) == []


@settings(deadline=None, max_examples=30)
@given(st.floats(0.5, 2))
def test_latency_is_worse_beyond_a_tenth_and_what_calls_vary_by(factor):
    row = make_report().rows[1]
    found = find_regressions(BASELINE, _changed(latency=_slower(row, factor), device="another"))
    assert len(found) == (2 if factor > 1.3 else 0)  # their p90 is 1.3 times their p50
    calm_before = tuple(replace(each, p90=each.p50) for each in BASELINE.rows[1].latency)
    rows = list(BASELINE.rows)
    steady = replace(BASELINE, rows=(rows[0], replace(rows[1], latency=calm_before), *rows[2:]))
    calm = [replace(each, p90=each.p50) for each in _slower(row, factor)]
    assert len(find_regressions(steady, _changed(latency=calm, device="another"))) == (2 if factor > 1.1 else 0)
    assert all(f"{0.25 * factor:.2f}" in line and "another" in line and "a <CPU>" in line for line in found)


def test_a_batch_size_that_is_no_longer_timed_is_named():
    found = find_regressions(BASELINE, _changed(latency=[]))
    assert len(found) == len(make_report().rows[1].latency) and all(
        line.startswith("int8, ONNX Runtime, CPU: ") for line in found
    )
    assert sorted(line[-1] for line in found) == ["1", "8"]
    report = make_report()
    without = Baseline.of(_changed(latency=[]))
    assert find_regressions(without, report) == []  # one that is new is none


def test_a_faster_reference_makes_no_other_slower():
    report = make_report()
    report.rows[0] = replace(report.rows[0], latency=_slower(report.rows[0], 0.5))
    assert find_regressions(BASELINE, report) == []


def test_a_network_that_lost_everywhere_is_worse():
    report = make_report()
    fallen = replace(report.rows[0].top1, percent=report.rows[0].top1.low - 0.01)
    report.rows[0] = replace(report.rows[0], top1=fallen)
    (line,) = find_regressions(BASELINE, report)
    assert line.startswith(report.rows[0].name) and "top-1" in line


@settings(deadline=None, max_examples=100)
@given(st.floats(-2, 2), st.floats(0.001, 1))
def test_a_drop_is_worse_beyond_the_tolerance_and_beyond_chance(points, half):
    old = make_report().rows[1].drop
    found = find_regressions(BASELINE, _changed(drop=Drop(points, points - half, points + half)))
    growth = points - old.points
    noise = (half**2 + (old.high - old.points) ** 2) ** 0.5
    if abs(growth - noise) > 1e-6 and abs(growth - 0.1) > 1e-6:
        assert bool(found) == (growth > 0.1 and growth > noise)
    assert all(line.startswith("int8, ONNX Runtime, CPU: ") and f"{points:+.2f}" in line for line in found)


@pytest.mark.parametrize(
    ("index", "fields", "words"),
    [
        (1, {"onnx_bytes": 2_100_001}, "2,100,001"),
        (1, {"onnx_bytes": 2_099_999}, None),
        (4, {"engine_bytes": 10_000_000}, "11.1%"),
        (4, {"fused": False}, "fused"),
        (1, {"reliability": make_reliability(0.0901)}, "0.0901"),
        (1, {"reliability": make_reliability(0.0899)}, None),
        (1, {"reliability": replace(make_reliability(0.08), nll=0.3201)}, "0.3201"),
        (1, {"reliability": make_reliability(0.0)}, None),
        (1, {"scheme": "renamed"}, "int8"),
        (1, {"file": "other.onnx"}, "int8"),
        (1, {"runtime": "renamed"}, None),
    ],
)
def test_each_other_kind_in_one_plain_line(index, fields, words):
    found = find_regressions(BASELINE, _changed(index, **fields))
    assert len(found) == (words is not None) and all(words in line and "\n" not in line for line in found)


def test_tolerances_are_the_user_s():
    report = _changed(onnx_bytes=2_500_000)
    assert find_regressions(BASELINE, report) and not find_regressions(BASELINE, report, Tolerances(size=0.3))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": "cifar10"}, "data"),
        ({"classes": ("a", "b")}, "classes"),
        ({"rows": [replace(row, images=10) for row in make_report().rows]}, "1200.*10"),
        ({"rows": make_report().rows[1:]}, "fp32.*none"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, words):
    with pytest.raises(UserError, match=words):
        find_regressions(BASELINE, replace(make_report(), **change))


def test_a_damaged_baseline_is_refused(tmp_path):
    whole = make_report().to_json()
    for damaged in ({}, {**whole, "rows": [{}]}, {**whole, "rows": None}, {**whole, "schema_version": 3}, []):
        (tmp_path / "report.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=r"report\.json"):
            Baseline.read(tmp_path / "report.json")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("latency", 0, "p50"), 0.0),
        (("latency", 0, "p50"), float("nan")),
        (("latency", 0, "p90"), float("inf")),
        (("drop", "points"), float("nan")),
        (("top1", "low"), float("inf")),
        (("reliability", "nll"), float("nan")),
        (("reliability", "ece"), 1.5),
        (("onnx_bytes",), -1),
    ],
)
def test_a_baseline_with_an_impossible_number_is_refused(place, value, tmp_path):
    """A comparison with NaN is always false, so that every regression would pass."""
    content = make_report().to_json()
    inner = content["rows"][1]
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"report\.json"):
        Baseline.read(tmp_path / "report.json")


def _as_version_1(report):
    """Returns the contents of the report as version 1 had them, from a CPU with bfloat16."""
    content = report.to_json()
    del content["decision"]
    content["schema_version"] = 1
    for row in content["rows"]:
        del row["file"]
        row["name"] = row["name"].replace("(f32)", "(bf16)")
    return content


@pytest.mark.parametrize("version", [1, 2])
def test_a_baseline_of_a_cpu_with_bfloat16_fits_one_without(version, tmp_path):
    """OpenVINO's float type is in the name of a row, and depends on the CPU."""
    report = make_report()
    engine = {"engine": "../a/int8/engines/rtx-sm86/model.engine", "file": "engines/rtx-sm86/model.engine"}
    report.rows = [
        *report.rows,
        make_row("int8, OpenVINO, CPU (f32)", 92.9, 1.0, runtime_id="openvino"),
        make_row("int8, TensorRT", 92.9, None, runtime_id="tensorrt", engine_bytes=9, **engine),
    ]
    before = replace(report, rows=[replace(row, runtime=row.runtime.replace("(f32)", "(bf16)")) for row in report.rows])
    content = before.to_json() if version == 2 else _as_version_1(report)
    (tmp_path / "report.json").write_text(json.dumps(content))
    baseline = Baseline.read(tmp_path / "report.json")
    assert find_regressions(baseline, report) == []
    assert "| - → 9" not in compare_markdown(baseline, report, [])
    gone = replace(report, rows=[row for row in report.rows if row.runtime_id != "openvino"])
    assert [line for line in find_regressions(baseline, gone) if "bf16" in line]


def test_an_old_baseline_fits_without_runtime_ids_and_in_a_folder_named_engines(tmp_path):
    report = make_report()
    ids = ("onnxruntime", "onnxruntime", "openvino", "torch", "tensorrt_rtx")
    report.rows = [replace(row, runtime_id=each) for row, each in zip(report.rows, ids, strict=True)]
    content = _as_version_1(report)
    for row in content["rows"]:
        del row["runtime_id"]
        row["onnx"] = f"../engines/{row['onnx']}"
        row["engine"] = row["engine"] and f"../engines/{row['engine']}"
    (tmp_path / "report.json").write_text(json.dumps(content))
    old = Baseline.read(tmp_path / "report.json")
    assert [row.key for row in old.rows] == [row.key for row in report.rows]
    assert find_regressions(old, report) == []


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("ptq", "engines/tensorrt_rtx-portable-1.8.64/model.engine"),
        ("throughput", "engines/tensorrt_rtx-portable-1.8.64/model.engine"),
    ],
)
def test_committed_reports_can_be_baselines(name, engine):
    baseline = Baseline.read(ROOT / "results" / name / "report.json")
    keys = {row.key for row in baseline.rows}
    assert len(keys) == len(baseline.rows)
    assert {RowKey("int8", "openvino", "model.onnx"), RowKey("int8", "onnxruntime", "model.onnx")} < keys
    assert RowKey("int8", "tensorrt_rtx", engine) in keys


def test_the_key_of_a_target_depends_neither_on_links_nor_on_the_cpu(tmp_path):
    (tmp_path / "0f").touch()
    (tmp_path / "int8").mkdir()
    file = tmp_path / "int8" / "model.onnx"
    file.symlink_to(tmp_path / "0f")
    one, other = (
        BenchmarkTarget("int8", file, None, "OpenVINO, CPU", "openvino", precision=each) for each in ("bf16", "f32")
    )
    assert one.key == other.key == RowKey("int8", "openvino", "model.onnx")
    assert (one.name, other.name) == ("int8, OpenVINO, CPU",) * 2


def test_the_names_of_bundles_do_not_depend_on_where_they_lie(tmp_path, monkeypatch):
    for root in ("here", "there/deeper"):
        folders = [tmp_path / root / name for name in ("a/int8", "b/int8", "fp32")]
        for folder in folders:
            folder.mkdir(parents=True)
        assert scheme_names(folders) == ["a/int8", "b/int8", "fp32"]
        monkeypatch.chdir(folders[0])
        assert scheme_names([Path(), *folders[1:]]) == ["a/int8", "b/int8", "fp32"]


def test_the_comparison_in_markdown():
    report = _changed(onnx_bytes=2_500_000)
    report.rows.append(replace(report.rows[1], scheme="new"))
    text = compare_markdown(BASELINE, report, find_regressions(BASELINE, report))
    assert "- int8, ONNX Runtime, CPU: " in text and "2,500,000" in text
    assert "| int8, ONNX Runtime, CPU | 92.90 → 92.90 | 0.10 → 0.10 | 0.25 → 0.25 | 2.00 → 2.50 | 0.30 → 0.30 |" in text
    assert "| new, ONNX Runtime, CPU | - → 92.90 |" in text and "fp8\\|odd" in text
