"""Costs of ONNX graphs against torch's counter and by hand; lower bounds by hand; the CPU's model against its clock."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from support import SMALL, assert_one_line_error, write_bundle

from eval.cost_model.cpu_peaks import measure_cpu
from eval.cost_model.devices import DEVICES, Device, find_device
from eval.cost_model.macs import count_macs
from eval.cost_model.onnx_costs import ProductCost, product_costs
from eval.cost_model.roofline_model import (
    LayerBound,
    Prediction,
    device_table,
    find_file,
    layer_table,
    lower_bounds,
    measure_layers,
    measured_table,
)
from illama import ILLaMA
from illama.errors import UserError
from illama.graph.layer_times import GraphTimes
from illama.manifest import Manifest
from quant.export.onnx_export import export_onnx


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    model = ILLaMA(SMALL).eval()
    export_onnx(model, folder / "model.onnx", "plain")
    export_onnx(model, folder / "model.fused.onnx", "fused", torch.float16)
    return folder


@pytest.mark.parametrize(
    ("file", "form", "precision"), [("model.onnx", "plain", "fp32"), ("model.fused.onnx", "fused", "fp16")]
)
def test_operations_of_an_exported_graph_are_those_of_its_config(exported, file, form, precision):
    costs = product_costs(exported / file, batch=3)
    assert sum(cost.operations for cost in costs) == 6 * count_macs(SMALL, form, readout_only=True).total
    assert {cost.precision for cost in costs} == {precision}
    layers = {cost.layer for cost in costs}
    assert {"patch_embed.proj", "blocks.0.attn.qkv", "blocks.1.mlp.fc2", "head"} <= layers
    weights = (
        sum(
            p.numel()
            for name, p in ILLaMA(SMALL).named_parameters()
            if p.ndim > 1 and "embed" not in name and "token" not in name
        )
        + SMALL.width * SMALL.in_channels * 64
    )
    biases = SMALL.width + SMALL.num_classes  # of the convolution and the head; others are added by nodes of their own
    width = {"fp32": 4, "fp16": 2}[precision]
    products = [cost for cost in costs if ".core" not in cost.layer]
    assert sum(cost.weight_bytes for cost in products) == pytest.approx((weights + biases) * width, rel=0.01)


def _graph(path, weight, activation, weight_type, activation_type):
    """x (2, 8, 64) by w (64, 32), dequantized on the sides that are asked for, behind a Transpose of w."""
    nodes, constants = [], []
    stored = weight_type if weight else TensorProto.FLOAT
    constants.append(helper.make_tensor("w", stored, [32, 64], np.ones(32 * 64)))
    constants += [numpy_helper.from_array(np.ones(1, np.float32)[0], "s")]
    if weight:
        constants.append(numpy_helper.from_array(np.ones(32, np.float32), "ws"))
        nodes.append(helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], axis=0))
    nodes.append(helper.make_node("Transpose", ["wd" if weight else "w"], ["wt"], perm=[1, 0], name="fc/Transpose"))
    if activation:
        constants.append(helper.make_tensor("z", activation_type, [], [0]))
        nodes += [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], name="fc.input/QuantizeLinear"),
            helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        ]
    nodes.append(helper.make_node("MatMul", ["xd" if activation else "x", "wt"], ["y"], name="fc/MatMul"))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8, 32])],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


INT8, UINT8, INT4, FP8 = TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.FLOAT8E4M3FN


@pytest.mark.parametrize(
    ("weight", "activation", "precision", "weight_bytes", "activation_bytes"),
    [
        (None, None, "fp32", 4 * 2048, 4 * (1024 + 512)),
        (INT8, None, "fp32", 2048 + 4 * 32, 4 * (1024 + 512)),
        (INT8, UINT8, "int8", 2048 + 4 * 32, 1024 + 4 * 512),
        (INT4, None, "fp32", 1024 + 4 * 32, 4 * (1024 + 512)),
        (INT4, INT8, "int8", 1024 + 4 * 32, 1024 + 4 * 512),
        (FP8, FP8, "fp8", 2048 + 4 * 32, 1024 + 4 * 512),
        (FP8, INT8, "fp32", 2048 + 4 * 32, 1024 + 4 * 512),
        (None, INT8, "fp32", 4 * 2048, 1024 + 4 * 512),
    ],
)
def test_a_product_by_what_its_operands_are_stored_as(
    weight, activation, precision, weight_bytes, activation_bytes, tmp_path
):
    path = _graph(tmp_path / "g.onnx", weight is not None, activation is not None, weight, activation)
    assert product_costs(path, batch=2) == [
        ProductCost("fc/MatMul", "MatMul", precision, 2 * 2 * 8 * 64 * 32, weight_bytes, activation_bytes)
    ]


def test_a_lower_bound_is_the_longer_of_computing_and_moving():
    device = Device("toy", 1, {"fp32": 0.001, "int8": 0.004}, "")  # 1 and 4 operations a nanosecond, 1 byte
    costs = [
        ProductCost("a", "MatMul", "fp32", 5000, 1000, 0),
        ProductCost("b", "MatMul", "int8", 4000, 900, 1100),
        ProductCost("a", "MatMul", "int8", 8000, 500, 500),
    ]
    bounds = {bound.layer: bound for bound in lower_bounds(costs, device)}
    assert (bounds["a"].milliseconds, bounds["a"].limited_by) == (pytest.approx(7e-3), "compute")
    assert (bounds["b"].milliseconds, bounds["b"].limited_by) == (pytest.approx(2e-3), "memory")
    assert bounds["a"].precision == "fp32+int8" and bounds["a"].operations == 13000
    with pytest.raises(UserError, match=r"toy.*fp8"):
        lower_bounds([ProductCost("a", "MatMul", "fp8", 1, 1, 1)], device)


def test_the_table_of_devices_is_dense_and_in_proportion():
    """8 bits are twice as fast as 16 on every device, and a larger device of a kind is faster."""
    for device in DEVICES.values():
        assert device.peaks["int8"] == pytest.approx(2 * device.peaks["fp16"], rel=0.01)
        assert device.peaks.get("fp8", device.peaks["int8"]) == device.peaks["int8"]
        assert device.source and device.bandwidth > 0
    order = ("orin-nano", "orin-nano-super", "agx-orin", "l4", "a100", "h100")
    assert sorted(order, key=lambda name: DEVICES[name].peaks["int8"]) == list(order)
    with pytest.raises(UserError, match="orin-nano"):
        find_device("orin")


def test_this_machine_is_measured_by_the_same_names(exported):
    device = measure_cpu(rounds=2)
    assert device.bandwidth > 1 and device.peaks["fp32"] > 0.005
    bounds = lower_bounds(product_costs(exported / "model.onnx", 8), device)
    measured = measure_layers(exported / "model.onnx", bounds, 8)
    # ONNX Runtime may give the convolution another layout, and then another name.
    assert {bound.layer for bound in bounds} - set(measured.layers) <= {"patch_embed.proj"}
    assert measured.call > 0 and all(milliseconds > 0 for milliseconds in measured.layers.values())


def test_tables_show_what_lacks_a_precision_and_by_how_much_a_prediction_misses():
    bound = LayerBound("fc", "fp8", 10, 20.0, 0.5, "memory")
    times = GraphTimes(4.0)
    times.add("fc", 2.0)
    here = Prediction("int8", "cpu", [bound], times)
    there = [
        Prediction("fp16", "thor", [bound, bound]),
        Prediction("fp8", "thor", [bound]),
        Prediction("fp16", "agx-orin", [bound]),
    ]
    assert device_table(there, ["fp16", "fp8"], ["thor", "agx-orin"]).splitlines()[2:] == [
        "| thor | 1.000 | 0.500 |",
        "| agx-orin | 0.500 | - |",
    ]
    assert measured_table([here]).splitlines()[-1] == "| int8 | 0.50 | 2.00 | -75% | 4.00 | -88% |"
    assert layer_table(here).splitlines()[-1].endswith("| memory | 0.5000 | 2.0000 | -75% |")
    assert json.loads(json.dumps(here.to_json()))["measured"]["layers"] == {"fc": 2.0}


def test_the_command_and_its_mistakes(exported, run_here, tmp_path):
    bundle = write_bundle(tmp_path / "bundle", SMALL)
    assert_one_line_error(run_here("eval/roofline.py", bundle), "model.fused.onnx", "model.onnx", "quant/ptq.py")
    (bundle / "model.onnx").write_bytes((exported / "model.onnx").read_bytes())
    assert find_file(bundle, on_cpu=False).name == "model.onnx"
    (bundle / "model.fused.onnx").write_bytes((exported / "model.fused.onnx").read_bytes())
    assert [find_file(bundle, on_cpu).name for on_cpu in (True, False)] == ["model.onnx", "model.fused.onnx"]
    out = ("--out", tmp_path / "out")
    result = run_here("eval/roofline.py", bundle, "--device", "agx-orin", *out)
    assert result.returncode == 0 and "blocks.1.mlp.fc2" in result.stdout
    both = run_here("eval/roofline.py", bundle, "--device", "agx-orin", "thor", *out)
    assert both.returncode == 0 and "blocks" not in both.stdout
    found = json.loads((tmp_path / "out" / "roofline.json").read_text())["predictions"]
    assert [each["device"] for each in found] == ["agx-orin", "thor"]
    assert all(f"| {each['device']} | {each['milliseconds']:.3f} |" in both.stdout for each in found)
    assert_one_line_error(run_here("eval/roofline.py", bundle, "--device", "xavier"), "xavier", "orin-nx")
    assert_one_line_error(run_here("eval/roofline.py", tmp_path), str(tmp_path))
    manifest = Manifest.read(bundle)
    replace(manifest, frame=(480, 640, 3)).write(bundle)
    assert_one_line_error(run_here("eval/roofline.py", bundle, "--device", "cpu"), str(bundle), "camera")
    assert run_here("eval/roofline.py", bundle, *out).returncode == 0
    (bundle / "model.fused.onnx").write_bytes(b"no graph")
    assert_one_line_error(run_here("eval/roofline.py", bundle), "model.fused.onnx")
