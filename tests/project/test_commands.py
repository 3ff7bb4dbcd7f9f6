"""python quant/ptq.py as a user runs it: the whole path on real files, and errors of one line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import ROOT, assert_one_line_error, run_command, write_images

from deploy.trt.library import find_library
from illama.checkpoints.load import load_checkpoint
from illama.data.datasets import open_data
from illama.inference import load_images, top1
from illama.manifest import Manifest


def _ptq(run, bundle, images, out, *more):
    return run(
        "quant/ptq.py",
        "--checkpoint",
        bundle,
        "--data",
        images,
        "--out",
        out,
        "--calibration-images",
        8,
        "--batches",
        1,
        3,
        "--seconds",
        1,
        *more,
    )


def test_the_whole_path(small_bundle, image_folder, tmp_path, run_here):
    out = tmp_path / "out"
    result = _ptq(run_command, small_bundle, image_folder, out)
    assert result.returncode == 0, result.stderr
    # PyTorch logs as "W1128 ... No CUDA runtime is found", and Python warns as "file.py:1: FutureWarning".
    assert not re.search(r"^[WE]\d{4} |Warning\b", result.stderr, re.MULTILINE), result.stderr
    summary = json.loads((out / "summary.json").read_text())
    in_openvino = {row["scheme"]: row for row in summary["rows"] if row["runtime"].startswith("OpenVINO")}
    assert set(in_openvino) == {"fp32", "int8"} and all(row["latency_ms"] for row in in_openvino.values())
    others = [row for row in summary["rows"] if row not in in_openvino.values()]
    rows = {(row["scheme"], row["onnx"].split("/")[1]): row for row in others}
    on_cpu = {(scheme, "model.onnx") for scheme in ("fp32", "int8", "fp8")}
    assert set(rows) == on_cpu | {(scheme, "model.fused.onnx") for scheme in ("fp16", "int8", "fp8")}
    for row in rows.values():
        assert row["images"] == 18
        assert (out / row["onnx"]).stat().st_size == row["onnx_bytes"]
        assert row["drop_ci95"][0] <= row["drop"] <= row["drop_ci95"][1]
        if find_library() and "fused" in row["onnx"]:
            assert (out / row["engine"]).stat().st_size == row["engine_bytes"]
    assert rows["int8", "model.onnx"]["latency_ms"]["p50"] > 0
    assert rows["fp8", "model.onnx"]["latency_ms"] is None
    assert rows["fp32", "model.onnx"]["drop"] == 0
    assert (out / "report.html").exists()
    # Rows on the Pareto front are bold, which depends on the latencies.
    assert len(re.findall(r"\n\| (?:\*\*)?int8\b", result.stdout)) == 3

    checkpoint, data = load_checkpoint(small_bundle), open_data(str(image_folder))
    images, labels = load_images(data.test(), checkpoint.preprocessing.transform())
    exact = onnxruntime.SessionOptions()  # optimized, products saturate on a CPU without VNNI
    exact.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(out / "int8" / "model.onnx", exact)
    assert top1(session.run(None, {"images": images})[0], labels) == pytest.approx(rows["int8", "model.onnx"]["top1"])

    again = _ptq(run_here, small_bundle, image_folder, out, "--schemes", "int8")
    assert again.returncode == 0, again.stderr
    assert not (out / "fp8").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "images", "out"]


def test_only_what_was_asked(small_bundle, image_folder, tmp_path, run_here):
    out = tmp_path / "out"
    result = _ptq(run_here, small_bundle, image_folder, out, "--schemes", "int8", "--no-engines", "--images", 6)
    assert result.returncode == 0, result.stderr
    rows = json.loads((out / "summary.json").read_text())["rows"]
    assert {row["images"] for row in rows} == {6} and not any(row["engine"] for row in rows)
    assert not (out / "int8" / "engines").exists()
    options = ("--schemes", "int8", "w4a16", "--no-engines", "--no-report", "--golden", "noise")
    result = _ptq(run_here, small_bundle, image_folder, out, *options)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in out.iterdir()) == ["int8", "w4a16"]
    assert Manifest.read(out / "int8").golden_answers == "noise"
    modes = {path.stat().st_mode for path in (out / "int8").iterdir() if path.is_file()}
    assert len(modes) == 1  # who may read the manifest may read every file
    again = _ptq(run_here, small_bundle, image_folder, out, "--schemes", "int8", "--no-engines", "--no-report")
    assert again.returncode == 0 and [path.name for path in out.iterdir()] == ["int8"]
    baseline = ("--no-report", "--fail-on-regression", out / "int8" / "manifest.json")
    assert_one_line_error(_ptq(run_here, small_bundle, image_folder, out, *baseline), "--no-report")
    (out / "notes.txt").touch()
    assert_one_line_error(_ptq(run_here, small_bundle, image_folder, out, "--no-report"), str(out))


def test_pictures_without_classes_are_enough_for_a_bundle(small_bundle, image_folder, tmp_path, run_here):
    flat, out = tmp_path / "flat", tmp_path / "out"
    flat.mkdir()
    for number, path in enumerate((image_folder / "train").rglob("*.png")):
        shutil.copyfile(path, flat / f"{number}.png")
    inputs = ("--checkpoint", small_bundle, "--data", flat)
    command = ("quant/ptq.py", *inputs, "--schemes", "int8", "--no-engines")
    others = ("quant/qat.py", "--scheme", "int8"), ("quant/sensitivity.py",), ("quant/search.py", "--max-drop", 1)
    for each in others:  # a label that is made up measures nothing
        assert_one_line_error(run_here(*each, *inputs, "--out", tmp_path / "none"), "no classes")
    assert not (tmp_path / "none" / "checkpoint.pt").exists()
    result = run_here(*command, "--no-report", "--out", out)  # fewer than 512, which is the default
    assert result.returncode == 0, result.stderr
    manifest = Manifest.read(out / "int8")
    assert manifest.classes == Manifest.read(small_bundle).classes
    assert manifest.provenance.source.calibration_images == 12
    debug = run_here("quant/debug_layers.py", out / "int8", "--images", 8)
    assert debug.returncode == 0 and "<-" not in debug.stdout, debug.stderr
    answer = run_here("deploy/predict.py", "--engine", out / "int8", flat)
    assert answer.returncode == 0 and len(answer.stdout.splitlines()) == 1 + 24


def _nan(bundle):
    path = bundle / "model.safetensors"
    state = load_file(path)
    state["head.bias"][0] = float("nan")
    save_file(state, path)


def _truncated(bundle):
    path = bundle / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def _another_config(bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["config"]["depth"] = 3
    (bundle / "manifest.json").write_text(json.dumps(manifest))


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("damage", "words"), [(_nan, "NaN"), (_truncated, "truncated"), (_another_config, "does not fit the config")]
)
def test_wrong_checkpoints_are_rejected(damage, words, small_bundle, image_folder, tmp_path, run_here):
    damage(small_bundle)
    result = _ptq(run_here, small_bundle, image_folder, tmp_path / "out")
    assert_one_line_error(result, words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "images"]


def test_a_checkpoint_with_code_in_it(image_folder, tmp_path, run_here):
    torch.save({"model": Code(tmp_path / "executed")}, tmp_path / "evil.pth")
    assert_one_line_error(_ptq(run_here, tmp_path / "evil.pth", image_folder, tmp_path / "out"), "more than tensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pth", "images"]


def test_wrong_options_are_rejected(small_bundle, image_folder, tmp_path, run_here):
    out = tmp_path / "out"
    assert_one_line_error(_ptq(run_here, small_bundle, image_folder, out, "--schemes", "int3"), "unknown scheme 'int3'")
    assert_one_line_error(
        _ptq(run_here, small_bundle, image_folder, out, "--calibration-images", 25), "25 ", "--calibration-images"
    )
    assert_one_line_error(_ptq(run_here, small_bundle, tmp_path / "nowhere", out), "nowhere")
    unknown = run_here("quant/ptq.py", "--sheme", "int8")
    assert unknown.returncode == 2 and "Traceback" not in unknown.stderr
    if library := find_library():
        bad = "sm86" if library.name == "tensorrt" else "sm12"
        assert_one_line_error(
            _ptq(run_here, small_bundle, image_folder, out, "--targets", bad), bad if bad == "sm12" else "GPU"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "images"]


def test_wrong_folders_are_rejected(small_bundle, image_folder, tmp_path, run_here):
    out = tmp_path / "out"
    one = write_images(tmp_path / "one", classes=1)
    assert_one_line_error(_ptq(run_here, small_bundle, one, out), "one class only")
    (tmp_path / "empty").mkdir()
    assert_one_line_error(_ptq(run_here, small_bundle, tmp_path / "empty", out), "no val/ folder")
    (image_folder / "train" / "class1").rename(image_folder / "train" / "class9")
    (image_folder / "val" / "class1").rename(image_folder / "val" / "class9")
    assert_one_line_error(_ptq(run_here, small_bundle, image_folder, out), "'class1'", "'class2'")
    (image_folder / "train" / "class9").rename(image_folder / "train" / "class1")
    (image_folder / "val" / "class9").rename(image_folder / "val" / "class1")
    two = write_images(tmp_path / "two", classes=2)
    assert_one_line_error(_ptq(run_here, small_bundle, two, out), "3 classes", "has 2")
    (image_folder / "val" / "class1" / "0.png").write_bytes(b"no picture")
    assert_one_line_error(_ptq(run_here, small_bundle, image_folder, out), "class1/0.png")
    assert not out.exists()


def test_an_output_folder_that_cannot_be_written(small_bundle, image_folder, tmp_path, run_here):
    (tmp_path / "file").write_text("in the way")
    assert_one_line_error(_ptq(run_here, small_bundle, image_folder, tmp_path / "file" / "out"), "cannot write")
    assert_one_line_error(_ptq(run_here, small_bundle, image_folder, tmp_path / "file"), "other files")
    assert_one_line_error(_ptq(run_here, small_bundle, image_folder, "/proc/out"), "cannot write")
    assert (tmp_path / "file").read_text() == "in the way"


def test_ctrl_c_leaves_no_files(small_bundle, image_folder, tmp_path):
    command = [
        sys.executable,
        "quant/ptq.py",
        "--checkpoint",
        small_bundle,
        "--data",
        image_folder,
        "--out",
        tmp_path / "out",
        "--calibration-images",
        "8",
    ]
    # In the background of a shell, the tests and their children ignore Ctrl-C.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert any("export" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors and "interrupted" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "images"]


def _manifest_times(folder):
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/manifest.json")}


def test_an_interrupted_run_continues(small_bundle, image_folder, tmp_path, run_here):
    options = [
        "quant/ptq.py",
        "--checkpoint",
        small_bundle,
        "--data",
        image_folder,
        "--out",
        tmp_path / "out",
        "--calibration-images",
        8,
        "--batches",
        1,
        "--seconds",
        0.1,
        "--schemes",
        "int8-dynamic",
    ]
    process = subprocess.Popen(
        [sys.executable, *map(str, options)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert any("evaluate" in line for line in process.stdout)  # everything is exported
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors and str(tmp_path / "out.partial") in errors.splitlines()[-1]
    exported = _manifest_times(tmp_path / "out.partial" / "result")
    assert_one_line_error(run_here(*options, "--seed", 1), "out.partial", "seed", "--restart")
    result = run_here(*options)
    assert result.returncode == 0, result.stderr
    assert "fp16, fp32, int8-dynamic done" in result.stdout and "export" not in result.stdout
    assert len(exported) == 3 and _manifest_times(tmp_path / "out") == exported
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "images", "out"]


def test_the_error_for_a_full_disk_is_one_line(small_bundle, image_folder, tmp_path):
    """A file-size limit replaces a full disk: the kernel rejects the write in the same way."""
    script = (
        "import resource, signal, sys, runpy; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); sys.argv = sys.argv[1:];"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    result = run_command(
        "-c",
        script,
        "quant/ptq.py",
        "--checkpoint",
        small_bundle,
        "--data",
        image_folder,
        "--out",
        tmp_path / "out",
        "--calibration-images",
        8,
    )
    assert_one_line_error(result, "File too large")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(find_library() is None or find_library().name != "tensorrt_rtx", reason="needs tensorrt-rtx")
def test_targets_without_fp8_get_their_int8_engine(small_bundle, image_folder, tmp_path, run_here):
    result = _ptq(
        run_here, small_bundle, image_folder, tmp_path / "out", "--targets", "sm86", "--schemes", "int8", "fp8"
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "int8" / "engines" / "tensorrt_rtx-sm86-1.8.64" / "model.engine").exists()
    assert not (tmp_path / "out" / "fp8" / "engines").exists()
    assert re.search(r"fp8 .*\bsm86\b", result.stdout)
