"""Half precision, emulated on a CPU: every operator computes what ONNX's reference evaluator does in half precision."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import scipy.special
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from support import SMALL

from deploy.runtimes.onnxruntime_engine import OnnxRuntimeEngine
from deploy.runtimes.open_engine import open_engine
from illama import ILLaMA
from illama.bundle import FUSED_ONNX, SHIPPED
from illama.checkpoints.load import load_checkpoint
from illama.graph.emulate_half import emulate_half
from illama.graph.reader import LAYER, load_graph, read_softmax_scales, to_bytes
from illama.graph.session import cpu_session
from quant.export.onnx_export import export_onnx
from quant.quantizers.calibrate import calibrate
from quant.schemes.scheme import Scheme, resolve, shipped_scheme
from quant.schemes.shipped import SHIPPED_SCHEMES

IMAGES = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)


def network_for(mask, **changes):
    torch.manual_seed(0)
    return ILLaMA(replace(SMALL, mask=mask, **changes)).eval()


def run_emulated(model, images=None, **options):
    emulate_half(model, **options)
    return cpu_session(to_bytes(model), fused=True).run(None, images or {})


def single_node(node, values, model):
    """A graph of one node, with its inputs as constants."""
    constants = [numpy_helper.from_array(values[name], name) for name in dict.fromkeys(node.input) if name]
    results = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(values[name].dtype), values[name].shape)
        for name in node.output
    ]
    graph = helper.make_graph([node], "one", [], results, constants)
    one = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    one.metadata_props.extend(model.metadata_props)
    return ir.from_proto(one)


def attention_in_half(q, k, v, mask, output):
    """Independent of ONNX: its operator cannot quantize the softmax output."""
    scores = (q.astype(np.float32) @ k.astype(np.float32).swapaxes(-1, -2)).astype(q.dtype).astype(np.float64)
    scores = scores if mask is None else np.where(mask, scores, -np.inf)
    p = scipy.special.softmax(scores, -1).astype(q.dtype).astype(np.float32)
    if output is not None:
        scale, high = np.float32(q.dtype.type(output.scale)), {"int8": 127, "fp8": 448}[output.number]
        steps = np.clip(p / scale, -high, high)
        steps = np.rint(steps) if output.number == "int8" else steps.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        p = (steps * scale).astype(q.dtype).astype(np.float32)
    return (p @ v.astype(np.float32)).astype(q.dtype)


def assert_close(kind, found, expected, tie=0.0):
    """Equal to the bit, but for what the reference computes in several rounded steps, and ties.

    A softmax output that is half-way between two steps of its format changes a row of the results by up to ``tie``.
    """
    assert found.shape == expected.shape
    if expected.dtype not in (np.float16, ml_dtypes.bfloat16):
        expected = expected.view(found.dtype)  # ONNX Runtime returns FP8 as its bits
        np.testing.assert_array_equal(found, expected, kind)
        return
    ulp = np.abs(np.spacing(expected)).astype(np.float64)
    off = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    near = ulp.max() if kind == "Attention" else ulp
    assert (off <= near + tie).all() and (off > near).mean() < 0.02, kind
    assert kind in ("Attention", "Sigmoid") or (off > 0).mean() < 0.001, kind


def check_every_node(path):
    model, outputs = onnx.load(path), read_softmax_scales(load_graph(path))
    values = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer} | {"images": IMAGES}
    checked = set()
    for node in model.graph.node:
        tie = 0.0
        if node.op_type == "Attention":
            output = outputs.get({each.key: each.value for each in node.metadata_props}[LAYER])
            inputs = [*(values[name] for name in node.input), None][:4]
            results = [attention_in_half(*inputs, output)]
            if output is not None:
                step = output.scale * {"int8": 1, "fp8": 32}[output.number]  # the largest of the format
                tie = step * np.abs(inputs[2].astype(np.float64)).max()
            if output is None:  # the reference's softmax rounds its sums too
                reference = ReferenceEvaluator(node).run(None, dict(zip(node.input, inputs, strict=False)))[0]
                wide = [each.astype(np.float64) for each in (reference, results[0])]
                np.testing.assert_allclose(*wide, rtol=0, atol=4 * float(np.spacing(np.abs(reference).max())))
        else:
            if node.op_type == "QuantizeLinear":  # the quotient is not rounded, as in the kernels of every runtime
                node.attribute.append(helper.make_attribute("precision", onnx.TensorProto.FLOAT))
            results = ReferenceEvaluator(node).run(None, {name: values[name] for name in node.input if name})
        values |= dict(zip(node.output, results, strict=True))
        if any(values[name].dtype in (np.float16, ml_dtypes.bfloat16) for name in (*node.input, *node.output)):
            for expected, found in zip(
                results, run_emulated(single_node(node, values, model), softmax="half"), strict=True
            ):
                assert_close(node.op_type, found, expected, tie)
            checked.add(node.op_type)
    assert checked >= {"MatMul", "Conv", "Attention", "Mul", "Add", "Sigmoid", "Cast"}
    return checked


def export(network, path, dtype=torch.float16):
    export_onnx(network, path, "fused", dtype)


@pytest.mark.parametrize("mask", ["post_softmax", "pre_softmax", "bidirectional"])
def test_every_operator_computes_what_the_reference_evaluator_does(mask, tmp_path):
    """In a network with a block for each scheme that TensorRT supports, and one in half precision.

    The reference has no operators with block scales: tests/quant/test_block_scales.py.
    """
    plans = [resolve(shipped_scheme(name), network_for(mask)) for name in SHIPPED_SCHEMES]
    facts = {plan.scheme.name: plan.quantization for plan in plans}
    names = [name for name, each in facts.items() if not each.no_tensorrt and each.emulated != "blocks"]
    assert {"int8", "int8-attention", "fp8", "fp8-attention", "int8-weight-only", "w4a16"} <= set(names)
    network = network_for(mask, depth=len(names) + 1)
    plans = [resolve(shipped_scheme(name), network).tensors for name in names]
    own = [(name, spec) for i, plan in enumerate(plans) for name, spec in plan.items() if f"blocks.{i}." in name]
    quantized = calibrate(network, resolve(Scheme("all", dict(own)), network), [torch.from_numpy(IMAGES)])
    export(quantized, tmp_path / FUSED_ONNX)
    assert {"QuantizeLinear", "DequantizeLinear"} <= check_every_node(tmp_path / FUSED_ONNX)


def test_bfloat16_too(tmp_path):
    export(network_for("post_softmax", depth=1), tmp_path / FUSED_ONNX, torch.bfloat16)
    check_every_node(tmp_path / FUSED_ONNX)


def test_every_way_to_open_it_on_a_cpu_emulates(tmp_path):
    """Whatever the file's name is, and without a runtime: OpenVINO would compute it in float32 or bfloat16."""
    path = tmp_path / "mine.onnx"
    export(network_for("post_softmax", depth=1), path)
    expected = run_emulated(load_graph(path), {"images": IMAGES})[0]
    for engine in (OnnxRuntimeEngine(path), open_engine(path)):
        assert "emulated" in engine.runtime
        np.testing.assert_array_equal(engine.infer(IMAGES), expected)
    export_onnx(network_for("post_softmax", depth=1), path, "fused")
    assert "emulated" not in OnnxRuntimeEngine(path).runtime


@pytest.mark.parametrize("softmax", ["half", "float32"])
def test_a_whole_network(softmax, tmp_path):
    """The error of half precision is as large as the reference evaluator's; without rounding, it is smaller."""
    network, path = network_for("post_softmax"), tmp_path / FUSED_ONNX
    export(network, path)
    images = np.random.default_rng(1).normal(size=(24, 3, 32, 32)).astype(np.float32)
    with torch.no_grad():
        exact = network.double()(torch.from_numpy(images).double()).numpy()
    reference = ReferenceEvaluator(onnx.load(path)).run(None, {"images": images})[0]
    found = run_emulated(load_graph(path), {"images": images}, softmax=softmax)[0]
    unrounded = run_emulated(load_graph(path), {"images": images}, rounding=False)[0]
    errors = [float(np.sqrt(np.mean((each - exact) ** 2))) for each in (reference, found, unrounded)]
    assert errors[1] == pytest.approx(errors[0], rel=0.3) and errors[2] < errors[1]


def test_an_overflow_is_seen(tmp_path):
    """In float32 it is the same network to the bit, and ONNX Runtime computes the file in float32."""
    network, path = load_checkpoint(SHIPPED).model, tmp_path / FUSED_ONNX
    with torch.no_grad():
        network.blocks[1].mlp.fc3.weight.mul_(2.0**14)
        network.blocks[1].mlp.fc2.weight.mul_(2.0**-14)
    export(network, path)
    images = {"images": np.random.default_rng(0).normal(size=(2, 1, 28, 28)).astype(np.float32)}
    assert np.isfinite(cpu_session(path, fused=True).run(None, images)[0]).all()
    with np.errstate(all="ignore"):
        assert not np.isfinite(ReferenceEvaluator(onnx.load(path)).run(None, images)[0]).any()
    for softmax in ("half", "float32"):
        assert not np.isfinite(run_emulated(load_graph(path), images, softmax=softmax)[0]).any()
    assert np.isfinite(run_emulated(load_graph(path), images, rounding=False)[0]).all()
