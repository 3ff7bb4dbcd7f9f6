"""Quantization against independent references: the arithmetic of ONNX, ModelOpt and ONNX Runtime."""

import copy
import logging
import warnings
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from modelopt.torch.quantization.calib import HistogramCalibrator
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import QuantModuleRegistry, TensorQuantizer
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from step_difference import largest_step_difference
from torch.export import ExportedProgram

from illama import ILLaMA, ModelConfig
from illama.bundle import SHIPPED
from illama.checkpoints.load import load_checkpoint
from illama.data.datasets import open_data
from illama.errors import UserError
from illama.graph.session import cpu_session
from illama.inference import load_images, torch_infer
from illama.models.attention import QuantizerPoint
from illama.models.illama import Linear
from illama.models.norms import RMSNorm
from quant.export.onnx_export import export_onnx
from quant.quantizers.blocks import blocks
from quant.quantizers.calibrate import calibrate
from quant.quantizers.layers import (
    BlockQuantizer,
    QuantizedConv2d,
    QuantizeDequantize,
    QuantizedLinear,
    WeightQuantizer,
    fake_quantize,
    fold_zero_point,
    freeze,
    quantize_dequantize,
    quantizers,
)
from quant.quantizers.observers import BINS, RangeObserver, entropy_amax, mse_amax, percentile_amax, weight_amax
from quant.quantizers.smoothquant import smooth
from quant.schemes.formats import FORMATS, TensorSpec
from quant.schemes.scheme import Rotations, Scheme, resolve, shipped_scheme, unfit_for_tensorrt
from quant.schemes.shipped import SHIPPED_SCHEMES

ONNX_TYPES = {
    "int8": onnx.TensorProto.INT8,
    "uint8": onnx.TensorProto.UINT8,
    "int4": onnx.TensorProto.INT4,
    "uint4": onnx.TensorProto.UINT4,
    "fp8": onnx.TensorProto.FLOAT8E4M3FN,
}
ONNX_SCHEMES = sorted(name for name in SHIPPED_SCHEMES if shipped_scheme(name).backend == "onnx")
TENSORRT_SCHEMES = [
    "mixed",
    "int8-attention",
    "fp8",
    "fp8-attention",
    "int8",
    "int8-accurate",
    "int8-weight-only",
    "w4a16",
]


def _onnx_quantize_dequantize(x, scale, dtype, zero_point=0):
    zero = onnx.helper.make_tensor("zero", ONNX_TYPES[dtype], [], [zero_point])
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    floats = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("x", "scale", "y")]
    graph = onnx.helper.make_graph(nodes, "qdq", floats[:2], floats[2:], [zero])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    return ReferenceEvaluator(model).run(None, {"x": x, "scale": scale})[0]


@settings(deadline=None, max_examples=100)
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30),
    amax=st.floats(2**-9, 2**10, width=32),  # below it the reference overflows its int32; see the next test
    dtype=st.sampled_from(sorted(ONNX_TYPES)),
    zero_point=st.sampled_from([0, 0, 5]),
)
def test_the_arithmetic_is_onnx_s(values, amax, dtype, zero_point):
    assume(dtype != "fp8" or zero_point == 0)
    x = torch.tensor(values, dtype=torch.float32)
    scale = FORMATS[dtype].scale(torch.tensor(amax, dtype=torch.float32))
    expected = _onnx_quantize_dequantize(x.numpy(), scale.numpy(), dtype, zero_point)
    np.testing.assert_array_equal(quantize_dequantize(x, scale, dtype, zero_point).numpy(), expected)
    # Training computes the same but for the last bit of a sum.
    trained = fake_quantize(x, scale, FORMATS[dtype], zero_point).numpy()
    np.testing.assert_allclose(trained, expected, rtol=1e-5, atol=1e-5 * scale.item())


@pytest.mark.parametrize("dtype", sorted(FORMATS))
def test_values_out_of_range_saturate(dtype):
    """As ONNX's QuantizeLinear specifies; 1e30 steps do not fit into any integer type."""
    limits, amax = FORMATS[dtype], torch.tensor(0.25)
    x = torch.tensor([-1e30, -8225.0, 8225.0, 1e30])
    top, bottom = amax.item(), amax.item() * limits.low / limits.high
    ours = quantize_dequantize(x, limits.scale(amax), dtype)
    assert ours.tolist() == pytest.approx([bottom, bottom, top, top], rel=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 6),
    seed=st.integers(0, 100),
    spec=st.sampled_from(
        [
            TensorSpec("int8", "channel"),
            TensorSpec("fp8", "channel"),
            TensorSpec("int4", "group", 4),
            TensorSpec("int6"),
        ]
    ),
)
def test_weights_are_off_by_half_a_step_at_most(rows, seed, spec):
    torch.manual_seed(seed)
    linear = torch.nn.Linear(8, rows)
    linear.weight.data[0] = 0.0  # a dead channel must stay zero, not become NaN
    float_weight = linear.weight.detach().clone()
    layer = QuantizedLinear(linear, WeightQuantizer(spec, weight_amax(linear.weight, spec)), None)
    rounded = layer(torch.eye(8)).t() - linear.bias[:, None]
    layer.freeze()
    stored = layer(torch.eye(8)).t() - linear.bias[:, None]
    torch.testing.assert_close(rounded, stored, rtol=1e-6, atol=1e-6)
    amax = float_weight.unflatten(1, (-1, spec.group_size if spec.granularity == "group" else 8)).abs().amax(2, True)
    amax = (amax if spec.granularity != "tensor" else amax.amax().expand_as(amax)).expand(rows, -1, 8).reshape(rows, -1)
    amax = amax[:, :8] if spec.granularity != "group" else amax.unflatten(1, (2, 8))[:, :, :4].reshape(rows, 8)
    relative = 2**-4 if spec.format == "fp8" else 0.5 / FORMATS[spec.format].high
    assert ((stored - float_weight).abs() <= relative * amax + 1e-6).all()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20), min_size=1, max_size=5))
def test_an_observer_counts_every_value_once(batches):
    observer = RangeObserver(TensorSpec("int8", calibrator="percentile", percentile=100))
    for batch in batches:
        observer.collect(torch.tensor(batch))
    values = np.abs(np.concatenate([np.float32(batch) for batch in batches]))
    assert observer.counts.sum() == (values != 0).sum()
    if values.any():
        assert observer.compute_amax() == pytest.approx(values.max(), rel=3 / BINS)


def _histogram(values):
    return np.histogram(np.abs(values), bins=BINS, range=(0, np.abs(values).max()))[0].astype(float), np.abs(
        values
    ).max()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), first=st.floats(0.01, 1), spread=st.floats(0.05, 2))
def test_fp8_ranges_are_within_an_octave_and_clamp_nothing(seed, first, spread):
    """The error is that of the best range of the octave, also if the histogram grew between batches."""
    generator = torch.Generator().manual_seed(seed)
    values = (spread * torch.randn(4000, generator=generator)).exp()
    observer = RangeObserver(TensorSpec("fp8", calibrator="mse"))
    observer.collect(first * values[:2000])
    observer.collect(values[2000:])
    seen, amax = torch.cat([first * values[:2000], values[2000:]]), observer.compute_amax()
    assert seen.max() <= amax <= 2 * seen.max()

    def error(amax):
        return (fake_quantize(seen, FORMATS["fp8"].scale(amax), FORMATS["fp8"]) - seen).square().sum()

    assert error(amax) <= 1.05 * min(error(seen.max() * 2**share) for share in torch.linspace(0, 1, 33))


def test_calibrators_against_numpy_and_modelopt():
    """Percentile against numpy's and ModelOpt's, mse against a search over the values."""
    values = np.random.default_rng(0).standard_t(3, 50_000).astype(np.float32)
    counts, limit = _histogram(values)
    chosen = percentile_amax(counts, limit, 99.9)
    assert chosen == pytest.approx(np.percentile(np.abs(values), 99.9), rel=0.02)
    dtype, errors = FORMATS["int8"], {}
    for share in range(1, 101):
        scale = torch.tensor(limit * share / 100 / dtype.high)
        rounded = dtype.quantize(torch.from_numpy(values), scale).float() * scale
        errors[share] = float((rounded - torch.from_numpy(values)).square().sum())
    best = min(errors, key=errors.get)
    assert mse_amax(counts, limit, dtype) == pytest.approx(limit * best / 100, rel=0.05)
    theirs = HistogramCalibrator(8, None, False)
    theirs.collect(torch.from_numpy(values))
    ours = RangeObserver(TensorSpec("int8", calibrator="percentile", percentile=99.9))
    ours.collect(torch.from_numpy(values))
    assert ours.compute_amax() == pytest.approx(float(theirs.compute_amax("percentile", percentile=99.9)), rel=0.02)


@pytest.fixture(scope="module")
def shipped():
    return load_checkpoint(SHIPPED).model


@pytest.fixture(scope="module")
def short(shipped):
    """The first and the last block of the shipped network: trained weights, all tokens and the class token only."""
    model = ILLaMA(replace(shipped.config, depth=2)).eval()
    state = {
        name.replace("blocks.5.", "blocks.1."): value
        for name, value in shipped.state_dict().items()
        if not name.startswith(tuple(f"blocks.{i}." for i in (1, 2, 3, 4)))
    }
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module")
def batches():
    data = open_data("fashion-mnist")
    images, _ = load_images(data.calibration(128), data.preprocessing(28, 1).transform())
    return torch.from_numpy(images).split(64)


@pytest.fixture(scope="module", params=ONNX_SCHEMES)
def scheme(request):
    scheme = shipped_scheme(request.param)
    return replace(scheme, reconstruction_iterations=min(scheme.reconstruction_iterations, 4))


@pytest.fixture(scope="module")
def quantized(short, batches, scheme):
    return calibrate(short, resolve(scheme, short), batches)


@pytest.fixture(scope="module")
def file(quantized, tmp_path_factory, scheme):
    """The quantized network's graph for CPUs."""
    path = tmp_path_factory.mktemp(scheme.name) / "plain.onnx"
    export_onnx(quantized, path, "plain")
    return path


def _run(path, images):
    return cpu_session(path, 2).run(None, {"images": images})[0]


def _relative(logits, expected):
    return np.linalg.norm(logits - expected) / np.linalg.norm(expected)


def test_what_is_quantized(shipped, batches):
    scheme = replace(shipped_scheme("int8-attention"), reconstruction_iterations=0)
    quantized = calibrate(shipped, resolve(scheme, shipped), batches)
    kinds = {name: type(module) for name, module in quantized.named_modules()}
    assert not [
        name for name, kind in kinds.items() if issubclass(kind, torch.nn.Linear | torch.nn.Conv2d | QuantizerPoint)
    ]
    assert sum(kind is QuantizedConv2d for kind in kinds.values()) == 1
    depth = quantized.config.depth
    assert sum(kind is QuantizedLinear for kind in kinds.values()) == 5 * depth + 1
    assert sum(kind is QuantizeDequantize for name, kind in kinds.items() if ".core." in name) == 4 * depth
    assert type(quantized.patch_embed.proj.input) is type(None)  # pixels are not rounded
    assert sum(kind is RMSNorm for kind in kinds.values()) == 2 * depth + 1


def test_the_plan_and_the_network_agree(short, quantized, scheme):
    plan = resolve(scheme, short).tensors
    assert {name: module.spec for name, module in quantizers(quantized)} == plan


def test_loggers_warnings_and_modelopt_are_left_as_they_were(short, batches, tmp_path):
    def state():
        registered = [cls in QuantModuleRegistry for cls in (Linear, QuantizerPoint)]
        return registered, logging.getLogger("torch.onnx").level, list(warnings.filters)

    before = state()
    export_onnx(calibrate(short, resolve(shipped_scheme("int8"), short), batches), tmp_path / "model.onnx", "plain")
    assert state() == before and not any(before[0])


def test_a_network_is_traced_once(short, monkeypatch, tmp_path):
    """Tracing again, to decompose operators, would take longer than the rest of the export."""
    decomposed = []
    monkeypatch.setattr(ExportedProgram, "run_decompositions", lambda *_: decomposed.append(1))
    for form in ("plain", "fused"):
        export_onnx(short, tmp_path / "model.onnx", form)
    assert not decomposed


@pytest.mark.parametrize("name", ["int8-attention", "fp8-attention"])
def test_quantizers_agree_with_modelopt_s(short, batches, name):
    """Given the same inputs and range, each quantizer gives the same outputs as ModelOpt's, except at ties."""
    quantized = calibrate(short, resolve(shipped_scheme(name), short), batches)
    quantized.readout_only = False  # the last block's weights as a whole
    seen = {}
    for tensor, module in quantizers(quantized):
        module.register_forward_hook(lambda m, i, o, tensor=tensor: seen.__setitem__(tensor, (m, i[0], o)))
    with torch.no_grad():
        quantized(batches[0])
    assert len(seen) == len(resolve(shipped_scheme(name), short).tensors)
    for tensor, (module, x, ours) in seen.items():
        if not module.spec.symmetric:  # ModelOpt has no zero point: the shifted values, as in the graph for TensorRT
            shift = module.fold_zero_point()
            x, ours = x + shift, ours + shift
        config = {
            "num_bits": (4, 3) if module.spec.format == "fp8" else 8,
            "unsigned": not module.dtype.signed,
            "axis": 0 if tensor.endswith(".weight") else None,
        }
        theirs = TensorQuantizer(QuantizerAttributeConfig(**config), amax=module.scale * module.dtype.high)
        differs = (ours - theirs(x)).abs() > 1e-6 * ours.abs().max()
        assert differs.float().mean() < 2e-3, tensor


def has_rounded_inputs(quantized):
    return any(isinstance(module, QuantizeDequantize | BlockQuantizer) for _, module in quantizers(quantized))


def test_exported_graph_equals_the_quantized_model(quantized, file, real_images):
    """Except for values at a tie, which a sum in another order can round to the other side."""
    images, _ = real_images
    expected = torch_infer(quantized)(images)
    logits = _run(file, images)
    assert (logits.argmax(1) == expected.argmax(1)).mean() > 0.98
    assert _relative(logits, expected) < (0.02 if has_rounded_inputs(quantized) else 1e-5)
    assert _run(file, images[:1]).shape == (1, 10)


def test_every_tensor_of_the_file_is_within_one_step(quantized, file, real_images):
    """Compared with the network that it was exported from, given the same inputs (quant/export/verify.py)."""
    images, _ = real_images
    quantized = copy.deepcopy(quantized)
    quantized.set_attention_form("plain")
    assert largest_step_difference(quantized, file, images[:32]) <= 1


def test_graphs_are_standard_and_hold_few_bits(file, scheme, short, quantized):
    model = onnx.load(file)
    assert [(opset.domain, opset.version >= 23) for opset in model.opset_import] == [("", True)]
    stored = {}
    for tensor in model.graph.initializer:
        if len(tensor.dims) > 1:
            stored[tensor.data_type] = stored.get(tensor.data_type, 0) + int(np.prod(tensor.dims))
    expected = {}
    for name, spec in resolve(scheme, short).tensors.items():
        if name.endswith(".weight"):
            kind = ONNX_TYPES[{"nvfp4": "int8", "mxfp8": "fp8"}.get(spec.format, spec.format.replace("6", "8"))]
            expected[kind] = expected.get(kind, 0) + short.get_parameter(name).numel()
    assert {kind: count for kind, count in stored.items() if kind in expected} == expected
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    assert not [t for t in model.graph.initializer if t.data_type in floats and np.prod(t.dims) > 60 * 128]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param


def test_weights_of_4_bits_are_packed(short, batches, tmp_path):
    sizes = {}
    for name in ("w4a16", "int8-weight-only"):
        export_onnx(
            calibrate(short, resolve(replace(shipped_scheme(name), reconstruction_iterations=0), short), batches),
            tmp_path / name,
            "plain",
        )
        sizes[name] = (tmp_path / name).stat().st_size
    weights = [p for name, p in short.named_parameters() if name.startswith("blocks") and p.ndim == 2]
    saved = sum(
        p.numel() / 2 + 4 * len(p) - 4 * p.numel() / 64 for p in weights
    )  # and scales per group for per channel
    assert sizes["int8-weight-only"] - sizes["w4a16"] == pytest.approx(saved, rel=0.01)


def test_values_are_named_by_layer(file):
    """The output of every layer and every quantizer, for users and quant.debug_layers."""
    values = {output for node in onnx.load(file).graph.node for output in node.output}
    assert {"patch_embed.proj", "blocks.0", "blocks.0.attn.qkv", "blocks.1.mlp.fc2", "norm", "logits"} <= values


@pytest.mark.parametrize("name", ONNX_SCHEMES)
def test_schemes_that_tensorrt_supports(name, short):
    """Those with block scales have operators of TensorRT: tests/quant/test_block_scales.py runs their graphs."""
    blocks = ("mxfp8", "nvfp4", "nvfp4-weight-only")
    assert (not unfit_for_tensorrt(resolve(shipped_scheme(name), short).tensors)) == (
        name in (*TENSORRT_SCHEMES, *blocks)
    )


@pytest.mark.parametrize("name", TENSORRT_SCHEMES)
def test_the_fused_graph_agrees(name, short, batches, tmp_path, real_images):
    images, _ = real_images
    quantized = calibrate(short, resolve(replace(shipped_scheme(name), reconstruction_iterations=0), short), batches)
    export_onnx(quantized, tmp_path / "fused.onnx", "fused", torch.float16)
    fused, expected = _run(tmp_path / "fused.onnx", images), torch_infer(quantized)(images)
    assert (fused.argmax(1) == expected.argmax(1)).mean() > 0.97
    assert _relative(fused, expected) < 0.05
    kinds = [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node]
    assert kinds.count("Attention") == 2 and "Softmax" not in kinds


def test_smoothing_does_not_change_the_output(shipped, batches):
    """SmoothQuant rescales channels exactly: in float64 the outputs are equal."""
    exact, smoothed = copy.deepcopy(shipped).double(), copy.deepcopy(shipped).double()
    images = [batch.double() for batch in batches]
    smooth(smoothed, replace(shipped_scheme("int8"), smooth={"*": 0.7}), images)
    with torch.no_grad():
        torch.testing.assert_close(smoothed(images[0]), exact(images[0]), rtol=1e-9, atol=1e-9)
    assert not torch.equal(smoothed.blocks[0].mlp.fc2.weight, exact.blocks[0].mlp.fc2.weight)
    assert not torch.equal(smoothed.blocks[0].attn.proj.weight, exact.blocks[0].attn.proj.weight)


def test_block_reconstruction_is_closer_than_rounding_to_nearest(short, batches):
    """The first block's error is smaller on images that were not used."""
    used, unused = batches[:1], batches[1]
    # Without rotations, the blocks' outputs can be compared.
    scheme = replace(shipped_scheme("w4a8"), rotate=Rotations(), gptq=False)
    plain = calibrate(short, resolve(replace(scheme, reconstruction_iterations=0), short), used)
    reconstructed = calibrate(short, resolve(replace(scheme, reconstruction_iterations=60), short), used)
    seen = {}
    for key, model in (("float", short), ("plain", plain), ("reconstructed", reconstructed)):
        first = dict(blocks(model))["blocks.0"]
        hook = first.register_forward_hook(lambda m, i, o, key=key: seen.__setitem__(key, o))
        with torch.no_grad():
            model(unused)
        hook.remove()
    error = {key: float((seen[key] - seen["float"]).square().mean()) for key in ("plain", "reconstructed")}
    assert error["reconstructed"] < 0.8 * error["plain"]
    weight = reconstructed.blocks[0].mlp.fc1
    freeze(reconstructed)
    assert weight.frozen.abs().max() <= 8  # the weights are still on the grid of 4 bits


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 99), low=st.floats(-8, 0, width=32), dtype=st.sampled_from(["uint8", "uint6", "uint4"]))
@pytest.mark.parametrize("bias", [True, False])
def test_zero_point_folding_does_not_change_a_layer_s_output(bias, seed, low, dtype):
    """The integers are the same less a constant, with zero point 0 as TensorRT demands."""
    torch.manual_seed(seed)
    x = torch.cat([torch.rand(40, 6, dtype=torch.float64) * (8 - low) + low, torch.full((1, 6), 8.0)])
    spec = TensorSpec(dtype, symmetric=False)
    linear = torch.nn.Linear(6, 3, bias=bias).double()
    weight = WeightQuantizer(TensorSpec("int8", "channel"), weight_amax(linear.weight, TensorSpec("int8", "channel")))
    layer = QuantizedLinear(linear, weight, QuantizeDequantize(spec, x.min(), x.max())).double()
    expected, integers = layer(x), (layer.input(x) / layer.input.scale).round() + layer.input.zero_point
    fold_zero_point(layer)
    assert layer.input.dtype.signed and layer.input.zero_point == 0
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
    folded = (layer.input(x + layer.shift) / layer.input.scale).round()
    assert torch.equal(folded + 2 ** (FORMATS[dtype].bits - 1), integers)


def test_asymmetric_inputs_of_6_bits_export(short, batches, tmp_path, real_images):
    images, _ = real_images
    spec = TensorSpec("uint6", symmetric=False)
    scheme = Scheme("mine", {"*.mlp.*.weight": TensorSpec("int8", "channel"), "*.mlp.*.input": spec})
    quantized = calibrate(short, resolve(scheme, short), batches)
    for form in ("plain", "fused"):
        export_onnx(quantized, tmp_path / f"{form}.onnx", form)
        assert _relative(_run(tmp_path / f"{form}.onnx", images), torch_infer(quantized)(images)) < 0.02
    zeros = {
        numpy_helper.to_array(t).item()
        for t in onnx.load(tmp_path / "fused.onnx").graph.initializer
        if t.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8) and not t.dims
    }
    assert zeros == {0}


def test_an_unsigned_format_for_negative_values_is_refused(short, batches):
    with pytest.raises(UserError, match=r"blocks\.0\.mlp\.fc2\.input .* uint8"):
        calibrate(short, resolve(Scheme("mine", {"*.fc2.input": TensorSpec("uint8")}), short), batches)


def test_entropy_ignores_ranges_with_fewer_bins_than_levels():
    """Such a range has no divergence, and would be chosen however much it clips."""
    values = np.append(np.random.default_rng(0).standard_normal(200_000), 100.0)
    for dtype in ("int8", "uint8"):
        chosen = entropy_amax(*_histogram(values), FORMATS[dtype])
        assert (np.abs(values) > chosen).mean() < 0.02
    with pytest.raises(UserError, match="entropy"):
        TensorSpec("fp8", calibrator="entropy")


def test_a_float_layer_stays_float(short, batches):
    tensors = {**shipped_scheme("int8").tensors, "blocks.0.mlp.fc2.*": None}
    scheme = replace(shipped_scheme("int8"), tensors=tensors, rotate=Rotations())
    quantized = calibrate(short, resolve(scheme, short), batches)
    assert torch.equal(quantized.blocks[0].mlp.fc2.weight, short.blocks[0].mlp.fc2.weight)
    assert type(quantized.blocks[0].mlp.fc2) is type(short.blocks[0].mlp.fc2)
    assert isinstance(quantized.blocks[1].mlp.fc2, QuantizedLinear)


def test_float_graphs_equal_pytorch_and_each_other(shipped, tmp_path, real_images):
    images, _ = real_images
    expected = torch_infer(shipped)(images)
    for form in ("plain", "fused"):
        export_onnx(shipped, tmp_path / f"{form}.onnx", form)
        assert np.abs(_run(tmp_path / f"{form}.onnx", images) - expected).max() < 1e-4
        assert _run(tmp_path / f"{form}.onnx", images[:1]).shape == (1, 10)
    export_onnx(shipped, tmp_path / "half.onnx", "fused", torch.float16)
    half = _run(tmp_path / "half.onnx", images)
    assert _relative(half, expected) < 1e-2
    assert (half.argmax(1) == expected.argmax(1)).mean() > 0.999


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
    with pytest.raises(UserError, match="NaN"):
        calibrate(shipped, resolve(shipped_scheme("int8"), shipped), [torch.full((1, 1, 28, 28), float("nan"))])


def test_an_unknown_scheme_is_refused():
    with pytest.raises(UserError, match=r"int3.* int8, int8-accurate"):
        shipped_scheme("int3")
