"""What the Q/DQ of a region save, by a function from files to milliseconds that counts nodes."""

import onnx
import pytest
import torch
from support import SMALL

from illama import ILLaMA
from illama.bundle import sha256
from quant.export.onnx_export import export_onnx
from quant.mixed_precision.layer_effects import layers_of
from quant.mixed_precision.region_times import RegionTimes, find_regions, leave_float
from quant.quantizers.calibrate import calibrate
from quant.quantizers.layers import quantizers
from quant.schemes.formats import TensorSpec
from quant.schemes.scheme import FLOAT, Scheme, resolve, tensor_names

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.manual_seed(0))
INT8 = {"*.weight": TensorSpec("int8", "channel"), "*.input": TensorSpec("uint8", symmetric=False)}
QUANTIZE, FLOAT_PRODUCT, INT8_PRODUCT, CALL = 0.25, 1.0, 0.5, 10.0  # ms


@pytest.fixture(scope="module")
def model():
    return ILLaMA(SMALL).eval()


def _quantized(model, **changes):
    return calibrate(model, resolve(Scheme("int8", {**INT8, **changes}), model), [IMAGES])


def _count(files):
    """The milliseconds that a runtime would take in which every node has a known time."""
    found = {}
    for name, path in files.items():
        graph = onnx.load(path).graph
        makers = {value: node.op_type for node in graph.node for value in node.output}
        found[name] = CALL
        for node in graph.node:
            if node.op_type == "QuantizeLinear":
                found[name] += QUANTIZE
            if node.op_type in ("MatMul", "Gemm"):
                integers = all(makers.get(value) == "DequantizeLinear" for value in node.input[:2])
                found[name] += INT8_PRODUCT if integers else FLOAT_PRODUCT
    return found


def test_layers_that_read_one_input_are_one_region(model):
    layers = layers_of(tensor_names(model))
    regions = find_regions(model, layers, IMAGES)
    assert [*regions] == ["patches", "qkv", "qk", "pv", "proj", "fc1/fc3", "fc2", "head"]
    assert regions["fc1/fc3"] == tuple(f"blocks.{block}.mlp.{name}" for block in (0, 1) for name in ("fc1", "fc3"))
    assert sorted(layer for found in regions.values() for layer in found) == sorted(layers)


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """The network in float and in int8, each with its file."""
    folder = tmp_path_factory.mktemp("regions")
    networks = {FLOAT: model, "int8": _quantized(model, **{"patch_embed.*": None})}
    for name, network in networks.items():
        export_onnx(network, folder / f"{name}.onnx", "plain")
    return {name: (network, folder / f"{name}.onnx") for name, network in networks.items()}


def test_what_a_region_saves_is_the_difference_of_two_files(model, files, tmp_path):
    layers = layers_of(tensor_names(model))
    regions = {name: found for name, found in find_regions(model, layers, IMAGES).items() if name not in ("qkv", "fc2")}
    times = RegionTimes(_count, layers, regions, tmp_path)
    found = {name: times(name, *each) for name, each in files.items()}
    saved, each_input = times.saved["int8"], FLOAT_PRODUCT - INT8_PRODUCT - QUANTIZE
    assert saved == pytest.approx({"proj": 2 * each_input, "fc1/fc3": 2 * (each_input + 0.5), "head": each_input})
    assert not found[FLOAT].layers
    assert found["int8"].layers["blocks.1.mlp.fc3"] == pytest.approx(-saved["fc1/fc3"] / 4)
    assert times.compare(files["int8"][1]) == pytest.approx(
        (found["int8"].call, found["int8"].call / found[FLOAT].call)
    )


def test_a_difference_within_the_noise_saves_nothing(model, files, tmp_path):
    layers = layers_of(tensor_names(model))

    def slow(files):
        return {name: 1000 + each for name, each in _count(files).items()}

    times = RegionTimes(slow, layers, {"proj": find_regions(model, layers, IMAGES)["proj"]}, tmp_path)
    for name, each in files.items():
        times(name, *each)
    assert times.saved == {"int8": {"proj": 0.0}}


@pytest.mark.parametrize("pattern", ["*.fc[13].*", "blocks.1.attn.core.[qkpv]"])
def test_a_region_in_float_is_as_if_the_scheme_did_not_name_it(model, pattern, tmp_path):
    attention = {"*.core.[qkv]": TensorSpec("int8"), "*.core.p": TensorSpec("uint8")}
    whole, wanted = _quantized(model, **attention), _quantized(model, **attention, **{pattern: None})
    tensors = {name for name, _ in quantizers(whole)} - {name for name, _ in quantizers(wanted)}
    assert tensors
    export_onnx(leave_float(whole, tensors), tmp_path / "a.onnx", "plain")
    export_onnx(wanted, tmp_path / "b.onnx", "plain")
    assert sha256(tmp_path / "a.onnx") == sha256(tmp_path / "b.onnx")
