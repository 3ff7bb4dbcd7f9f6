"""The README's figures of the shipped checkpoint, on the whole test split."""

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from deploy.runtimes.onnxruntime_engine import OnnxRuntimeEngine
from eval.metrics.paired import paired_drop
from illama.bundle import SHIPPED
from illama.checkpoints.load import load_checkpoint
from illama.data.datasets import open_data
from illama.inference import load_images, predict, torch_infer
from illama.manifest import TRAINED, Manifest
from quant.export.onnx_export import export_onnx
from quant.quantizers.calibrate import calibrate
from quant.schemes.scheme import resolve, shipped_scheme


@pytest.fixture(scope="module")
def shipped():
    return load_checkpoint(SHIPPED)


@pytest.fixture(scope="module")
def reference(shipped):
    """The float model's logits of the test images in PyTorch, and the labels."""
    test = open_data("fashion-mnist").test()
    logits, labels = predict({"model": torch_infer(shipped.model)}, test, shipped.preprocessing.transform())
    return logits["model"], labels


def test_the_shipped_checkpoint_has_the_accuracy_of_its_manifest(reference):
    written = Manifest.read(SHIPPED).scores.values[TRAINED]
    logits, labels = reference
    assert (logits.argmax(1) == labels).mean() * 100 == pytest.approx(written, abs=0.05)
    assert written > 92.5


@pytest.mark.parametrize(
    ("name", "most_lost", "least_sqnr"),
    [("int8", 0.1, 36), ("int8-accurate", 0.1, 40), ("fp8", 0.05, 35), ("w4a8", 0.2, 35)],
)
def test_accuracy_drop_of_the_quantized_file(name, most_lost, least_sqnr, shipped, reference, tmp_path):
    """Checks the drop, the SQNR, and that PyTorch's quantized network predicts the same classes for a fifth of them."""
    data, transform = open_data("fashion-mnist"), shipped.preprocessing.transform()
    images, _ = load_images(data.calibration(512), transform)
    quantized = calibrate(
        shipped.model, resolve(shipped_scheme(name), shipped.model), torch.from_numpy(images).split(64)
    )
    export_onnx(quantized, tmp_path / "m.onnx", "plain")
    test = data.test()
    logits, labels = predict({"m": OnnxRuntimeEngine(tmp_path / "m.onnx").infer}, test, transform)
    classes, exact = logits["m"].argmax(1), reference[0].astype(np.float64)
    assert paired_drop(exact.argmax(1) == labels, classes == labels).points <= most_lost
    assert 10 * np.log10(np.square(exact).sum() / np.square(logits["m"] - exact).sum()) >= least_sqnr
    fifth = range(0, len(test), 5)
    logits, _ = predict({"m": torch_infer(quantized)}, Subset(test, fifth), transform)
    assert (classes[fifth] == logits["m"].argmax(1)).mean() >= 0.999
