"""The manifest of a bundle: typed sections, read and written without loss, and format 1."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from support import write_format_1

from illama import ModelConfig
from illama.bundle import MANIFEST, SHIPPED
from illama.data.preprocessing import Preprocessing
from illama.errors import UserError
from illama.manifest import TRAINED, Drop, LayerFormats, Manifest, Provenance, Quantization, Scores
from illama.models.upernet import SegmentationConfig
from illama.options import SourceOptions

SOURCE = SourceOptions(SHIPPED, None, "cifar10:x", 7, 32, "apply")
FULL = Manifest(
    "illama",
    ModelConfig.preset("nano", num_classes=3).to_dict(),
    Preprocessing((28, 32), 1, (0.2,), (0.3,), 40, "bilinear", "ignore", "natural"),
    ("a", "b\n", "ü"),
    Provenance("python x.py", 3, {"/a": "00"}, SOURCE, {"torch": "2"}),
    Quantization("int8", (LayerFormats("blocks.0-5.attn.qkv", "int8", "uint8"),), "weights", "6-bit"),
    Scores("top1", 10, {"fp32": 50.0, "qat": 40.0}, {"qat": Drop(10.0, -1.0, 20.0)}, 2, {"cores": 2, "gpu": None}),
    (480, 640, 3),
    golden_answers="noise",
)


@pytest.mark.parametrize("manifest", [FULL, Manifest("timm", {"name": "x"}, FULL.preprocessing, ())])
def test_what_is_written_is_read(manifest, tmp_path):
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert json.loads((tmp_path / MANIFEST).read_text())["format"] == 2


def test_the_shipped_checkpoints_of_format_1_are_read():
    for name, images in (("nano-fashion-mnist", 10_000), ("tiny-emoji", None)):
        folder = SHIPPED.parent / name
        old, new = json.loads((folder / MANIFEST).read_text()), Manifest.read(folder)
        assert old["format"] == 1 and new.network == "illama" and (new.scores and new.scores.images) == images
        assert new.preprocessing.size == (old["preprocessing"]["image_size"],) * 2
        assert new.provenance.command == old["made_by"] and new.classes == tuple(old["classes"])
    assert Manifest.read(SHIPPED).scores == Scores("top1", 10_000, {TRAINED: 92.83}, epochs=50)


def test_the_facts_of_quantized_bundles_of_format_1_are_read(tmp_path):
    FULL.write(tmp_path)
    write_format_1(tmp_path)
    old = json.loads((tmp_path / MANIFEST).read_text())
    drop = {"points": 1.0, "low": 0.5, "high": 1.5}
    old["metrics"] = {
        "source": {"checkpoint": "runs/a", "data": "cifar10:x", "calibration_images": 8, "model": None},
        "scheme": "w4a4",
        "layers": [["head", "int8 per channel", "float"]],
        "no_tensorrt": "TensorRT multiplies weights of fewer than 8 bits by half-precision inputs alone",
        "not_timed": "no CPU multiplies 4-bit activations, and ONNX Runtime only emulates it",
        **{"fp32_top1": 90.0, "fused_onnx_top1": 89.0, "fused_onnx_drop": drop, "test_images": 100, "epochs": 3},
        "frame": [48, 64, 3],
    }
    old["config"] = SegmentationConfig(num_classes=3).to_dict()
    (tmp_path / MANIFEST).write_text(json.dumps(old))
    new = Manifest.read(tmp_path)
    assert new.network == "segmentation" and new.frame == (48, 64, 3)
    assert new.quantization == Quantization(
        "w4a4", (LayerFormats("head", "int8 per channel", "float"),), "weights", "4-bit activations"
    )
    assert new.scores == Scores("top1", 100, {"fp32": 90.0, "fused_onnx": 89.0}, {"fused_onnx": Drop(1.0, 0.5, 1.5)}, 3)
    assert new.provenance.source.data == "cifar10:x" and str(new.provenance.source.checkpoint) == "runs/a"
    new.write(tmp_path)
    assert Manifest.read(tmp_path) == new


DAMAGE = {
    "of a later format": {"format": 3},
    "fewer classes than the network's": {"config": {"num_classes": 4}},
    "format as text": {"format": "2"},
    "unknown section": {"colour": 1},
    "text for a number": {"frame": [480, "640", 3]},
    "classes are numbers": {"classes": [1]},
    "size of one side": {"preprocessing": {"size": [28]}},
    "negative size": {"preprocessing": {"size": [-1, 28]}},
    "unknown reason": {"quantization": {"scheme": "int8", "no_tensorrt": "it rains"}},
    "format 1 without metrics": {"format": 1},
    "format 1 of lists": {"format": 1, "metrics": [], "config": [], "preprocessing": []},
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_manifest_is_one_line(damage, tmp_path):
    FULL.write(tmp_path)
    values = json.loads((tmp_path / MANIFEST).read_text())
    for key, value in damage.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    (tmp_path / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(UserError, match=MANIFEST):
        Manifest.read(tmp_path)


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path):
    with pytest.raises(UserError, match="not a bundle"):
        Manifest.read(tmp_path)


def test_a_preprocessing_must_fit_its_channels():
    for wrong in ({"mean": (0.5, 0.5)}, {"std": (0.0,)}, {"in_channels": 2}, {"resize": 31}, {"size": (0, 1)}):
        with pytest.raises(UserError):
            replace(FULL.preprocessing, **wrong)
