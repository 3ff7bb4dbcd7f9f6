"""Networks that do not fit into float16 are exported with the smallest change that keeps them accurate."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from support import SMALL

from deploy.runtimes.onnxruntime_engine import OnnxRuntimeEngine
from deploy.trt.builder import build_engine
from deploy.trt.engine_options import EngineOptions
from deploy.trt.library import find_library
from illama import ILLaMA
from illama.bundle import FUSED_ONNX
from illama.data.preprocessing import Preprocessing
from illama.graph.numeric_range import measure_ranges
from illama.graph.reader import load_graph
from illama.manifest import LayerRange, Manifest, NumericRange
from quant.export.half_precision import candidates, export_half, fits
from quant.export.onnx_export import export_onnx
from quant.quantizers.calibrate import calibrate
from quant.schemes.scheme import resolve, shipped_scheme

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def network(change=None):
    """A network whose values have magnitudes around one, changed into one that computes the same in exact numbers."""
    torch.manual_seed(0)
    model = ILLaMA(replace(SMALL, depth=1)).eval()
    with torch.no_grad():
        for block in model.blocks:
            for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2, block.mlp.fc3):
                layer.weight.mul_(8)
        if change:
            change(model)
    return model


def large_mlp(model):
    model.blocks[0].mlp.fc3.weight.mul_(2.0**16)
    model.blocks[0].mlp.fc2.weight.mul_(2.0**-16)


def large_values(model):
    attention, width = model.blocks[0].attn, model.config.width
    for tensor in (attention.qkv.weight, attention.qkv.bias):
        tensor[2 * width :].mul_(2.0**16)
    attention.proj.weight.mul_(2.0**-16)


def large_stream(model):
    """RMSNorm divides by the magnitude again."""
    writers = [model.patch_embed.proj, *(layer for block in model.blocks for layer in (block.attn.proj, block.mlp.fc2))]
    for tensor in (model.pos_embed, model.cls_token, *(each for layer in writers for each in layer.parameters())):
        tensor.mul_(2.0**16)


@pytest.mark.parametrize(
    ("change", "scheme", "wide", "dtype"),
    [
        (None, None, {}, "float16"),
        (large_mlp, "int8-weight-only", {"blocks.0.mlp": "float32"}, "float16"),
        (large_mlp, "int8", {}, "float16"),  # SmoothQuant has made the values smaller
        (large_values, None, {"blocks.0.attn": "bfloat16"}, "float16"),
        (large_stream, None, {}, "bfloat16"),
    ],
)
def test_the_smallest_accurate_change_is_made_and_stays_fused(change, scheme, wide, dtype, tmp_path):
    path, model = tmp_path / FUSED_ONNX, network(change)
    if scheme:
        model = calibrate(model, resolve(shipped_scheme(scheme), model), [IMAGES])
    found = export_half(model, path, [IMAGES])
    assert (found.wide, found.dtype, bool(found.misfits)) == (wide, dtype, bool(wide or dtype == "bfloat16"))
    assert found.images == 8 and all(map(fits, found.layers)) and bool(str(found)) == bool(found.misfits)
    with torch.no_grad():
        exact = model(IMAGES).numpy()
    logits = OnnxRuntimeEngine(path).infer(IMAGES.numpy())
    assert np.abs(logits - exact).max() < (0.03 if scheme is None else 0.2) * np.abs(exact).max()
    if found.misfits:
        library = find_library("tensorrt_rtx")
        built = build_engine(library, path, EngineOptions(library.resolve_targets(())))
        assert built.fused and built.attentions == model.config.depth


def test_ranges_are_those_of_pytorch(tmp_path):
    model, found = network(), {}
    export_onnx(model, tmp_path / FUSED_ONNX, "fused", torch.float16)
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, inputs, output, name=name: found.__setitem__(name, float(output.abs().max()))
        )
    with torch.no_grad():
        model(IMAGES)
    batches = [IMAGES[:5].numpy(), IMAGES[5:].numpy()]
    ranges = {each.layer: each for each in measure_ranges(tmp_path / FUSED_ONNX, batches)}
    for layer in ("patch_embed.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc3", "blocks.0.mlp.fc2", "head"):
        assert ranges[layer].largest == pytest.approx(found[layer], rel=2e-3)
        weight = model.get_submodule(layer).weight
        assert ranges[layer].weight == pytest.approx(float(weight.abs().max()), rel=1e-3)
        assert ranges[layer].headroom == pytest.approx(65504 / found[layer], rel=2e-3)


def test_a_network_that_is_finite_in_no_precision_fails_alone(tmp_path):
    """Its file stays as it is, and its manifest can be read again."""
    model = network(lambda model: model.head.weight.fill_(1e38))
    found = export_half(model, tmp_path / FUSED_ONNX, [IMAGES])
    assert (found.dtype, found.wide) == ("float16", {}) and "head" in found.misfits
    assert not np.isfinite(OnnxRuntimeEngine(tmp_path / FUSED_ONNX).infer(IMAGES.numpy())).any()
    preprocessing = Preprocessing.imagenet(32, 3)
    Manifest("illama", {}, preprocessing, ("a", "b", "c"), numeric_range=found).write(tmp_path)
    assert Manifest.read(tmp_path).numeric_range == found


def test_what_fits():
    def layer(largest, weight=None, dtype="float16"):
        return LayerRange("x", dtype, largest, weight)

    small = layer(0.0), layer(32752.0), layer(1.0, 65504.0), layer(1.0, 0.0), layer(1e30, 1e-30, "bfloat16")
    assert all(map(fits, small))
    assert not any(map(fits, (layer(40000.0), layer(np.inf), layer(np.nan), layer(1.0, np.inf), layer(1.0, 1e-5))))


def test_candidates():
    def ways(*misfits):
        modules = ["blocks.1", "blocks.1.mlp", "head", "backbone.blocks.11.attn"]
        return [(each.dtype, each.wide) for each in candidates(misfits, modules)]

    whole = ("bfloat16", {})
    mlp = {"blocks.1.mlp": "float32", "head": "float32"}
    assert ways("blocks.1.mlp.fc1", "blocks.1.mlp", "head")[0] == ("float16", mlp)
    assert ways("backbone.blocks.11.attn.core") == [("float16", {"backbone.blocks.11.attn": "bfloat16"}), whole]
    assert ways("blocks.1", "blocks.1.mlp") == ways("network/Add", "head") == [whole]
    sentence = str(NumericRange(1, (), tuple("abcd"), wide={"m": "float32"}))
    assert sentence.endswith("a, b, c and 1 more: m is in float32")


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8-weight-only"])
def test_an_almost_dead_channel_stays_right(scheme, tmp_path):
    """Its scale would be zero in float16, which TensorRT refuses."""
    torch.manual_seed(0)
    model, images = ILLaMA(replace(SMALL, depth=1)).eval(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        model.blocks[0].mlp.fc3.weight[5] = torch.randn(64) * 1e-6
    quantized = calibrate(model, resolve(shipped_scheme(scheme), model), [images])
    fc3 = quantized.blocks[0].mlp.fc3  # smoothed, in some schemes
    assert (fc3.weight_quantizer(fc3.weight) - fc3.weight)[5].abs().max() < 0.07 * fc3.weight[5].abs().max()
    found = export_half(quantized, tmp_path / FUSED_ONNX, [images])
    assert not found.misfits
    graph = onnx.load(tmp_path / FUSED_ONNX).graph
    scales = {node.input[1] for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    for each in graph.initializer:
        assert each.name not in scales or (onnx.numpy_helper.to_array(each) > 0).all()
    stored = [value for value in load_graph(tmp_path / FUSED_ONNX).graph.initializers.values() if value.name in scales]
    own = [value.const_value.numpy() for value in stored if value.const_value.size == len(fc3.weight)]
    assert any(scale[5] == np.float16(fc3.weight_quantizer.scale[5, 0]) for scale in own)
    library = find_library("tensorrt_rtx")
    targets = ("sm89",) if scheme == "fp8" else library.resolve_targets(())
    assert build_engine(library, tmp_path / FUSED_ONNX, EngineOptions(targets)).fused
