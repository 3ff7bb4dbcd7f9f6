"""NVFP4 and MXFP8: formats with block scales, against nvidia-modelopt's tensors, ml_dtypes and ONNX's evaluator."""

import copy
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modelopt.torch.quantization.qtensor import MXFP8QTensor, NVFP4QTensor
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from step_difference import local_differences
from support import SMALL

from deploy.rewrites.lower_opset import lower_for
from deploy.versions import find_runtime
from illama.bundle import SHIPPED
from illama.checkpoints.load import load_checkpoint
from illama.errors import UserError
from illama.graph.emulate_half import emulate_half
from illama.graph.reader import load_graph, precisions
from illama.graph.session import cpu_session, emulated_session
from illama.graph.writer import save_graph
from illama.models.config import ModelConfig
from illama.models.illama import ILLaMA
from quant.export.onnx_export import export_onnx
from quant.export.verify import accumulated_sqnr, first_mismatch, trace_onnx
from quant.export.weights import read_quantized_weights, write_quantized_weights
from quant.quantizers.block_rounding import round_blocks, stored_block_scale
from quant.quantizers.calibrate import calibrate
from quant.quantizers.distillation import make_scales_buffers, make_scales_parameters
from quant.quantizers.layers import WeightQuantizer, quantizers
from quant.quantizers.observers import weight_amax
from quant.schemes.formats import FORMATS, TensorSpec
from quant.schemes.scheme import Scheme, resolve, shipped_scheme

NAMES = ("nvfp4", "mxfp8")
SCHEMES = (*NAMES, "nvfp4-weight-only")


def modelopts(name, x, tensor_scale=None):
    """Block scales and values of nvidia-modelopt."""
    if name == "mxfp8":
        quantized, scales = MXFP8QTensor.quantize(x.clone())
        return scales, quantized.dequantize(torch.float32, scale=scales)
    quantized, scales, tensor_scale = NVFP4QTensor.quantize(x.clone(), 16, weights_scaling_factor_2=tensor_scale)
    values = quantized.dequantize(torch.float32, scale=scales, double_scale=tensor_scale, block_sizes={-1: 16})
    return scales.view(torch.uint8), values


@st.composite
def tensors(draw):
    """(rows, 64), of very different rows, with values on ties, zeros and a block of zeros."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    size = 10.0 ** torch.tensor(draw(st.lists(st.floats(-6, 4), min_size=1, max_size=4)))
    x = torch.randn(len(size), 64, generator=generator)
    if draw(st.booleans()):
        x = (4 * x).round() / 4
    x[0, :32] *= draw(st.sampled_from([0.0, 1.0]))
    return x * size[:, None]


@given(tensors(), st.sampled_from(NAMES))
def test_weights_equal_modelopts_to_the_bit(x, name):
    spec = TensorSpec(name, "block")
    quantizer = WeightQuantizer(spec, weight_amax(x, spec))
    scales, values = modelopts(name, x)
    assert torch.equal(quantizer(x), values)
    used = x.unflatten(1, (-1, spec.dtype.block)).abs().amax(-1) > 0
    stored = stored_block_scale(quantizer.scale[..., 0], quantizer.tensor_scale, spec.dtype)
    assert torch.equal(stored.view(torch.uint8)[used], scales[used])


@given(tensors(), st.sampled_from(NAMES), st.floats(0.5, 2))
def test_activations_equal_modelopts_to_the_bit(x, name, share):
    """Also if the calibrated range is smaller than that of the activations, or larger."""
    tensor_scale = FORMATS[name].tensor_scale(x.abs().amax() * share)
    expected = modelopts(name, x, tensor_scale if name == "nvfp4" else None)[1]
    assert torch.equal(round_blocks(x, tensor_scale, FORMATS[name]), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_activations_equal_modelopts_quantizer_on_a_gpu(name):
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import TensorQuantizer

    config = {"nvfp4": mtq.NVFP4_DEFAULT_CFG, "mxfp8": mtq.MXFP8_DEFAULT_CFG}[name]["quant_cfg"]
    entry = next(each["cfg"] for each in config if each.get("quantizer_name") == "*input_quantizer")
    quantizer = TensorQuantizer(entry).cuda()
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    quantizer.amax = x.abs().amax().cuda()
    ours = round_blocks(x, FORMATS[name].tensor_scale(x.abs().amax()), FORMATS[name])
    torch.testing.assert_close(ours, quantizer(x.cuda()).cpu(), atol=0, rtol=0)


@pytest.mark.parametrize(("name", "dtype"), [("nvfp4", ml_dtypes.float4_e2m1fn), ("fp8", ml_dtypes.float8_e4m3fn)])
def test_rounding_and_steps_are_those_of_the_number_format(name, dtype):
    codes = np.arange(16 if name == "nvfp4" else 256, dtype=np.uint8).view(dtype).astype(np.float32)
    values = np.unique(codes[np.isfinite(codes)])
    middles = (values[1:] + values[:-1]) / 2
    many = np.concatenate([values, middles, np.nextafter(middles, np.inf), np.nextafter(middles, -np.inf)])
    rounded = FORMATS[name].round(torch.from_numpy(many.astype(np.float32)))
    np.testing.assert_array_equal(rounded.numpy(), many.astype(dtype).astype(np.float32))
    above = torch.from_numpy(values[values >= 0][:-1])
    np.testing.assert_array_equal((above + FORMATS[name].step(above)).numpy(), values[values > 0])


def test_the_least_squared_error_is_not_above_that_of_the_largest_magnitude():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    errors = {}
    for calibrator in ("max", "mse"):
        spec = TensorSpec("nvfp4", "block", calibrator=calibrator)
        quantizer = WeightQuantizer(spec, weight_amax(weight, spec))
        errors[calibrator] = float((quantizer(weight) - weight).square().sum())
    assert errors["mse"] < 0.9 * errors["max"]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return ILLaMA(SMALL).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=SCHEMES)
def quantized(request, network, images):
    scheme = replace(shipped_scheme(request.param), reconstruction_iterations=0)
    return request.param, calibrate(network, resolve(scheme, network), [images])


class Dynamic(OpRun):
    """TRT_FP4DynamicQuantize and TRT_MXFP8DynamicQuantize by nvidia-modelopt's tensors."""

    op_domain = "trt"

    def _run(self, x, scale=None, **options):
        x = torch.from_numpy(x.astype(np.float32))
        if scale is None:
            quantized, exponents = MXFP8QTensor.quantize(x)
            return quantized._quantized_data.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn), exponents.numpy()
        quantized, scales, _ = NVFP4QTensor.quantize(x, 16, weights_scaling_factor_2=torch.from_numpy(scale))
        values = quantized.dequantize(
            torch.float32, scale=torch.ones(()), double_scale=torch.ones(*scales.shape), block_sizes={-1: 16}
        )
        return values.numpy().astype(ml_dtypes.float4_e2m1fn), scales.view(torch.uint8).numpy().view(
            ml_dtypes.float8_e4m3fn
        )


class TRT_FP4DynamicQuantize(Dynamic):  # noqa: N801 - the operator's name
    pass


class TRT_MXFP8DynamicQuantize(Dynamic):  # noqa: N801
    pass


class TRT_MXFP8DequantizeLinear(OpRun):  # noqa: N801
    op_domain = "trt"

    def _run(self, values, exponents, axis=None, block_size=None, output_dtype=None):
        scale = np.exp2(exponents.astype(np.float32) - 127).repeat(block_size, axis)
        return (values.astype(np.float32) * scale,)


def test_both_forms_of_a_file_compute_the_network(quantized, images, tmp_path):
    """The form for CPUs in ONNX Runtime, and that for TensorRT in ONNX's evaluator with ModelOpt's quantizers."""
    name, model = quantized
    with torch.inference_mode():
        expected = model(images).numpy()
    export_onnx(model, tmp_path / "plain.onnx", "plain")
    export_onnx(model, tmp_path / "fused.onnx", "fused")
    session = cpu_session(tmp_path / "plain.onnx")
    close = {"atol": 2e-3 * np.abs(expected).max()}  # a tie moves a value by a step of its format
    np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], expected, **close)
    operators = [TRT_FP4DynamicQuantize, TRT_MXFP8DynamicQuantize, TRT_MXFP8DequantizeLinear]
    evaluator = ReferenceEvaluator(str(tmp_path / "fused.onnx"), new_ops=operators)
    np.testing.assert_allclose(evaluator.run(None, {"images": images.numpy()})[0], expected, **close)
    found = precisions(load_graph(tmp_path / "fused.onnx"))["blocks.0.attn.qkv"]
    assert found == {"nvfp4-weight-only": "fp32, nvfp4 weights"}.get(name, name)
    graph = load_graph(tmp_path / "plain.onnx")
    assert {node.domain for node in graph.graph} == {""} and set(graph.opset_imports) == {""}


@pytest.mark.parametrize(("name", "share"), [("nvfp4", 0.35), ("mxfp8", 0.6)])
def test_size_of_the_file_for_tensorrt(name, share, tmp_path):
    """Of the shipped network, over the size in float16; embedding, head and norms are in float16 in both."""
    checkpoint = load_checkpoint(SHIPPED)
    images = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    scheme = shipped_scheme(name).rounding_to_nearest()
    quantized = calibrate(checkpoint.model, resolve(scheme, checkpoint.model), [images])
    for file, model in (("half.onnx", checkpoint.model), ("quantized.onnx", quantized)):
        export_onnx(model, tmp_path / file, "fused", torch.float16)
    assert (tmp_path / "quantized.onnx").stat().st_size < share * (tmp_path / "half.onnx").stat().st_size


def test_every_tensor_of_a_file_is_that_of_the_network(quantized, network, images, tmp_path):
    name, model = quantized
    export_onnx(model, tmp_path / "m.onnx", "plain")
    differences = local_differences(model, tmp_path / "m.onnx", images.numpy())
    assert first_mismatch(differences) is None
    assert ("blocks.1.mlp.fc2.input" in differences) == (name in NAMES)
    sqnr = accumulated_sqnr(network, model, trace_onnx(tmp_path / "m.onnx", images.numpy(), model), images.numpy())
    assert sqnr["logits"][1] > sqnr["logits"][0]


def test_half_precision_is_emulated(quantized, network, images, tmp_path):
    _, model = quantized
    export_onnx(model, tmp_path / "m.onnx", "fused", torch.float16)
    with torch.inference_mode():
        exact, expected = network(images).numpy(), model(images).numpy()
    logits = emulated_session(tmp_path / "m.onnx").run(None, {"images": images.numpy()})[0]
    assert np.square(logits - exact).sum() < 2 * np.square(expected - exact).sum()


def test_training_and_its_files(quantized, network, images, tmp_path):
    name, model = quantized
    trained = copy.deepcopy(model)
    make_scales_parameters(trained)
    trained(images).square().sum().backward()
    weights = [each for key, each in trained.named_parameters() if key.startswith("blocks") and "weight" in key]
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in weights)
    with torch.no_grad():
        for _, quantizer in quantizers(trained):
            if isinstance(quantizer.scale, torch.nn.Parameter):
                quantizer.scale.mul_(1.1)
        in_training = trained(images)
    make_scales_buffers(trained)
    with torch.inference_mode():
        torch.testing.assert_close(trained(images), in_training, atol=1e-4, rtol=1e-3)
        write_quantized_weights(trained, shipped_scheme(name), tmp_path / "m.safetensors")
        read, _ = read_quantized_weights(tmp_path / "m.safetensors", network)
        assert torch.equal(read(images), trained(images))


@pytest.mark.parametrize("name", NAMES)
def test_reconstruction_reduces_the_error(name, network, images):
    """Of formats whose steps grow with the value."""
    scheme = replace(shipped_scheme(name), gptq=False, reconstruction_iterations=0)
    before, after = (
        calibrate(network, resolve(each, network), [images])
        for each in (scheme, replace(scheme, reconstruction_iterations=50))
    )
    with torch.inference_mode():
        exact = network(images)
        assert (after(images) - exact).square().sum() < (before(images) - exact).square().sum()


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"*patch_embed.*.weight": TensorSpec("mxfp8", "block")}, "Linears"),
        ({"*.qkv.weight": TensorSpec("nvfp4", "block")}, "24 inputs"),
        ({"*.qkv.input": TensorSpec("nvfp4", "block")}, "24 inputs"),
        ({"*.core.q": TensorSpec("nvfp4", "block")}, "Linears"),
        ({"*.fc1.input": TensorSpec("nvfp4", "block", calibrator="mse")}, "calibrator"),
    ],
)
def test_what_cannot_have_blocks_is_refused_by_name(tensors, words):
    network = ILLaMA(ModelConfig(image_size=16, patch_size=8, width=24, depth=1, heads=2, num_classes=3))
    with pytest.raises(UserError, match=words):
        resolve(Scheme("mine", tensors), network)


def test_modelopt_feeds_the_calibration(network, images, monkeypatch):
    """Its quantizers call our observers: without it, no tensor has a range."""
    monkeypatch.setattr("quant.quantizers.calibrate.mtq.quantize", lambda model, config, run: run(model))
    with pytest.raises(UserError, match="calibration"):
        calibrate(network, resolve(shipped_scheme("nvfp4"), network), [images])


def test_granularity_and_format_must_fit():
    for values in (("nvfp4",), ("mxfp8", "channel"), ("int8", "block")):
        with pytest.raises(UserError, match="block"):
            TensorSpec(*values)


def test_blocks_that_tensorrt_does_not_multiply(network):
    block = TensorSpec("mxfp8", "block")
    for tensors in ({"*.qkv.weight": block}, {"*.qkv.weight": block, "*.qkv.input": TensorSpec("fp8")}):
        assert resolve(Scheme("mine", tensors), network).quantization.no_tensorrt == "blocks"
    for name in SCHEMES:
        quantization = resolve(shipped_scheme(name), network).quantization
        assert quantization.no_tensorrt is None and quantization.emulated == "blocks"


@pytest.mark.parametrize("name", NAMES)
def test_older_versions_of_tensorrt(name, network, images, tmp_path):
    """MXFP8's operators do not depend on ONNX's opset; NVFP4's type does."""
    scheme = replace(shipped_scheme(name), gptq=False)
    export_onnx(calibrate(network, resolve(scheme, network), [images]), tmp_path / "m.onnx", "fused", torch.float16)
    with pytest.raises(UserError, match="DynamicQuantize"):
        lower_for(load_graph(tmp_path / "m.onnx"), find_runtime("tensorrt", "10.3"))
    model = load_graph(tmp_path / "m.onnx")
    if name == "nvfp4":
        with pytest.raises(UserError, match="FLOAT4E2M1"):
            lower_for(model, find_runtime("tensorrt", "10.13"))
        return
    assert lower_for(model, find_runtime("tensorrt", "10.13")) and model.opset_imports[""] < 23
    save_graph(model, tmp_path / "older.onnx")
    older, newer = (emulated_session(tmp_path / each) for each in ("older.onnx", "m.onnx"))
    expected = newer.run(None, {"images": images.numpy()})[0]
    found = older.run(None, {"images": images.numpy()})[0]
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


def one_operator(path, node, scale_type=TensorProto.FLOAT):
    """A graph of TRT_FP4DynamicQuantize and what dequantizes its result, in half precision."""
    scale = helper.make_tensor("s", scale_type, [], [0.5])
    computed = [helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0)] if "m" in node.input else []
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        *computed,
        node,
        helper.make_node("Cast", ["s"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("DequantizeLinear", ["b", "wide"], ["ds"]),
        helper.make_node("DequantizeLinear", ["q", "ds"], ["y"], axis=-1, block_size=16),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2, 32]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [scale])
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("trt", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=11), path)
    return path


def test_graphs_of_others(tmp_path):
    """Attributes that are left out have TensorRT's defaults, and scales may be in half precision."""
    node = helper.make_node("TRT_FP4DynamicQuantize", ["h", "s"], ["q", "b"], domain="trt")
    path = one_operator(tmp_path / "m.onnx", node, TensorProto.FLOAT16)
    x = np.random.default_rng(0).normal(size=(3, 2, 32)).astype(np.float16).astype(np.float32)
    expected = round_blocks(torch.from_numpy(x), torch.tensor(0.5), FORMATS["nvfp4"]).numpy()
    np.testing.assert_array_equal(emulated_session(path).run(None, {"x": x})[0], expected)
    for changed, inputs in (({"axis": 1}, ["h", "s"]), ({"block_size": 24}, ["h", "s"]), ({}, ["h", "m"])):
        node = helper.make_node("TRT_FP4DynamicQuantize", inputs, ["q", "b"], domain="trt", **changed)
        path = one_operator(tmp_path / "m.onnx", node)
        model = load_graph(path)  # valid for ONNX
        with pytest.raises(UserError, match="blocks"):
            emulate_half(model)
