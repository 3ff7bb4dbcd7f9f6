"""Quantization against independent references: ONNX's own arithmetic, ModelOpt's, ONNX Runtime's."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modelopt.torch.quantization.nn import TensorQuantizer
from onnx.reference import ReferenceEvaluator

from illama import ILLaMA, ModelConfig
from illama.accuracy import load_images, torch_infer
from illama.checkpoint import SHIPPED, load_checkpoint
from illama.data import open_data
from illama.errors import UserError
from illama.masks import Operand
from illama.norms import RMSNorm
from quant.calibrate import calibrate, observe
from quant.export import export_onnx
from quant.layers import QuantizedConv2d, QuantizeDequantize, QuantizedLinear, dequantize, quantize_dequantize
from quant.schemes import FORMATS, SCHEMES, find_scheme

ONNX_TYPES = {"int8": onnx.TensorProto.INT8, "uint8": onnx.TensorProto.UINT8, "fp8": onnx.TensorProto.FLOAT8E4M3FN}


def _onnx_quantize_dequantize(x, scale, number):
    zero = onnx.helper.make_tensor("zero", ONNX_TYPES[number], [], [0])
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    floats = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("x", "scale", "y")]
    graph = onnx.helper.make_graph(nodes, "qdq", floats[:2], floats[2:], [zero])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    return ReferenceEvaluator(model).run(None, {"x": x, "scale": scale})[0]


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30),
    amax=st.floats(2**-9, 2**10, width=32),  # below it the reference overflows its int32; see the next test
    number=st.sampled_from(sorted(FORMATS)),
)
def test_the_arithmetic_is_onnx_s(values, amax, number):
    x = torch.tensor(values, dtype=torch.float32)
    scale = FORMATS[number].scale(torch.tensor(amax, dtype=torch.float32))
    ours = quantize_dequantize(x, scale, number).numpy()
    np.testing.assert_array_equal(ours, _onnx_quantize_dequantize(x.numpy(), scale.numpy(), number))


@pytest.mark.parametrize("number", sorted(FORMATS))
def test_whatever_is_too_large_saturates(number):
    """ONNX's QuantizeLinear says so; 1e30 steps do not fit into any integer on the way."""
    amax = torch.tensor(2.0**-10)
    x = torch.tensor([-1e30, -8225.0, 8225.0, 1e30])
    top, bottom = amax.item(), 0.0 if number == "uint8" else -amax.item() * (128 / 127 if number == "int8" else 1)
    ours = quantize_dequantize(x, FORMATS[number].scale(amax), number)
    assert ours.tolist() == pytest.approx([bottom, bottom, top, top], rel=1e-6)


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 6), seed=st.integers(0, 100), number=st.sampled_from(["int8", "fp8"]))
def test_weights_are_off_by_half_a_step_at_most(rows, seed, number):
    torch.manual_seed(seed)
    linear = torch.nn.Linear(5, rows)
    linear.weight.data[0] = 0.0  # a dead channel must stay zero, not become NaN
    layer = QuantizedLinear(linear, FORMATS[number], linear.weight.abs().amax(1), torch.nn.Identity())
    weight = dequantize(layer.weight, layer.scale, 1).t()
    relative = 0.5 / 127 if number == "int8" else 2**-4
    assert ((weight - linear.weight).abs() <= relative * linear.weight.abs().amax(1, keepdim=True) + 1e-7).all()


@pytest.fixture(scope="module")
def shipped():
    return load_checkpoint(SHIPPED).model


@pytest.fixture(scope="module")
def batches():
    data = open_data("fashion-mnist")
    images, _ = load_images(data.calibration(128), data.preprocessing(28, 1).transform())
    return torch.from_numpy(images).split(64)


@pytest.fixture(scope="module", params=sorted(SCHEMES))
def scheme(request):
    return SCHEMES[request.param]


@pytest.fixture(scope="module")
def quantized(shipped, batches, scheme):
    return calibrate(shipped, scheme, batches)


@pytest.fixture(scope="module")
def files(quantized, tmp_path_factory, scheme):
    """The CPU's graph and TensorRT's graph of the quantized model."""
    folder = tmp_path_factory.mktemp(scheme.name)
    export_onnx(quantized, folder / "plain.onnx", "plain")
    export_onnx(quantized, folder / "fused.onnx", "fused", torch.float16)
    return {"plain": folder / "plain.onnx", "fused": folder / "fused.onnx"}


def _run(path, images):
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 2
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(
        None, {"images": images}
    )[0]


def test_what_is_quantized(quantized):
    kinds = {name: type(module) for name, module in quantized.named_modules()}
    assert not [name for name, kind in kinds.items() if issubclass(kind, torch.nn.Linear | torch.nn.Conv2d | Operand)]
    assert sum(kind is QuantizedConv2d for kind in kinds.values()) == 1
    depth = quantized.config.depth
    assert sum(kind is QuantizedLinear for kind in kinds.values()) == 5 * depth + 1
    assert sum(kind is QuantizeDequantize for name, kind in kinds.items() if ".core." in name) == 4 * depth
    assert sum(kind is RMSNorm for kind in kinds.values()) == 2 * depth + 1


def test_quantizers_agree_with_modelopt_s(shipped, batches, quantized, scheme):
    """Fed with ModelOpt's own inputs, each of our quantizers gives ModelOpt's outputs, but for ties."""
    observed = observe(shipped, scheme, batches)
    seen = {}
    for name, module in observed.named_modules():
        if isinstance(module, TensorQuantizer):
            module.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, (i[0], o)))
    with torch.no_grad():
        observed(batches[0])
    compared = 0
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizeDequantize):
            x, expected = seen[f"{name.removesuffix('.input')}.input_quantizer"]
            differs = (module(x) - expected).abs() > 1e-6 * expected.abs().max()
            assert differs.float().mean() < 1e-3, name
            compared += 1
    assert compared == 1 + 9 * quantized.config.depth + 1


def test_exported_graph_equals_the_quantized_model(quantized, files, real_images):
    images, _ = real_images
    expected = torch_infer(quantized)(images)
    logits = _run(files["plain"], images)
    assert (logits.argmax(1) == expected.argmax(1)).mean() > 0.99
    assert np.linalg.norm(logits - expected) / np.linalg.norm(expected) < 0.02


def test_the_fused_graph_agrees_with_the_plain_one(files, real_images):
    images, _ = real_images
    plain, fused = _run(files["plain"], images), _run(files["fused"], images)
    assert (plain.argmax(1) == fused.argmax(1)).mean() > 0.98
    assert np.linalg.norm(plain - fused) / np.linalg.norm(plain) < 0.05


@pytest.mark.parametrize("form", ["plain", "fused"])
def test_graphs_are_standard_and_hold_8_bit_weights_alone(files, form, scheme, shipped):
    model = onnx.load(files[form])
    assert [(opset.domain, opset.version >= 23) for opset in model.opset_import] == [("", True)]
    kinds = {node.op_type for node in model.graph.node}
    assert ("Attention" in kinds) == (form == "fused") and ("Softmax" in kinds) == (form == "plain")
    expected = ONNX_TYPES[scheme.weights.name]
    matrices = sum(
        p.numel() for name, p in shipped.named_parameters() if p.ndim > 1 and name not in ("pos_embed", "cls_token")
    )
    assert (
        sum(np.prod(t.dims) for t in model.graph.initializer if t.data_type == expected and len(t.dims) > 1) == matrices
    )
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    wide = [t for t in model.graph.initializer if t.data_type in floats and np.prod(t.dims) > 50 * 128]
    assert not wide
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param


def test_float_graphs_equal_pytorch_and_each_other(shipped, tmp_path, real_images):
    images, _ = real_images
    expected = torch_infer(shipped)(images)
    for form in ("plain", "fused"):
        export_onnx(shipped, tmp_path / f"{form}.onnx", form)
        assert np.abs(_run(tmp_path / f"{form}.onnx", images) - expected).max() < 1e-4
        assert _run(tmp_path / f"{form}.onnx", images[:1]).shape == (1, 10)
    export_onnx(shipped, tmp_path / "half.onnx", "fused", torch.float16)
    half = _run(tmp_path / "half.onnx", images)
    assert np.linalg.norm(half - expected) / np.linalg.norm(expected) < 1e-2
    assert (half.argmax(1) == expected.argmax(1)).mean() > 0.99


@pytest.mark.parametrize("kind", ["pre_softmax", "bidirectional"])
def test_other_masks_export(kind, tmp_path):
    torch.manual_seed(0)
    model = ILLaMA(
        ModelConfig(image_size=16, patch_size=4, width=32, depth=2, heads=2, num_classes=5, mask=kind)
    ).eval()
    images = np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype(np.float32)
    for form in ("plain", "fused"):
        export_onnx(model, tmp_path / "model.onnx", form)
        np.testing.assert_allclose(_run(tmp_path / "model.onnx", images), torch_infer(model)(images), atol=1e-5)


def test_images_that_are_not_finite_are_refused(shipped):
    with pytest.raises(UserError, match="NaN or infinite activations"):
        calibrate(shipped, SCHEMES["int8"], [torch.full((1, 1, 28, 28), float("nan"))])


def test_an_unknown_scheme_is_refused():
    with pytest.raises(UserError, match="unknown scheme 'int3': choose from int8, fp8"):
        find_scheme("int3")
