"""The command that compares bundles image by image: its tables against the functions that it prints."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT, assert_one_line_error, write_linear_bundle

from deploy.engines import OnnxRuntimeEngine
from eval.accuracy_change import compare_predictions
from eval.calibration_error import reliability, scale_temperature
from eval.trust import print_calibration
from illama.accuracy import load_images, top1
from illama.bundle import FRAME, Manifest
from illama.checkpoint import read_preprocessing
from illama.data import open_data


@pytest.fixture
def bundles(tmp_path):
    generator = np.random.default_rng(0)
    weights = generator.normal(size=(3 * 16 * 16, 3)) / 20
    classes = ["class0", "class1", "class2"]
    networks = {"one": weights, "two": weights + generator.normal(size=weights.shape) / 30}
    return [write_linear_bundle(tmp_path / name, each, 16, classes) for name, each in networks.items()]


def test_the_tables(bundles, image_folder, run_here):
    result = run_here("eval/trust.py", *bundles, "--data", image_folder)
    assert result.returncode == 0, result.stderr
    preprocessing = read_preprocessing(Manifest.read(bundles[0]))
    images, labels = load_images(open_data(str(image_folder)).test(), preprocessing.transform())
    one, two = (OnnxRuntimeEngine(bundle / "model.onnx").infer(images) for bundle in bundles)
    change = compare_predictions(one, two, labels)
    rows = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| two")]
    assert rows[0][1].startswith(f"{top1(two, labels):.2f} (") and rows[0][2].startswith("100.00")
    assert rows[1][1:4] == [f"{change.agreement:.2f}", str(change.test.lost), str(change.test.gained)]
    assert rows[2][1] == f"{reliability(two, labels).ece * 100:.2f}"
    assert "classes that changed significantly: none" in result.stdout


def test_scaling_is_shown_before_and_after_on_the_same_images(capsys):
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(200, 3)) * 3, generator.integers(0, 3, 200)
    print_calibration({"m": logits, "right": np.eye(3)[labels]}, labels)
    scaled = scale_temperature((logits[::2], labels[::2]), logits[1::2], labels[1::2])
    last, row = [line.strip("| ").split(" | ") for line in reversed(capsys.readouterr().out.splitlines()[-2:])]
    assert row[6] == f"{reliability(logits[1::2], labels[1::2]).ece * 100:.2f} -> {scaled.after.ece * 100:.2f}"
    assert row[7] == f"{reliability(logits[1::2], labels[1::2]).nll:.4f} -> {scaled.after.nll:.4f}"
    assert len(row) == len(last) and "every image is right" in last[6]


@pytest.mark.parametrize(
    "command",
    [
        ["eval/trust.py", "--data", "images"],
        ["eval/robustness.py", "--data", "images", "--images", 4, "--corruptions", "fog", "--out", "out"],
        ["eval/out_of_distribution.py", "--data", "images", "--outside", "images"],
    ],
)
def test_logits_that_are_not_finite_are_no_result(command, overflow, image_folder, run_here, monkeypatch):
    script, *arguments = [str(ROOT / command[0]), *command[1:]]
    monkeypatch.chdir(image_folder.parent)
    assert_one_line_error(run_here(script, overflow, *arguments), "overflow: ", "images have logits not finite")
    assert not list(image_folder.parent.glob("out/cells/*"))


def test_mistakes_are_one_line(bundles, image_folder, small_bundle, tmp_path, run_here):
    assert_one_line_error(run_here("eval/trust.py", bundles[0], small_bundle, "--data", image_folder), "no model.onnx")
    other = write_linear_bundle(tmp_path / "other", np.zeros((3 * 64, 3)), 8, ["class0", "class1", "class2"])
    assert_one_line_error(run_here("eval/trust.py", bundles[0], other, "--data", image_folder), "takes other images")
    manifest = Manifest.read(bundles[1])
    replace(manifest, metrics={FRAME: [16, 16, 3]}).write(bundles[1])
    assert_one_line_error(run_here("eval/trust.py", *bundles, "--data", image_folder), "two takes camera frames")
    assert_one_line_error(run_here("eval/trust.py", "--data", image_folder), "at least one bundle")
