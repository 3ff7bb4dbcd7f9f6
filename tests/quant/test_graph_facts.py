"""What an exported file says about its layers: the precision of each product, and where its nodes come from."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from support import SMALL

from deploy.trt.fusion import quantize_softmax_outputs
from eval.cost_model.onnx_costs import product_costs
from illama import ILLaMA
from illama.bundle import SOFTMAX_OUTPUT
from illama.errors import UserError
from illama.graph import layer_times
from illama.graph.layer_times import layers_of_nodes, time_graphs
from illama.graph.reader import LAYER, load_graph, precisions
from illama.graph.session import cpu_session
from quant.export.onnx_export import export_onnx
from quant.export.verify import trace_onnx
from quant.mixed_precision.layer_effects import layers_of
from quant.quantizers.calibrate import calibrate
from quant.schemes.scheme import Scheme, resolve, shipped_scheme, tensor_names
from quant.schemes.shipped import SHIPPED_SCHEMES

ONNX_SCHEMES = [name for name in SHIPPED_SCHEMES if shipped_scheme(name).backend == "onnx"]
INT, FP8 = ("int8", "int6", "int4"), ("fp8",)
FOR_CPUS = {"nvfp4": "int8", "mxfp8": "fp8"}  # how graphs for CPUs store weights with block scales


SMALLEST = replace(SMALL, heads=1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A network, its plan and its file: a block for each scheme, and one that is not quantized."""
    torch.manual_seed(0)
    network = ILLaMA(replace(SMALLEST, depth=len(ONNX_SCHEMES) + 1)).eval()
    plans = [resolve(shipped_scheme(name), network).tensors for name in ONNX_SCHEMES]
    own = [(name, spec) for i, plan in enumerate(plans) for name, spec in plan.items() if f"blocks.{i}." in name]
    path = tmp_path_factory.mktemp("schemes") / "model.onnx"
    export_onnx(
        calibrate(network, resolve(Scheme("all", dict(own)), network), [torch.randn(2, 3, 32, 32)]), path, "plain"
    )
    return network, dict(own), path


def expected_precision(plan, layer):
    """From the scheme, not from the file: what the two operands of a layer's product are quantized to."""
    parts = {"qk": "qk", "pv": "pv"}.get(layer.rpartition(".")[2])
    names = [f"{layer[:-2]}{part}" for part in parts] if parts else [f"{layer}.input", f"{layer}.weight"]
    formats = [plan[name].dtype.name.removeprefix("u") if name in plan else "" for name in names]
    kinds = ["int8" if each in INT else each for each in formats]
    kinds = ["" if each in FOR_CPUS else each for each in kinds]  # standard operators compute them in float32
    precision = kinds[0] if kinds[0] and kinds[0] == kinds[1] else "fp32"
    stored = {"int6": "int8", **FOR_CPUS}.get(formats[1], formats[1])
    return precision + (f", {stored} weights" if not parts and stored not in ("", precision) else "")


def test_there_is_one_answer_to_the_precision_of_a_product(exported):
    network, plan, path = exported
    found, costs = precisions(load_graph(path)), product_costs(path)
    assert found == {layer: expected_precision(plan, layer) for layer in layers_of(tensor_names(network))}
    assert {"fp32", "int8", "fp8", "int8, int4 weights", "fp32, int4 weights"} <= set(found.values())
    assert all(each.precision == found[each.layer].partition(",")[0] for each in costs) and len(costs) > len(found)


IMAGES = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)


def test_nothing_depends_on_the_names_of_nodes(exported, tmp_path, monkeypatch):
    network, _, path = exported
    model, other, layers = onnx.load(path), tmp_path / "renamed.onnx", layers_of(tensor_names(network))
    for number, node in enumerate(model.graph.node):
        node.name = f"n{number * 7919 % 10007}"
    onnx.save(model, other)
    assert precisions(load_graph(path)) == precisions(load_graph(other)) and product_costs(path) == product_costs(other)
    counts = [Counter(layers_of_nodes(each, layers).values()) for each in (path, other)]
    assert counts[0] == counts[1] and set(counts[0]) == {*layers, None}
    traces = [trace_onnx(each, IMAGES, network) for each in (path, other)]
    assert traces[0].quantized.keys() == traces[1].quantized.keys() and len(traces[0].quantized) > 30
    for name, arrays in traces[0].quantized.items():
        assert all(torch.equal(*pair) for pair in zip(arrays, traces[1].quantized[name], strict=True))
    # Times depend on the machine, so each event of ONNX Runtime's profile counts as one millisecond.
    decode = json.JSONDecoder().decode
    monkeypatch.setattr(layer_times.json, "loads", lambda text: [{**event, "dur": 1e3} for event in decode(text)])
    times = time_graphs({"a": path, "b": other}, IMAGES, layers, 1, rounds=1, calls=1)
    assert times["a"].layers == times["b"].layers
    assert set(layers) - set(times["a"].layers) <= {"patch_embed.proj"}  # a Conv that is not quantized is renamed


def test_the_layers_are_metadata_and_nothing_else(exported):
    model = onnx.load(exported[2])
    keys = Counter(entry.key for node in model.graph.node for entry in node.metadata_props)
    assert set(keys) == {LAYER} and keys[LAYER] > 0.9 * len(model.graph.node)
    before = cpu_session(exported[2], 1).run(None, {"images": IMAGES})[0]
    for node in model.graph.node:
        del node.metadata_props[:]
    after = cpu_session(model.SerializeToString(), 1).run(None, {"images": IMAGES})[0]
    np.testing.assert_array_equal(before, after)


def test_the_softmax_output_is_quantized_by_the_attentions_layer(tmp_path):
    torch.manual_seed(0)
    network = ILLaMA(replace(SMALLEST, depth=1)).eval()
    quantized = calibrate(network, resolve(shipped_scheme("fp8-attention"), network), [torch.randn(2, 3, 32, 32)])
    path = tmp_path / "model.onnx"
    export_onnx(quantized, path, "fused", torch.float16)
    model = load_graph(path)
    attention = next(node for node in model.graph if node.op_type == "Attention")
    attention.name = "any"
    quantize_softmax_outputs(model)
    assert attention.op_type == "TRT_QuantizedAttention" and len(attention.inputs) == 5
    assert precisions(load_graph(path))["blocks.0.attn.core"] == "fp8"
    model = load_graph(path)
    model.metadata_props[SOFTMAX_OUTPUT] = model.metadata_props[SOFTMAX_OUTPUT].replace("blocks.0", "blocks.9")
    with pytest.raises(UserError, match=r"blocks\.9"):
        quantize_softmax_outputs(model)
