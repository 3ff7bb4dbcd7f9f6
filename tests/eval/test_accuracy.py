"""The command that compares models image by image: its tables against the functions that it prints."""

import json
from dataclasses import replace

import numpy as np
import pytest
from support import ROOT, assert_one_line_error, write_linear_bundle

from deploy.runtimes.open_engine import OnnxRuntimeEngine
from deploy.runtimes.temperature import read_temperature
from eval.metrics.calibration import fit_temperature, reliability
from eval.metrics.paired import compare_predictions
from eval.metrics.predictions import Predictions
from illama.bundle import FRAME, TEMPERATURE, Manifest
from illama.checkpoints.load import read_preprocessing
from illama.data.datasets import Preprocessing, open_data
from illama.inference import load_images, top1


@pytest.fixture
def bundles(tmp_path, image_folder):
    """Two networks that get some training images right and some wrong, as a temperature needs them."""
    generator = np.random.default_rng(0)
    data = open_data(str(image_folder))
    images, labels = load_images(data.calibration(24), Preprocessing(16, 3, (0.5,) * 3, (0.25,) * 3).transform())
    wanted = 2 * np.eye(3)[labels] + generator.normal(size=(24, 3))
    networks = {"one": wanted, "two": wanted + generator.normal(size=(24, 3)) / 2}
    solved = {name: np.linalg.pinv(images.reshape(24, -1)) @ each for name, each in networks.items()}
    return [write_linear_bundle(tmp_path / name, each, 16, list(data.classes)) for name, each in solved.items()]


@pytest.fixture
def accuracy(bundles, image_folder, tmp_path, run_here):
    """The command on the two bundles, or on others."""

    def run(*more, paths=bundles):
        return run_here(
            "eval/accuracy.py",
            *paths,
            "--data",
            image_folder,
            "--out",
            tmp_path / "out",
            "--runtime",
            "onnxruntime",
            *more,
        )

    return run


def _logits(bundles, split):
    images, labels = load_images(split, read_preprocessing(Manifest.read(bundles[0])).transform())
    return [OnnxRuntimeEngine(bundle / "model.onnx").infer(images) for bundle in bundles], labels


def test_the_tables_and_the_temperature(accuracy, bundles, image_folder, tmp_path):
    result = accuracy("--calibration-images", 20, "--store")
    assert result.returncode == 0, result.stderr
    data = open_data(str(image_folder))
    (one, two), labels = _logits(bundles, data.test())
    change = compare_predictions(Predictions.of(one, labels), Predictions.of(two, labels))
    rows = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| two")]
    assert rows[0][2].startswith(f"{top1(two, labels):.2f} (") and rows[0][3].startswith("100.00")
    assert rows[1][1:4] == [f"{change.agreement:.2f}", str(change.test.lost), str(change.test.gained)]
    assert "classes that changed significantly: none" in result.stdout

    (_, calibration), its_labels = _logits(bundles, data.calibration(20))
    fitted = float(f"{fit_temperature(calibration, its_labels):.4g}")  # as it is kept
    for row, temperature, shown in zip(rows[2:], (1, fitted), ("none", f"{fitted:.3f}"), strict=True):
        expected = reliability(Predictions.of(two, labels, temperature))
        assert row[1:3] == [shown, f"{expected.ece * 100:.2f}"] and row[4] == f"{expected.nll:.4f}"

    stored = json.loads((bundles[1] / TEMPERATURE).read_text())["model.onnx"]
    assert stored["temperature"] == pytest.approx(fitted) and stored["images"] == 20
    assert stored["data"] == str(image_folder) and stored["fitted_with"].startswith("onnxruntime")
    content = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert content["models"]["two"]["scaled"]["nll"] == pytest.approx(
        reliability(Predictions.of(two, labels, fitted)).nll
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["accuracy.json", "accuracy.md"]
    assert accuracy("--calibration-images", 0).stdout == result.stdout  # what is stored


def test_without_a_temperature_it_says_why(accuracy, bundles, image_folder, tmp_path):
    result = accuracy("--calibration-images", 0)
    assert result.returncode == 0 and "- one: no temperature: none is stored" in result.stdout
    certain = write_linear_bundle(tmp_path / "certain", np.zeros((768, 3)), 16, ["class0", "class1", "class2"])
    result = accuracy("--calibration-images", 1, paths=(certain,))  # of equal logits the lowest class, which is right
    assert "every image is right" in result.stdout and not (certain / TEMPERATURE).exists()


def test_files_have_names_of_their_own(accuracy, bundles):
    result = accuracy("--calibration-images", 0, paths=(bundles[0], bundles[0] / "model.onnx"))
    assert result.returncode == 0, result.stderr
    assert "| one/model.onnx | 100.00 | 0 | 0 | 0 | 1.000 | +0.0000 |" in result.stdout


@pytest.mark.parametrize(
    "command",
    [
        ["eval/accuracy.py", "--data", "images", "--calibration-images", 0, "--out", "out/cells"],
        ["eval/robustness.py", "--data", "images", "--images", 4, "--corruptions", "fog", "--out", "out"],
        ["eval/out_of_distribution.py", "--data", "images", "--outside", "images"],
    ],
)
def test_logits_that_are_not_finite_are_no_result(command, overflow, image_folder, run_here, monkeypatch):
    script, *arguments = [str(ROOT / command[0]), *command[1:]]
    monkeypatch.chdir(image_folder.parent)
    assert_one_line_error(run_here(script, overflow, *arguments), "overflow: ", "images have logits not finite")
    assert not list(image_folder.parent.rglob("*.npz"))


def test_mistakes_are_one_line(accuracy, bundles, small_bundle, tmp_path):
    assert_one_line_error(accuracy(paths=(bundles[0], small_bundle)), "takes other images")
    assert_one_line_error(accuracy(paths=(small_bundle,)), "holds weights for PyTorch", "quant/ptq.py")
    assert_one_line_error(accuracy(paths=(bundles[0], bundles[0])), "twice")
    assert_one_line_error(accuracy(paths=(bundles[0] / "model.fused.onnx",)), "there is no", "model.fused.onnx")
    assert_one_line_error(accuracy(paths=()), "at least one bundle")
    assert_one_line_error(accuracy("--calibration-images", 25), "25 calibration images")
    assert_one_line_error(accuracy("--batch", 0), "--batch")
    (bundles[0] / TEMPERATURE).write_text('{"model.onnx": {"temperature": 0}}')
    assert_one_line_error(accuracy("--calibration-images", 0), "temperature.json is damaged")
    manifest = Manifest.read(bundles[1])
    replace(manifest, metrics={FRAME: [16, 16, 3]}).write(bundles[1])
    assert_one_line_error(accuracy(), "two takes camera frames")
    assert read_temperature(bundles[1] / "model.onnx") is None and not (tmp_path / "out" / "accuracy.json").exists()
