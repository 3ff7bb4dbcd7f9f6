"""python eval/accuracy.py: its results against numpy, torch, torchmetrics and the binomial distribution."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from support import ROOT, assert_one_line_error, write_linear_bundle
from torchmetrics.functional.classification import multiclass_calibration_error

from deploy.runtimes.temperature import read_temperature
from illama.bundle import TEMPERATURE
from illama.data.datasets import open_data
from illama.data.preprocessing import Preprocessing
from illama.inference import load_images
from illama.manifest import Manifest

PREPROCESSING = Preprocessing((16, 16), 3, (0.5,) * 3, (0.25,) * 3)


@pytest.fixture
def bundles(tmp_path, image_folder):
    """Two networks that get some training images right and some wrong, as a temperature needs them."""
    generator = np.random.default_rng(0)
    data = open_data(str(image_folder))
    images, labels = load_images(data.calibration(24), PREPROCESSING.transform())
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
    """The logits of each bundle's weights in float64, and the labels."""
    images, labels = load_images(split, PREPROCESSING.transform())
    graphs = [onnx.load(bundle / "model.onnx").graph for bundle in bundles]
    weights = [onnx.numpy_helper.to_array(graph.initializer[0]).astype(np.float64) for graph in graphs]
    return [images.reshape(len(images), -1) @ each for each in weights], labels


def _wilson(share, images):
    z = scipy.stats.norm.ppf(0.975)
    center, half = share + z**2 / (2 * images), z * np.sqrt(share * (1 - share) / images + z**2 / (4 * images**2))
    return (center - half) / (1 + z**2 / images) * 100, (center + half) / (1 + z**2 / images) * 100


def _best_temperature(logits, labels):
    """The one of 20,001 temperatures with the least cross-entropy."""
    temperatures = np.geomspace(0.01, 100, 20_001)
    scaled = torch.from_numpy(logits / temperatures[:, None, None])
    nll = -scaled.log_softmax(-1)[:, torch.arange(len(labels)), torch.from_numpy(labels)].mean(1)
    return temperatures[nll.argmin()]


def _assert_calibration(found, logits, labels):
    tensor, truth = torch.from_numpy(logits), torch.from_numpy(labels)
    ece = multiclass_calibration_error(tensor.softmax(1), truth, logits.shape[1], n_bins=15)
    brier = (tensor.softmax(1) - F.one_hot(truth)).square().sum(1).mean()
    assert found["ece"] == pytest.approx(float(ece), abs=1e-5)
    assert found["nll"] == pytest.approx(float(F.cross_entropy(tensor, truth)), rel=1e-4)
    assert found["brier"] == pytest.approx(float(brier), rel=1e-4)
    assert sum(each["count"] for each in found["diagram"]) == len(labels)


def test_the_results_are_those_of_other_libraries(accuracy, bundles, image_folder, tmp_path):
    result = accuracy("--calibration-images", 20, "--store")
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert (content["reference"], content["images"], content["calibration_images"]) == ("one", 18, 20)
    data = open_data(str(image_folder))
    logits, labels = _logits(bundles, data.test())
    calibration, its_labels = _logits(bundles, data.calibration(20))
    right = [each.argmax(1) == labels for each in logits]
    for place, model in enumerate(("one", "two")):
        found, share = content["models"][model], right[place].mean()
        assert found["top1"]["percent"] == pytest.approx(share * 100) and found["top5"]["percent"] == 100
        assert (found["top1"]["low"], found["top1"]["high"]) == pytest.approx(_wilson(share, 18))
        assert found["temperature"] == pytest.approx(_best_temperature(calibration[place], its_labels), rel=1e-3)
        _assert_calibration(found["reliability"], logits[place], labels)
        _assert_calibration(found["scaled"], logits[place] / found["temperature"], labels)
    assert content["models"]["one"]["change"] is None
    change, (before, after) = content["models"]["two"]["change"], (each.argmax(1) for each in logits)
    assert change["flips"]["lost"] == np.flatnonzero(right[0] & ~right[1]).tolist()
    assert change["flips"]["gained"] == np.flatnonzero(right[1] & ~right[0]).tolist()
    assert change["flips"]["moved"] == np.flatnonzero((before != after) & ~right[0] & ~right[1]).tolist()
    assert change["agreement"] == pytest.approx((before == after).mean() * 100)
    lost, gained = (len(change["flips"][kind]) for kind in ("lost", "gained"))
    p = min(1.0, 2 * scipy.stats.binom.cdf(min(lost, gained), lost + gained, 0.5))
    assert change["test"] == {"lost": lost, "gained": gained, "p": pytest.approx(p)}
    assert [each["images"] for each in change["classes"]] == [6, 6, 6]

    rows = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| two")]
    found = content["models"]["two"]
    assert rows[0][2].startswith(f"{found['top1']['percent']:.2f} (")
    assert rows[1][1:4] == [f"{change['agreement']:.2f}", str(lost), str(gained)]
    for row, kind in zip(rows[2:], ("reliability", "scaled"), strict=True):
        assert (row[2], row[4]) == (f"{found[kind]['ece'] * 100:.2f}", f"{found[kind]['nll']:.4f}")
    assert rows[3][1] == f"{found['temperature']:.3f}"


def test_a_temperature_is_stored_with_its_file_and_read_again(accuracy, bundles, image_folder, tmp_path):
    result = accuracy("--calibration-images", 20, "--store")
    assert result.returncode == 0, result.stderr
    models = json.loads((tmp_path / "out" / "accuracy.json").read_text())["models"]
    stored = json.loads((bundles[1] / TEMPERATURE).read_text())["model.onnx"]
    assert stored["temperature"] == models["two"]["temperature"] and stored["images"] == 20
    assert stored["data"] == str(image_folder) and stored["fitted_with"].startswith("onnxruntime")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["accuracy.json", "accuracy.md"]
    assert accuracy("--calibration-images", 0).stdout == result.stdout
    assert json.loads((tmp_path / "out" / "accuracy.json").read_text())["models"] == models


def test_a_model_without_a_temperature_is_named(accuracy, bundles, tmp_path):
    def found(*more, **paths):
        result = accuracy("--calibration-images", *more, **paths)
        assert result.returncode == 0, result.stderr
        return result.stdout, json.loads((tmp_path / "out" / "accuracy.json").read_text())["models"]

    text, models = found(0)
    assert all(models[name]["temperature"] is models[name]["scaled"] is None for name in ("one", "two"))
    assert "\n- one: " in text and "\n- two: " in text
    certain = write_linear_bundle(tmp_path / "certain", np.zeros((768, 3)), 16, ["class0", "class1", "class2"])
    text, models = found(1, paths=(certain,))  # of equal logits the lowest class, which is right
    assert models["certain"]["temperature"] is None and "\n- certain: " in text
    assert not (certain / TEMPERATURE).exists()


def test_files_have_names_of_their_own(accuracy, bundles, tmp_path):
    result = accuracy("--calibration-images", 0, paths=(bundles[0], bundles[0] / "model.onnx"))
    assert result.returncode == 0, result.stderr
    models = json.loads((tmp_path / "out" / "accuracy.json").read_text())["models"]
    assert list(models) == ["one", "one/model.onnx"] and models["one/model.onnx"]["change"]["agreement"] == 100


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
    assert_one_line_error(run_here(script, overflow, *arguments), "overflow")
    assert not list(image_folder.parent.rglob("*.npz"))


def test_mistakes_are_one_line(accuracy, bundles, small_bundle, tmp_path):
    assert_one_line_error(accuracy(paths=(bundles[0], small_bundle)), str(small_bundle), str(bundles[0]))
    assert_one_line_error(accuracy(paths=(small_bundle,)), "quant/ptq.py")
    assert_one_line_error(accuracy(paths=(bundles[0], bundles[0])), f"{tmp_path.name}/one")
    assert_one_line_error(accuracy(paths=(bundles[0] / "model.fused.onnx",)), "model.fused.onnx")
    assert_one_line_error(accuracy(paths=()), "runs/ptq/fp32")
    assert_one_line_error(accuracy("--calibration-images", 25), "25", "--calibration-images")
    assert_one_line_error(accuracy("--batch", 0), "--batch")
    (bundles[0] / TEMPERATURE).write_text('{"model.onnx": {"temperature": 0}}')
    assert_one_line_error(accuracy("--calibration-images", 0), "temperature.json")
    manifest = Manifest.read(bundles[1])
    replace(manifest, frame=(16, 16, 3)).write(bundles[1])
    assert_one_line_error(accuracy(), str(bundles[1]), "camera")
    assert read_temperature(bundles[1] / "model.onnx") is None and not (tmp_path / "out" / "accuracy.json").exists()
