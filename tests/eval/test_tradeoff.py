"""python eval/tradeoff.py on networks with known answers, and mistakes that end in a one-line error."""

import html
import json
import re
import shlex
import shutil
import time
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from support import (
    SMALL,
    assert_one_line_error,
    run_command,
    write_images,
    write_linear_bundle,
    write_made_up_engine,
    write_untimed_baseline,
)

from deploy.runtimes.cpu_runtime import cpu_latencies
from deploy.runtimes.onnxruntime_engine import OnnxRuntimeEngine
from deploy.runtimes.temperature import read_temperature
from eval.measure.effort import describe_estimate, estimate_seconds, in_words
from eval.measure.machine import torch_on_all_cores
from eval.measure.targets import expand, in_calls_of
from illama import ILLaMA
from illama.bundle import CPU_ONNX, FUSED_ONNX
from illama.data.datasets import open_data
from illama.data.preprocessing import Preprocessing
from illama.golden_answers import GoldenAnswers, GoldenFacts
from illama.hardware import usable_cores
from illama.inference import load_images
from illama.manifest import Drop, Manifest
from quant.export.onnx_export import export_onnx

CLASSES = ["class0", "class1", "class2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two linear networks fitted to the training images, the second with more noise, and the images."""
    folder = tmp_path_factory.mktemp("tradeoff")
    images, labels = load_images(
        open_data(str(write_images(folder / "images"))).calibration(24),
        Preprocessing((16, 16), 3, (0.5,) * 3, (0.25,) * 3).transform(),
    )
    weights = np.linalg.lstsq(images.reshape(24, -1), np.eye(3)[labels], rcond=None)[0]
    for seed, (name, noise) in enumerate((("fp32", 0.06), ("int8", 0.05))):
        weights = weights + np.random.default_rng(seed).normal(size=weights.shape) * noise
        write_linear_bundle(folder / "runs" / name, weights, 16, CLASSES)
    (folder / "runs" / "notes.txt").write_text("not a bundle")
    return folder


@pytest.fixture
def tradeoff(runs, run_here, tmp_path):
    def run(*arguments, paths=(runs / "runs",), data=runs / "images", out=tmp_path / "out"):
        return run_here(
            "eval/tradeoff.py",
            *paths,
            "--data",
            data,
            "--out",
            out,
            "--batches",
            2,
            1,
            "--seconds",
            0.1,
            "--calibration-images",
            24,
            *arguments,
        )

    return run


def expected_classes(runs, name):
    """Returns the predicted classes of a bundle's weights, computed by numpy in float64, and the labels."""
    bundle = runs / "runs" / name
    data = open_data(str(runs / "images"))
    images, labels = load_images(data.test(), Manifest.read(bundle).preprocessing.transform())
    return (images.reshape(len(images), -1) @ weights_of(runs, name)).argmax(1), labels


def weights_of(runs, name):
    """Returns the weights of a bundle, float64."""
    model = onnx.load(runs / "runs" / name / "model.onnx")
    return onnx.numpy_helper.to_array(model.graph.initializer[0]).astype(np.float64)


def read_summary(folder):
    return json.loads((folder / "out" / "summary.json").read_text())


def test_the_report_says_what_numpy_computes(tradeoff, runs, tmp_path):
    result = tradeoff("--max-drop", 0, "--store")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert [row["reference"] for row in report["rows"]] == [True] + [False] * (len(rows) - 1)
    assert report["rows"][0]["drop"] == {"points": 0, "low": 0, "high": 0}
    assert set(report["findings"]) == {f"{row['scheme']}/model.onnx" for row in report["rows"]}
    assert any("--also" in reason for reason in report["not_run"])
    (before, labels), (after, _) = (expected_classes(runs, name) for name in ("fp32", "int8"))
    for scheme, classes in (("fp32", before), ("int8", after)):
        row = rows[f"{scheme}, ONNX Runtime, CPU"]
        assert row["top1"]["percent"] == pytest.approx((classes == labels).mean() * 100)
        assert [latency["batch"] for latency in row["latency"]] == [2, 1] and row["device"]
        assert row["latency"][0]["p50"] > 0
        # The temperature of the last runtime of a file is stored, and OpenVINO computes in bfloat16.
        timed = {each["runtime_id"]: each["latency"][1]["p50"] for each in report["rows"] if each["scheme"] == scheme}
        assert cpu_latencies(runs / "runs" / scheme / "model.onnx") == timed  # kept, not measured again
        assert row["temperature"] == pytest.approx(read_temperature(runs / "runs" / scheme / "model.onnx"), rel=0.05)
    row = rows["int8, ONNX Runtime, CPU"]
    lost = np.flatnonzero((before == labels) & (after != labels)).tolist()
    gained = np.flatnonzero((before != labels) & (after == labels)).tolist()
    assert (row["change"]["flips"]["lost"], row["change"]["flips"]["gained"]) == (lost, gained)
    assert row["drop"]["points"] == pytest.approx((len(lost) - len(gained)) / len(labels) * 100)
    assert [flip["image"] for flip in row["flipped"]][: len(lost)] == lost
    assert report["conditions"]["batch sizes"] == [2, 1] and report["conditions"]["threads"] >= 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('class="chosen"') == 1  # the reference has no drop against itself
    assert len(re.findall("<img[^>]*data:image/", page)) >= len(lost) + len(gained) > 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.html",
        "report.json",
        "report.md",
        "summary.json",
        "tradeoff.png",
    }
    assert "at batch 2" in result.stdout and result.stdout.count("\n| ") == 1 + len(rows)


def test_without_labels_it_is_agreement_and_sqnr(tradeoff, runs, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted((runs / "images" / "val").rglob("*.png"))):
        shutil.copyfile(path, flat / f"{number:03}.png")
    result = tradeoff(data=flat)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    rows, short = ({row["scheme"]: row for row in reversed(each["rows"])} for each in (report, read_summary(tmp_path)))
    pictures, _ = load_images(
        open_data(str(flat)).test(), Manifest.read(runs / "runs" / "int8").preprocessing.transform()
    )
    exact, other = (pictures.reshape(len(pictures), -1) @ weights_of(runs, name) for name in ("fp32", "int8"))
    same = (exact.argmax(1) == other.argmax(1)).mean() * 100
    assert 0 < same < 100 and rows["int8"]["images"] == len(pictures)
    assert rows["int8"]["top1"]["percent"] == rows["int8"]["change"]["agreement"] == pytest.approx(same)
    assert rows["int8"]["sqnr"] == pytest.approx(
        10 * np.log10((exact**2).sum() / ((other - exact) ** 2).sum()), abs=0.01
    )
    assert not rows["int8"]["labeled"] and rows["int8"]["reliability"] is None
    drop, top1 = rows["int8"]["drop"], rows["int8"]["top1"]
    assert [drop["low"], drop["high"]] == pytest.approx([100 - top1["high"], 100 - top1["low"]])
    assert short["int8"]["top1"] is None and short["int8"]["agreement"] == pytest.approx(same)
    text = result.stdout + (tmp_path / "out" / "report.md").read_text()
    page = (tmp_path / "out" / "report.html").read_text().split("<script", 1)[0]
    assert "top-1" not in text + page and "agreement" in text and "Calibration</h2>" not in page
    baseline = write_untimed_baseline(tmp_path / "out" / "report.json", tmp_path / "same.json")
    again = tradeoff("--fail-on-regression", baseline, data=flat, out=tmp_path / "again")
    assert again.returncode == 0, again.stderr


def test_the_page_s_command_and_code_run(tradeoff, runs, tmp_path, run_here):
    assert tradeoff("--max-megabytes", 100).returncode == 0
    page = html.unescape((tmp_path / "out" / "report.html").read_text())
    (command,), (code,) = (
        re.findall(rf'aria-label="{name}[^>]*><code>(.*?)</code>', page, re.S) for name in ("Command to", "Code to")
    )
    picture = next((runs / "images" / "val").rglob("*.png"))
    answer = run_here(*shlex.split(command)[1:-1], picture)
    assert answer.returncode == 0 and "%" in answer.stdout, answer.stderr
    shape = Manifest.read(runs / "runs" / "int8").preprocessing
    names = {"images": np.zeros((2, shape.in_channels, *shape.size), np.float32)}
    exec(code, names)
    assert names["logits"].shape[0] == 2


def test_images_that_flip_are_named_by_their_place_in_the_whole_split(tradeoff, runs, tmp_path):
    assert tradeoff("--images", 9).returncode == 0
    (before, _), (after, _) = (expected_classes(runs, name) for name in ("fp32", "int8"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (row,) = (row for row in report["rows"] if row["name"] == "int8, ONNX Runtime, CPU")
    every_second = np.arange(0, 18, 2)
    assert sorted(flip["image"] for flip in row["flipped"]) == every_second[(before != after)[::2]].tolist()
    assert row["flipped"]


def test_two_processes_find_what_one_does(tradeoff, runs, tmp_path):
    assert tradeoff().returncode == 0
    result = run_command(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        2,
        "--monitor-interval",
        0.1,
        "eval/tradeoff.py",
        runs / "runs",
        "--data",
        runs / "images",
        "--out",
        tmp_path / "two",
        "--batches",
        2,
        1,
        "--seconds",
        0.1,
        "--calibration-images",
        24,
    )
    assert result.returncode == 0, result.stderr
    one, two = (json.loads((tmp_path / out / "report.json").read_text()) for out in ("out", "two"))
    for row, other in zip(one["rows"], two["rows"], strict=True):
        same = ("name", "images", "top1", "top5", "drop", "flipped", "temperature", "sha256")
        assert {key: row[key] for key in same} == {key: other[key] for key in same}
        assert [latency["batch"] for latency in other["latency"]] == [2, 1]
    assert two["conditions"]["threads"] == usable_cores()  # timed alone, with all of them
    assert not (tmp_path / "two" / "unfinished").exists()


def test_a_regression_fails_the_build(tradeoff, tmp_path):
    assert tradeoff().returncode == 0
    path = tmp_path / "out" / "report.json"
    same = write_untimed_baseline(path, tmp_path / "same.json")
    result = tradeoff("--fail-on-regression", same)
    assert result.returncode == 0 and "→" in result.stdout
    path.write_text(same.read_text())
    assert tradeoff("--fail-on-regression", path).returncode == 0  # read before a new report takes its place
    baseline = json.loads(same.read_text())
    baseline["rows"][-1]["onnx_bytes"] //= 2
    baseline["rows"].append({**baseline["rows"][-1], "name": "gone", "scheme": "gone"})
    (tmp_path / "better.json").write_text(json.dumps(baseline))
    result = tradeoff("--fail-on-regression", tmp_path / "better.json")
    assert result.returncode == 1 and "gone" in result.stdout and path.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--batches", "0"), "batch"),
        (("--seconds", "0"), "--seconds"),
        (("--threads", "99"), "99"),
        (("--images", "1000"), "--images"),
        (("--max-latency-ms", "0"), "latency"),
        (("--max-drop", "nan"), "drop"),
        (("--seconds", "inf"), "--seconds"),
        (("--seed", "-1"), "--seed"),
        (("--workers", "-1"), "--workers"),
        (("--also", "tests/data"), "tests/data"),
        (("--fail-on-regression", "README.md"), "README.md"),
    ],
)
def test_mistakes_are_one_line(tradeoff, tmp_path, arguments, words):
    assert_one_line_error(tradeoff(*arguments), words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("images", "least", "most"), [(1, 1, 8), (20, 1, 8), (17, 4, 8), (3, 4, 4)])
def test_an_engine_is_called_with_as_many_images_as_it_takes(images, least, most):
    given, calls = np.random.default_rng(0).normal(size=(images, 3)), []

    def infer(part):
        calls.append(len(part))
        return part * 2

    np.testing.assert_array_equal(in_calls_of(infer, given, least, most), given * 2)
    assert least <= min(calls) and max(calls) <= most


def test_float_networks_come_first_and_what_has_no_graph_is_named(tradeoff, runs, tmp_path):
    for name in ("fp32", "int8"):
        shutil.copytree(runs / "runs" / name, tmp_path / "more" / name)
    (tmp_path / "more" / "int8" / "scheme.yaml").write_text("name: int8")
    trained = tmp_path / "more" / "trained"
    shutil.copytree(runs / "runs" / "fp32", trained)
    (trained / "model.onnx").unlink()
    fp32, int8 = (tmp_path / "more" / name for name in ("fp32", "int8"))
    shutil.copytree(fp32, tmp_path / "more" / ".fp32.draft-0123456789abcdef")  # left by a killed process
    assert expand([tmp_path / "more"]) == expand([int8, fp32]) == [fp32, int8]
    assert expand([int8 / "model.onnx", trained]) == [trained, int8 / "model.onnx"]
    assert_one_line_error(tradeoff(paths=(fp32, trained)), "trained")


def test_timing_gives_torch_every_core_and_its_own_back():
    before = torch.get_num_threads()
    with torch_on_all_cores():
        assert torch.get_num_threads() == usable_cores()
    assert torch.get_num_threads() == before


def test_paths_that_cannot_be_benchmarked(tradeoff, runs, tmp_path):
    (tmp_path / "empty").mkdir()
    other = write_linear_bundle(tmp_path / "other", np.zeros((768, 2)), 16, ["a", "b"])
    fp32 = runs / "runs" / "fp32"
    assert_one_line_error(tradeoff(paths=(tmp_path / "empty",)), str(tmp_path / "empty"))
    assert_one_line_error(tradeoff(paths=(tmp_path / "absent",)), "absent")
    assert_one_line_error(tradeoff(paths=()), "runs/ptq/fp32")
    assert_one_line_error(tradeoff(paths=(fp32, fp32)), "twice")
    assert_one_line_error(tradeoff(paths=(fp32, fp32 / "model.onnx")), "twice")
    assert_one_line_error(tradeoff(paths=(fp32, other)), "other classes")
    assert_one_line_error(tradeoff(paths=(other,)), "other classes")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "network": "segmentation"}))
    assert_one_line_error(tradeoff(paths=(other,)), "eval/segmentation.py")
    (other / "manifest.json").write_text("{")
    assert_one_line_error(tradeoff(paths=(other.parent,)), "damaged")


@pytest.fixture
def with_engines(runs, tmp_path):
    """A bundle with made-up engines of both libraries, two of which are refused."""
    bundle = tmp_path / "fp32"
    shutil.copytree(runs / "runs" / "fp32", bundle)
    shutil.copyfile(bundle / "model.onnx", bundle / "model.fused.onnx")
    for batch in ((1, 1, 1), (1, 8, 64)):
        name = f"tensorrt-sm87-{'.'.join(map(str, batch))}"
        write_made_up_engine(bundle / "engines" / name / "model.engine", batch=batch, targets=("sm87",))
    write_made_up_engine(bundle / "engines" / "tensorrt_rtx.engine", library="tensorrt_rtx")
    write_made_up_engine(bundle / "engines" / "other-graph" / "model.engine", onnx_sha256="0" * 64)
    write_made_up_engine(bundle / "engines" / "half" / "model.engine")
    (bundle / "engines" / "half" / "record.json").unlink()
    return bundle


def test_engines_have_rows_of_their_own_and_refused_ones_a_note(tradeoff, with_engines, tmp_path):
    result = tradeoff(paths=(with_engines,))
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    small, large = "tensorrt-sm87-1.1.1", "tensorrt-sm87-1.8.64"
    rows = {row["name"]: row["engine"] for row in report["rows"] if row["onnx"].endswith("fused.onnx")}
    assert rows == {
        f"fp32, TensorRT, {small}": f"../fp32/engines/{small}/model.engine",
        f"fp32, TensorRT, {large}": f"../fp32/engines/{large}/model.engine",
        "fp32, TensorRT-RTX": "../fp32/engines/tensorrt_rtx.engine",
    }
    notes = [reason for reason in report["not_run"] if str(with_engines / "engines") in reason]
    assert len(notes) == 2 and "half" in notes[0] and "other-graph" in notes[1]
    assert len({(row["scheme"], row["runtime"]) for row in report["rows"]}) == len(report["rows"])  # as a table shows


def write_half(bundle, factor):
    """A graph for TensorRT of a linear network: in float32 it computes the same classes for any factor."""
    graph = onnx.load(bundle / "model.onnx")
    weights = onnx.numpy_helper.to_array(graph.graph.initializer[0]) * factor
    graph.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights.astype(np.float16), "w16"))
    first, product = graph.graph.node
    product.input[:], product.output[:] = ["images16", "w16"], ["logits16"]
    ends = [
        onnx.helper.make_node("Cast", [first.output[0]], ["images16"], to=onnx.TensorProto.FLOAT16),
        onnx.helper.make_node("Cast", ["logits16"], ["logits"], to=onnx.TensorProto.FLOAT),
    ]
    del graph.graph.node[:]
    graph.graph.node.extend([first, ends[0], product, ends[1]])
    onnx.save(graph, bundle / "model.fused.onnx")


def test_a_file_that_overflows_in_half_precision_fails_alone(tradeoff, runs, tmp_path):
    shutil.copytree(runs / "runs", tmp_path / "runs")
    for name, factor in (("fp32", 1), ("int8", 5e5)):
        write_half(tmp_path / "runs" / name, factor)
    result = tradeoff(paths=(tmp_path / "runs",))
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {row["scheme"] for row in report["rows"] if row["runtime_id"] == "tensorrt"} == {"fp32"}
    assert "float16" in next(row["runtime"] for row in report["rows"] if row["runtime_id"] == "tensorrt")
    (failed,) = report["failed"]
    assert (failed["scheme"], failed["runtime_id"]) == ("int8", "tensorrt") and "18 of 18" in failed["reason"]
    for place in (result.stdout, *((tmp_path / "out" / name).read_text() for name in ("report.md", "report.html"))):
        assert failed["reason"] in place


def test_long_emulation_is_left_out_unless_asked_for(tradeoff, runs, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.measure.effort.EMULATED_AT_MOST", 10)
    monkeypatch.setattr("eval.measure.benchmark._LONG", 10)
    shutil.copytree(runs / "runs", tmp_path / "runs")
    write_half(tmp_path / "runs" / "int8", 1)
    for options, expected in (((), 0), (("--emulate",), 1), (("--images", 9), 1)):
        result = tradeoff(*options, paths=(tmp_path / "runs",))
        assert result.returncode == 0, result.stderr
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert sum(row["runtime_id"] == "tensorrt" for row in report["rows"]) == expected
        assert any("--emulate" in reason and "TensorRT" in reason for reason in report["not_run"]) == (not expected)
        assert ("takes about" in result.stdout) == ("--images" not in options)


def test_the_estimate_counts_every_model_and_reading(monkeypatch):
    """By a clock that only a model moves: its first call by 100 seconds, and then by 2 for each call of 50 images."""
    clock, calls = [0.0], iter((100.0, 2.0))
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def slow(batch):
        assert batch.shape == (50, 3, 4, 4)
        clock[0] += next(calls)

    seconds = estimate_seconds({"slow": slow, "fast": lambda batch: None}, [(torch.zeros(3, 4, 4), 0)] * 200)
    assert seconds == {"reading": 0, "slow": 8, "fast": 0}
    assert "slow" in describe_estimate({"reading": 1.0, "slow": 7200.0}, 50_000) and in_words(7200) == "2.0 h"


@pytest.mark.parametrize("fault", ["damaged", "wrong"])
def test_a_file_that_cannot_be_used_fails_alone(fault, tradeoff, runs, tmp_path):
    """A file that no runtime opens, and one that computes other logits than its golden answers."""
    shutil.copytree(runs / "runs", tmp_path / "runs")
    bundle = tmp_path / "runs" / "int8"
    if fault == "damaged":
        (bundle / "model.onnx").write_bytes(b"no graph")
    else:
        tolerances = {"float32": 0.1, "bfloat16": 0.1, "tensorrt": 0.1}
        facts = GoldenFacts("noise", (16, 16), (0.5,) * 3, (0.25,) * 3, tolerances)
        images, logits = np.zeros((2, 16, 16, 3), np.uint8), np.array([[1, 2, 3], [3, 2, 1]], np.float32)
        GoldenAnswers(images, np.arange(3), logits, facts).write(bundle)
    result = tradeoff(paths=(tmp_path / "runs",))
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {row["scheme"] for row in report["rows"]} == {"fp32"}
    assert {row["scheme"] for row in report["failed"]} == {"int8"} and report["failed"][0]["reason"] in result.stdout
    assert any("int8" in each for each in report["warnings"])


def test_a_significant_drop_is_measured_with_both_softmaxes(tradeoff, runs, tmp_path, monkeypatch):
    """Here every drop counts as significant. The second figure is that of the engine with that softmax."""
    monkeypatch.setattr(Drop, "includes_zero", property(lambda drop: False))
    torch.manual_seed(0)
    network = ILLaMA(replace(SMALL, image_size=16, patch_size=4)).eval()
    bundle = shutil.copytree(runs / "runs" / "fp32", tmp_path / "fp16")
    for name, form, dtype in ((CPU_ONNX, "plain", torch.float32), (FUSED_ONNX, "fused", torch.float16)):
        export_onnx(network, bundle / name, form, dtype)
    assert tradeoff(paths=(bundle,)).returncode == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    row = next(row for row in report["rows"] if row["runtime_id"] == "tensorrt")
    images, labels = load_images(
        open_data(str(runs / "images")).test(), Manifest.read(bundle).preprocessing.transform()
    )
    expected = OnnxRuntimeEngine(bundle / FUSED_ONNX, softmax="half").infer(images)
    assert row["half_softmax"]["top1"] == pytest.approx((expected.argmax(1) == labels).mean() * 100)
    assert all(other["half_softmax"] is None for other in report["rows"] if other is not row)
    assert "softmax" in (tmp_path / "out" / "report.md").read_text()


def test_engines_that_are_named_are_used_or_refused(tradeoff, with_engines, tmp_path):
    folder = with_engines / "engines" / "tensorrt-sm87-1.1.1"
    for number, path in enumerate((folder, folder / "model.engine")):
        result = tradeoff(paths=(path,), out=tmp_path / str(number))
        assert result.returncode == 0, result.stderr
        report = json.loads((tmp_path / str(number) / "report.json").read_text())
        (row,) = report["rows"]
        assert not any("half" in reason or "other-graph" in reason for reason in report["not_run"])
        assert row["name"] == "fp32, TensorRT, tensorrt-sm87-1.1.1"
    for name, words in (("half", "half"), ("other-graph", "model.fused.onnx")):
        assert_one_line_error(tradeoff(paths=(with_engines / "engines" / name,)), words)


def test_a_bundle_whose_engines_are_all_refused_is_measured_by_its_graphs(tradeoff, with_engines, tmp_path):
    for record in (with_engines / "engines").rglob("*.json"):
        record.write_text("{")
    result = tradeoff(paths=(with_engines,))
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    engines = str(with_engines / "engines")
    assert sum(engines in reason for reason in report["not_run"]) == 5
    rows = report["rows"]
    assert rows[-1]["name"] == "fp32, TensorRT" and rows[-1]["engine"] is None and len(rows) > 1
