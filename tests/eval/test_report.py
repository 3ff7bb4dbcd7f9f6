"""The report on disk: JSON, Markdown, plots and the HTML page, with strings meant to break them."""

import ast
import html.parser
import io
import json
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from markupsafe import escape
from PIL import Image
from sample_report import HOSTILE, make_report, make_row, make_thumbnails

from eval.report.cautions import cautions
from eval.report.decision import Choice
from eval.report.markdown_html import markdown_to_html
from eval.report.page import (
    SHOWN_CLASSES,
    class_changes,
    how_to_use,
    key_figures,
    render_html,
    shown_diagrams,
    shown_flips,
)
from eval.report.pareto import decide
from eval.report.schema import FailedRow
from eval.report.table import markdown_table, not_measured
from eval.report.write_report import FILES, is_result, markdown_summary, summary, write_report
from illama.manifest import Drop
from illama.options import Constraints


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(make_report(), folder, make_thumbnails())
    return folder


class _Page(html.parser.HTMLParser):
    """The elements that a browser would find."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "srcset")]


def test_report_json_comes_back_as_it_was(folder):
    content = json.loads((folder / "report.json").read_text())
    expected = make_report()
    assert content.pop("warnings") == cautions(expected)
    assert content == json.loads(json.dumps(expected.to_json()))
    assert content["schema_version"] == 2
    assert content["rows"][1]["flipped"][0] == {"image": 0, "label": 0, "before": 0, "after": 2}
    assert content["rows"][1]["change"]["flips"]["lost"] == [0, 1, 2]
    keys = [{name: row[name] for name in ("scheme", "runtime_id", "file")} for row in content["rows"]]
    decision = content["decision"]
    assert decision["reference"] == keys[0] and decision["choice"]["row"] == keys[1]
    assert decision["pareto"]["1"] == [keys[0], keys[1]] and decision["choice"]["rule"] == "fastest"
    assert {each["key"]["scheme"] for each in decision["choice"]["rejected"]} >= {"w4", "fp8"}


def test_summary_json_keeps_the_promised_form(folder):
    content = json.loads((folder / "summary.json").read_text())
    assert content == json.loads(json.dumps(summary(make_report())))
    assert content.keys() == {"rows", "machine", "versions"}
    assert content["rows"][1] == {
        "scheme": "int8",
        "runtime": "ONNX Runtime, CPU",
        "images": 1200,
        "top1": 92.9,
        "agreement": 99.4,
        "sqnr_db": None,
        "cosine": None,
        "drop": pytest.approx(0.1),
        "kept": "99%",
        "drop_ci95": [pytest.approx(-0.15), pytest.approx(0.35)],
        "onnx": "int8/model.onnx",
        "onnx_bytes": 2_000_000,
        "engine": None,
        "engine_bytes": None,
        "latency_ms": {"p50": 1.0, "p90": 1.3, "p99": 2.0, "batch": 1},
        "device": "a <CPU>",
    }
    assert content["rows"][4]["latency_ms"] is None and content["rows"][4]["device"] is None


def test_only_a_result_of_ours_may_be_replaced(tmp_path):
    write_report(make_report(), tmp_path)
    for row in make_report().rows:
        (tmp_path / row.scheme).mkdir(exist_ok=True)
    for left_by_a_killed_process in (".report.html.draft-0123456789abcdef", ".lock"):
        (tmp_path / left_by_a_killed_process).touch()
    assert is_result(tmp_path) and {path.name for path in tmp_path.iterdir()} >= set(FILES)
    (tmp_path / "notes.txt").write_text("mine")
    assert not is_result(tmp_path)
    (tmp_path / "notes.txt").unlink()
    for damaged in ('{"results": []}', '{"rows": [{"onnx": ""}]}', "no JSON", "[]"):
        (tmp_path / "summary.json").write_text(damaged)
        assert not is_result(tmp_path)
    assert not is_result(tmp_path / "nothing")


def test_the_plot_is_a_picture_of_a_slide_s_size(folder):
    assert min(Image.open(folder / "tradeoff.png").size) >= 600
    colors = Image.open(io.BytesIO((folder / "tradeoff.png").read_bytes())).convert("RGB").getcolors(1 << 24)
    assert (11, 87, 208) in {color for _, color in colors}  # a mark on the Pareto front


def test_what_a_reader_must_know_is_above_everything_else(folder):
    report = make_report()
    assert cautions(report) == []
    few = [replace(row, latency=[replace(each, p90=None) for each in row.latency]) for row in report.rows]
    poor = replace(
        report,
        rows=few,
        failed=[FailedRow("w9", "OpenVINO, CPU", "openvino", "model.onnx", "its logits are not finite")],
    )
    found = cautions(poor)
    assert len(found) == 2 and "w9" in found[0] and "p90" in found[1] and "fp8, TensorRT-RTX" not in found[1]
    late = replace(report.rows[1], latency=[replace(each, p90=3.3 * each.p50) for each in report.rows[1].latency])
    (found,) = cautions(replace(report, rows=[report.rows[0], late]))
    assert "3.3 times" in found and late.name in found and report.rows[0].name not in found
    text = render_html(poor, b"", {})
    assert 0 < text.index("w9, OpenVINO") < text.index("<h1>")
    rows = [replace(row, top1=replace(row.top1, percent=4.0)) for row in report.rows]
    assert "chance" in cautions(replace(report, rows=rows))[0]
    wide = [replace(row, drop=Drop(0.1, -2.0, 2.2)) if not row.reference else row for row in report.rows]
    assert "1,200 test images" in cautions(replace(report, rows=wide))[0]  # more than the limit of 0.8 points
    assert "99%" in cautions(replace(report, rows=wide, constraints=Constraints()))[0]


def test_the_first_screen_says_what_to_do(folder):
    report, place = make_report(), Path("runs/a b")
    steps = how_to_use(report, place)
    assert steps["path"] == "runs/a b/int8/model.onnx"
    assert shlex.split(steps["command"])[2:6] == ["--engine", steps["path"], "--runtime", "onnxruntime"]
    assert len(steps["code"].splitlines()) == 4 and ast.parse(steps["code"])
    text = render_html(report, b"", {}, place)
    assert text.index(str(escape(steps["command"]))) < text.index('id="tradeoff"')
    engine = replace(report.rows[1], engine="int8/engines/x/model.engine")
    steps = how_to_use(replace(report, rows=[report.rows[0], engine]), place)
    assert steps["path"].endswith("model.engine") and "--runtime" not in steps["command"]
    unbuilt = replace(report.rows[1], runtime_id="tensorrt", onnx="int8/model.fused.onnx")
    chosen = replace(report, rows=[unbuilt], decision=replace(report.decision, choice=Choice(unbuilt.key, "")))
    steps = how_to_use(chosen, place)
    assert shlex.split(steps["command"]) == ["python", "deploy/build.py", "runs/a b/int8"] and not steps["code"]
    assert "Code to run" not in render_html(chosen, b"", {})
    nothing = replace(report, decision=replace(report.decision, choice=Choice(None, "none")))
    assert how_to_use(nothing, place) == {} and "No recommendation" in render_html(nothing, b"", {})


def test_few_files_have_a_reliability_diagram():
    rows = make_report().rows
    assert [row.scheme for row in shown_diagrams(make_report())] == ["fp32", "int8", "w4"]  # w4 is not calibrated
    assert len(rows) == 5


def test_the_table_is_aligned_and_marks_the_pareto_front():
    rows = make_report().rows
    lines = markdown_table(rows, 1, {rows[1].key}).splitlines()
    assert len(lines) == 2 + len(rows) and len({len(line) for line in lines}) == 1
    headings = ["scheme", "runs in", "top-1 %", "drop (95% interval)", "keeps"]
    headings += ["file MB", "engine MB", "p50 ms", "p90 ms"]
    assert [text.strip() for text in lines[0].strip("|").split("|")] == headings
    assert "reference" in lines[2] and "**int8**" in lines[3] and "+0.10 (-0.15 to +0.35)" in lines[3]
    assert "fp8\\|odd" in lines[4] and lines[6].split("|")[-3:-1] == [" -      ", " -      "]
    assert "| 8.00 " in markdown_table(rows[1:2], 8) and "unfused" in markdown_table([replace(rows[4], fused=False)])


def test_the_markdown_summary_says_all_in_few_lines(folder):
    text = (folder / "report.md").read_text()
    assert text == markdown_summary(make_report()) and len(text.splitlines()) < 25
    assert text.startswith("**int8, ONNX Runtime, CPU ") and text.count("**int8**") == 1
    assert "1,200" in text and "- No GPU." in text and "a \\<CPU>" in text
    assert "<script>" not in text.replace("\\<script>", "")


def test_notes_of_one_reason_stand_together():
    report = make_report()
    report.rows = [make_row("a, x", 90, None, note="why"), make_row("b, x", 90, None, note="why")]
    assert not_measured(report) == ["No GPU.", "a, x; b, x: why"]


def test_the_page_holds_no_markup_of_others_and_no_address(folder):
    text = (folder / "report.html").read_text()
    page = _Page(text)
    assert page.tags.count("script") == 2 and page.tags.count("style") == 1
    assert page.tags.count("img") == 1 + len(make_thumbnails())
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert HOSTILE not in text and "<img src=x" not in text
    assert "default-src &#39;none&#39;" in text and "unsafe" not in text
    assert len(text) < 500_000


@pytest.mark.parametrize(
    "uri", ["http://far.example/a.png", "data:image/svg+xml;base64,AA", 'data:image/png;base64," x']
)
def test_a_thumbnail_is_a_picture_or_refused(uri, tmp_path):
    with pytest.raises(ValueError, match="3"):
        write_report(make_report(), tmp_path, {3: uri})
    assert not list(tmp_path.iterdir())


def test_a_section_with_nothing_to_show_is_left_out_except_what_was_not_measured():
    report = make_report()
    report.rows = [make_row("fp32, ONNX Runtime, CPU", 93.0, None, reference=True, change=None, scaled=None)]
    report.decision = decide(report.rows, report.constraints)
    report.layers, report.others, report.not_run, report.findings = {}, [], [], {}
    text = render_html(report, b"", {})
    present = {
        name
        for name in ("latency", "classes", "flips", "layers", "findings", "others", "missing", "made", "accuracy")
        if f'<h2 id="{name}"' in text
    }
    assert present == {"missing", "made", "accuracy"}


def test_a_report_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rows"):
        write_report(replace(make_report(), rows=[]), tmp_path)
    assert not list(tmp_path.iterdir())


def test_key_figures_are_of_the_row_that_was_chosen():
    report = make_report()
    top1, latency, size, agreement = key_figures(report, report.rows[1])
    assert [each.value for each in (top1, latency, size, agreement)] == ["92.90", "1.00", "2.00", "99.40"]
    assert "+0.10" in top1.remark and "4.00" in latency.remark and "3.0" in size.remark
    assert "6 of 1,200" in agreement.remark
    assert "1.5" in key_figures(report, report.rows[4])[1].remark  # not timed, and larger than the reference
    assert key_figures(report, None) == []


def test_classes_come_worst_first_and_only_the_largest_changes_are_shown():
    lines = class_changes(make_report())
    largest = [max((change for change, _, _ in line.changes), key=abs) for line in lines]
    assert largest == sorted(largest) and lines[0].name == "class 59" and len(lines) == 60
    shown = [line.shown for line in lines]
    assert sum(shown) == SHOWN_CLASSES and shown == sorted(shown[:30], reverse=True) + sorted(shown[30:])


def test_flips_are_of_three_kinds_the_lost_first():
    flipped = make_report().rows[1].flipped
    row = make_row("a, b", 90, None, flipped=flipped[::-1])
    assert [kind for kind, _ in shown_flips(row)] == ["right to wrong"] * 2 + ["wrong to right", "wrong to wrong"]
    kinds = Counter(kind for kind, _ in shown_flips(replace(row, flipped=flipped * 20)))
    assert kinds == {"right to wrong": 8, "wrong to right": 8, "wrong to wrong": 8}
    few = [flip for flip in flipped if flip.before != flip.label] + flipped * 20
    lost = [flip for flip in flipped if flip.before == flip.label] * 20
    kinds = Counter(kind for kind, _ in shown_flips(replace(row, flipped=[*few[:2], *lost])))
    assert kinds == {"right to wrong": 22, "wrong to right": 1, "wrong to wrong": 1}


def test_markdown_of_others_becomes_tables_without_markup_links_or_pictures():
    text = markdown_to_html(make_report().others[0].markdown + "\n\n[a](javascript:b)\n\n| a |\n|---|\n| `x` |")
    page = _Page(text)
    assert page.tags.count("table") == 2 and not page.addresses and not {"img", "a", "script"} & set(page.tags)
    assert '<th scope="col" class="number">top-1 %</th>' in text and '<th scope="col">corruption</th>' in text
    assert "style" not in text and "<h4>" in text and "<code>x</code>" in text


def test_constraints_on_a_batch_that_was_not_timed_are_drawn_at_one_that_was():
    text = render_html(replace(make_report(), constraints=Constraints(64)), b"", {})
    assert '<span class="batch">1</span>' in text
