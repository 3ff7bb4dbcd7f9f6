"""The effect of quantizing each layer, and the first mismatch of an exported file with PyTorch."""

import copy
import csv
import json
import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import numpy_helper
from PIL import Image
from step_difference import largest_step_difference, local_differences
from support import SMALL, assert_one_line_error

from illama import ILLaMA
from illama.bundle import SHIPPED
from illama.checkpoints.load import load_checkpoint
from illama.data.datasets import open_data
from illama.errors import UserError
from illama.models.timm_vit import to_causal, to_quantizable
from quant import debug_layers
from quant.export.onnx_export import export_onnx
from quant.export.verify import first_mismatch
from quant.inputs import onnx_scheme
from quant.mixed_precision.image_selection import selection_images
from quant.mixed_precision.layer_effects import Tally, layers_of, measure, tensor_sqnr
from quant.quantizers.calibrate import calibrate
from quant.quantizers.layers import quantizers
from quant.schemes.formats import TensorSpec
from quant.schemes.scheme import Rotations, Scheme, resolve, shipped_scheme, tensor_names

# After a rotation of the residual stream, norms have equal weights, which share one tensor in the file.
NORMS_DIFFER = Rotations(values="auto", hidden=32, hidden_blocks=1)
INT8 = replace(shipped_scheme("int8-attention"), reconstruction_iterations=0, rotate=NORMS_DIFFER)
PLAIN8 = Scheme("plain", {"*.weight": TensorSpec("int8", "channel"), "*.input": TensorSpec("int8")})


@pytest.fixture(scope="module")
def small():
    """A network with random weights so large that its logits differ, images, labels."""
    torch.manual_seed(0)
    model = ILLaMA(SMALL).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4 if "blocks" in name else 8)
        elif "norm" in name:
            parameter.data.add_(0.1 * torch.rand_like(parameter))  # equal norms would share one tensor in the file
    images = torch.randn(24, 3, 32, 32)
    return model, images, torch.randint(3, (24,))


@pytest.fixture(scope="module")
def exported(small, tmp_path_factory):
    model, images, _ = small
    quantized = calibrate(model, resolve(INT8, model), [images])
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    export_onnx(quantized, path, "plain")
    return quantized, path


def test_layers_are_linears_and_products(small):
    layers = layers_of(tensor_names(small[0]))
    assert layers["patch_embed.proj"] == ("patch_embed.proj.weight", "patch_embed.proj.input")
    assert layers["blocks.1.attn.core.qk"] == ("blocks.1.attn.core.q", "blocks.1.attn.core.k")
    assert set(layers["blocks.1.attn.core.pv"]) == {"blocks.1.attn.core.p", "blocks.1.attn.core.v"}
    assert len(layers) == 2 + 2 * 7


def test_the_effect_agrees_with_its_definition():
    exact, noisy = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [1.0, 0.0]])
    tally = Tally()
    tally.add(exact[:1], noisy[:1], torch.tensor([0]))
    tally.add(exact[1:], noisy[1:], torch.tensor([1]))
    effect = tally.effect()
    assert (effect.lost, effect.gained, effect.images, effect.right, effect.drop) == (1, 0, 2, 2, 50.0)
    assert effect.sqnr_db == pytest.approx(10 * math.log10(5 / 2))
    p = 1 / (1 + math.exp(-1))
    assert effect.kl == pytest.approx((p * math.log(p / (1 - p)) + (1 - p) * math.log((1 - p) / p)) / 2)


def _by_hand(quantized, tensors, images, labels):
    """The effect from two runs of the whole network."""
    network, tally = copy.deepcopy(quantized), Tally()
    for _, quantizer in quantizers(network):
        quantizer.enabled = False
    with torch.no_grad():
        reference = network(images)
        for name, quantizer in quantizers(network):
            quantizer.enabled = name in tensors
        tally.add(reference, network(images), labels)
    return tally.effect()


@pytest.mark.parametrize("kind", ["illama", "causal ViT", "ViT"])
def test_one_layer_at_a_time_is_the_network_with_that_layer_quantized(kind, small):
    """Resuming after the first blocks gives the same, in every kind of network."""
    model, images, labels = small
    if kind != "illama":
        torch.manual_seed(1)
        vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=3).eval()
        model = to_causal(vit) if kind == "causal ViT" else to_quantizable(vit)
    quantized = calibrate(model, resolve(INT8, model), [images])
    layers = layers_of(name for name, _ in quantizers(quantized))
    subsets = {**layers, "all": [name for name, _ in quantizers(quantized)], "none": ()}
    effects = measure(quantized, subsets, [(images[:10], labels[:10]), (images[10:], labels[10:])])
    assert all(quantizer.enabled for _, quantizer in quantizers(quantized))
    assert effects["none"].kl == 0 and effects["none"].sqnr_db == math.inf
    for name in ("all", *list(layers)[::3], list(layers)[-1]):
        expected = _by_hand(quantized, subsets[name], images, labels)
        assert effects[name].kl == pytest.approx(expected.kl, rel=1e-4), name
        assert effects[name].sqnr_db == pytest.approx(expected.sqnr_db, abs=0.01), name
        assert (effects[name].lost, effects[name].gained) == (expected.lost, expected.gained)


def test_one_bit_more_is_six_decibels(small):
    """A uniform quantizer's noise is step^2 / 12, so that each bit gives 20 log10(2) = 6.02 dB."""
    model, images, _ = small
    found = {}
    for bits in (4, 6, 8):
        scheme = Scheme("bits", {"*.weight": TensorSpec(f"int{bits}", "channel"), "*.core.p": TensorSpec("uint8")})
        found[bits] = tensor_sqnr(model, calibrate(model, resolve(scheme, model), [images]), images)
    for name, value in found[8].items():
        if name.endswith(".weight"):
            assert value - found[6][name] == pytest.approx(12.04, abs=1.5), name
            assert found[6][name] - found[4][name] == pytest.approx(12.04, abs=2.5), name
    assert sum(name.endswith(".core.p") for name in found[8]) == 2


def test_selection_images_are_training_images_that_calibration_does_not_use():
    data = open_data("fashion-mnist")
    calibration, chosen = data.calibration(512), selection_images(data, 512, 1000)
    assert len(set(chosen.indices)) == 1000
    assert not set(chosen.indices) & set(calibration.indices)
    assert np.array_equal(chosen.dataset.images, calibration.dataset.images)
    with pytest.raises(UserError, match=r"1489 .*1488"):
        selection_images(data, 512, 1489)


def test_a_swiglu_product_is_the_hardest_tensor_of_the_shipped_network():
    """A SwiGLU product has outliers, which the schemes smooth."""
    model, data = load_checkpoint(SHIPPED).model, open_data("fashion-mnist")
    transform = data.preprocessing(28, 1).transform()
    images = torch.stack([transform(data.calibration(16)[i][0]) for i in range(16)])
    found = tensor_sqnr(model, calibrate(model, resolve(PLAIN8, model), [images]), images)
    assert min(found, key=found.get).endswith(".mlp.fc2.input")


def test_a_correct_file_has_no_mismatch(small, exported):
    quantized, path = exported
    images = small[1][:8].numpy()
    differences = local_differences(quantized, path, images)
    assert first_mismatch(differences) is None
    assert largest_step_difference(quantized, path, images) <= 1
    quantized_tensors = {name for name, _ in quantizers(quantized) if not name.endswith(".weight")}
    shared = {"blocks.0.mlp.fc3.input", "blocks.1.mlp.fc3.input"}  # the file quantizes the MLP's input once
    assert quantized_tensors - shared <= differences.keys()
    assert {"patch_embed.proj", "blocks.0.attn.qkv", "blocks.1.mlp.fc2", "norm", "logits"} <= differences.keys()


def _initializer(model, name):
    return next(tensor for tensor in model.graph.initializer if tensor.name.endswith(name))


def _scaled(name, factor):
    def plant(model):
        tensor = _initializer(model, name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))

    return plant


def _one_weight_zeroed(model):
    tensor = _initializer(model, "blocks.1.mlp.fc2.frozen")
    weight = numpy_helper.to_array(tensor).copy()
    weight[np.unravel_index(np.abs(weight.astype(int)).argmax(), weight.shape)] = 0
    tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))


def _no_mask(model):
    """Attention without the causal mask."""
    for node in model.graph.node:
        if node.name == "blocks.0.attn.core/Mul_2":
            node.op_type = "Identity"
            del node.input[1:]


@pytest.mark.parametrize(
    ("plant", "culprit"),
    [
        (_scaled("blocks.1.attn.qkv.input.scale", 1.03), "blocks.1.attn.qkv.input"),
        (_scaled("blocks.0.attn.proj.frozen_scale", 1.01), "blocks.0.attn.proj"),
        (_scaled("blocks.1.norm2.weight", 1.01), "blocks.1.norm2"),
        (_scaled("head.frozen_scale", 1.01), "logits"),
        (_one_weight_zeroed, "blocks.1.mlp.fc2"),
        (_no_mask, "blocks.0.attn.core.p"),
    ],
    ids=["input scale", "weight scale", "norm", "head", "one weight", "mask"],
)
def test_a_planted_fault_is_named(plant, culprit, small, exported, tmp_path):
    quantized, path = exported
    model = onnx.load(path)
    plant(model)
    onnx.save(model, tmp_path / "model.onnx")
    images = small[1][:8].numpy()
    differences = local_differences(quantized, tmp_path / "model.onnx", images)
    assert first_mismatch(differences) == culprit
    assert largest_step_difference(quantized, tmp_path / "model.onnx", images) > 1
    mismatches = [name for name, each in differences.items() if each.mismatch]
    assert len(mismatches) <= 3 and ("logits" in mismatches) == (culprit == "logits")  # and the fault does not spread


def test_a_file_of_another_kind_is_refused(small, exported, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(UserError, match=r"model\.onnx"):
        local_differences(exported[0], tmp_path / "model.onnx", small[1].numpy())


def test_the_commands(small_bundle, image_folder, tmp_path, run_here):
    arguments = ("--checkpoint", small_bundle, "--data", image_folder, "--calibration-images", 8, "--images", 6)
    out = tmp_path / "sensitivity"
    result = run_here("quant/sensitivity.py", *arguments, "--scheme", "w4a8", "--out", out)
    assert result.returncode == 0, result.stderr
    found = json.loads((out / "sensitivity.json").read_text())
    rows = list(csv.DictReader((out / "sensitivity.csv").open()))
    assert [row["layer"] for row in rows] == [row["layer"] for row in found["layers"]] and len(rows) == 12
    assert Image.open(out / "sensitivity.png").width > 500
    assert all(row["layer"] in result.stdout for row in rows) and any(
        name in result.stdout for name in found["tensor_sqnr_db"]
    )
    shown, right = (out / "sensitivity.md").read_text(), found["all"]["right"] / found["all"]["images"]
    assert shown in result.stdout and ("class order" in shown) == (right < 0.4)  # a tenth from a third to all
    again = run_here("quant/sensitivity.py", *arguments, "--images", 100, "--out", out)
    assert_one_line_error(again, "100 images", "16", "--images")
    assert json.loads((out / "sensitivity.json").read_text()) == found

    debug = run_here("quant/debug_layers.py", *arguments)
    assert debug.returncode == 0, debug.stderr
    assert "<-" not in debug.stdout and "blocks.1.mlp.fc2" in debug.stdout
    with pytest.raises(UserError, match=r"manifest\.json"):
        debug_layers.main(debug_layers.DebugOptions(image_folder))
    with pytest.raises(UserError, match="int3"):
        onnx_scheme("int3")
    with pytest.raises(UserError, match="int8-dynamic"):
        onnx_scheme("int8-dynamic")
