"""What the README promises of the shipped checkpoint, on the whole test split."""

import pytest
import torch

from deploy.engines import OnnxRuntimeEngine
from eval.accuracy_drop import paired_drop
from illama.accuracy import load_images, predict, torch_infer
from illama.bundle import Manifest
from illama.checkpoint import SHIPPED, load_checkpoint
from illama.data import open_data
from quant.calibrate import calibrate
from quant.export import export_onnx
from quant.schemes import SCHEMES


@pytest.fixture(scope="module")
def shipped():
    return load_checkpoint(SHIPPED)


@pytest.fixture(scope="module")
def reference(shipped):
    """Which test images the float model gets right, in PyTorch."""
    test = open_data("fashion-mnist").test()
    logits, labels = predict({"model": torch_infer(shipped.model)}, test, shipped.preprocessing.transform())
    return logits["model"].argmax(1) == labels


def test_the_shipped_checkpoint_is_as_good_as_its_manifest_says(reference):
    written = Manifest.read(SHIPPED).metrics["test_top1"]
    assert reference.mean() * 100 == pytest.approx(written, abs=0.05)
    assert written > 92.5


@pytest.mark.parametrize("name", ["int8", "fp8", "w4a8"])
def test_quantization_loses_at_most_a_fifth_of_a_point(name, shipped, reference, tmp_path):
    data, transform = open_data("fashion-mnist"), shipped.preprocessing.transform()
    images, _ = load_images(data.calibration(512), transform)
    export_onnx(
        calibrate(shipped.model, SCHEMES[name], torch.from_numpy(images).split(64)), tmp_path / "m.onnx", "plain"
    )
    logits, labels = predict({"onnx": OnnxRuntimeEngine(tmp_path / "m.onnx").infer}, data.test(), transform)
    assert paired_drop(reference, logits["onnx"].argmax(1) == labels).points <= 0.2
