"""8-bit products are exact on every CPU, with and without VNNI."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy.runtimes.onnxruntime_engine import OnnxRuntimeEngine
from deploy.runtimes.openvino_engine import OpenVinoEngine
from illama.hardware import products_saturate

INPUTS, OUTPUTS = 256, 16
HERE = products_saturate()


@pytest.fixture(scope="module")
def worst_case(tmp_path_factory):
    """A product of inputs that are all 255 and weights of 127, with alternating signs in some columns."""
    weights = np.full((INPUTS, OUTPUTS), 127, np.int8)
    weights[:, 1] = -127
    weights[::2, 2] = -127
    arrays = {
        "scale": np.float32(1 / 255),
        "zero": np.uint8(0),
        "w": weights,
        "w_scale": np.linspace(0.001, 0.002, OUTPUTS, dtype=np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale"], ["w_float"], axis=1),
        helper.make_node("MatMul", ["x", "w_float"], ["logits"]),
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
        for name, size in (("images", INPUTS), ("logits", OUTPUTS))
    ]
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()]
    graph = helper.make_graph(nodes, "worst", values[:1], values[1:], constants)
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    images = np.ones((3, INPUTS), np.float32)
    expected = images.astype(np.float64) @ (weights.astype(np.float64) * arrays["w_scale"].astype(np.float64))
    return path, images, expected


@pytest.mark.parametrize("saturates", sorted({HERE, True}))  # this CPU, and as if it had no VNNI
@pytest.mark.parametrize("engine", [OnnxRuntimeEngine, OpenVinoEngine])
def test_products_do_not_saturate(engine, saturates, worst_case, monkeypatch):
    for module in ("illama.graph.session", "deploy.runtimes.openvino_engine"):
        monkeypatch.setattr(f"{module}.products_saturate", lambda: saturates)
    path, images, expected = worst_case
    np.testing.assert_allclose(engine(path).infer(images), expected, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "avx2 avx512f", True),
        ("x86_64", "avx2 avx_vnni", False),
        ("x86_64", "avx512f avx512_vnni", False),
        ("aarch64", "asimd", False),
    ],
)
def test_the_cpu_says_whether_products_saturate(machine, flags, expected, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"flags : fpu {flags}\n")
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert products_saturate(tmp_path / "cpuinfo") == expected
    assert not products_saturate(tmp_path / "no such file")
