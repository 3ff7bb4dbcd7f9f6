"""The linter finds each fault in a graph that has it, and nothing in the same graph without it."""

import json
import os
import re

import numpy as np
import onnx
import onnxruntime.quantization as ort_quantization
import pytest
import torch
from onnx import helper, numpy_helper
from onnxruntime.quantization.shape_inference import quant_pre_process
from support import ROOT, assert_one_line_error, run_command

from deploy.findings.finding import SEVERITIES, read_rules
from deploy.findings.lint_graph import CHECKS, lint_graph
from deploy.findings.show import lint_files, to_text
from deploy.rewrites.lower_opset import lower_for
from deploy.versions import find_runtime
from illama import ILLaMA, ModelConfig
from illama.bundle import CPU_ONNX, FUSED_ONNX
from illama.errors import UserError
from illama.graph.reader import load_graph
from illama.graph.writer import save_graph
from quant.export.onnx_export import export_onnx
from quant.quantizers.calibrate import calibrate
from quant.schemes.scheme import resolve, shipped_scheme

TOKENS, WIDTH, HEADS = 8, 32, 2
SIZES = {"image_size": 32, "patch_size": 8, "width": 64, "depth": 2, "heads": 2, "num_classes": 16}


class Graph:
    """A graph for a test, built operator by operator: x (batch, TOKENS, WIDTH) -> y."""

    def __init__(self, dtype=np.float32, opset=21):
        self.dtype, self.opset, self.nodes, self.constants = dtype, opset, [], {}
        self.free = False  # whether the number of tokens is not fixed

    def add(self, kind, *inputs, outputs=1, **attributes):
        """Adds an operator; arrays among the inputs become constants. Returns the name of its result."""
        names = []
        for each in inputs:
            if not isinstance(each, str):
                self.constants[f"c{len(self.constants)}"] = np.asarray(each)
                each = f"c{len(self.constants) - 1}"
            names.append(each)
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, names, [name], name=name, **attributes))
        return name

    def number(self, value):
        return np.array(value, self.dtype)

    def quantize(self, x, scale=0.1, zero=None):
        """Adds Q/DQ."""
        scale, zero = self.number(scale), np.int8(0) if zero is None else zero
        return self.add("DequantizeLinear", self.add("QuantizeLinear", x, scale, zero), scale, zero)

    def linear(self, x, inputs=WIDTH, outputs=WIDTH):
        """Adds a product with 8-bit weights."""
        weight = np.ones((inputs, outputs), np.int8)
        return self.add("MatMul", x, self.add("DequantizeLinear", weight, self.number(0.1), np.int8(0)))

    def bias(self, integers):
        """Adds a bias, stored as ONNX Runtime's quantizer does: in 32-bit integers."""
        values = np.ones(WIDTH, np.int32 if integers else self.dtype)
        return self.add("DequantizeLinear", values, self.number(0.1)) if integers else self.add("Neg", values)

    def heads(self, x):
        shaped = self.add("Reshape", x, np.array([0, TOKENS, HEADS, WIDTH // HEADS]))
        return self.add("Transpose", shaped, perm=[0, 2, 1, 3])

    def attention(self, x, quantized="", scores=False, result=False):
        """Adds an attention in pieces; ``quantized``: which of q, k, v and p (the softmax output) have Q/DQ."""

        def operand(name, value):
            return self.quantize(value) if name in quantized else value

        q, k, v = (self.heads(self.linear(x)) for _ in range(3))
        product = self.add("MatMul", operand("q", q), self.add("Transpose", operand("k", k), perm=[0, 1, 3, 2]))
        product = self.quantize(product) if scores else product
        softmax = self.add("Softmax", self.add("Mul", product, self.number(0.25)), axis=-1)
        out = self.add("MatMul", operand("p", softmax), operand("v", v))
        out = self.add("Transpose", out, perm=[0, 2, 1, 3])
        out = self.add("Reshape", out, np.array([0, TOKENS, WIDTH]))
        return self.quantize(out) if result else out

    def save(self, path, result, **options):
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        size = ["batch", "tokens" if self.free else TOKENS, WIDTH]
        values = [helper.make_tensor_value_info("x", kind, size), helper.make_tensor_value_info(result, kind, None)]
        constants = [numpy_helper.from_array(value, name) for name, value in self.constants.items()]
        graph = helper.make_graph(self.nodes, "test", values[:1], values[1:], constants)
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path, **options)
        return path


def names(path, runtime=None):
    """The names of the rules that find something, but for the note on attention in pieces."""
    return {finding.rule for finding in lint_graph(path, runtime)} - {"attention-in-pieces"}


def build(tmp_path, fault, dtype=np.float32, **settings):
    """A graph with a fault: a function that takes the graph and x, and returns the result."""
    graph = Graph(dtype, **settings)
    return graph.save(tmp_path / "model.onnx", fault(graph, "x"))


def residual(graph, x, quantized):
    branch = graph.linear(graph.quantize(x))
    return graph.add("Add", graph.quantize(x) if quantized else x, branch)


def whole_norm(graph, x, quantized):
    return graph.add("LayerNormalization", graph.quantize(x) if quantized else x, np.ones(WIDTH, graph.dtype))


def norm_in_pieces(graph, x, quantized=False, by_power=True, centered=False):
    x = graph.quantize(x) if quantized else x
    x = graph.add("Sub", x, graph.add("ReduceMean", x, np.array([-1]))) if centered else x
    square = graph.add("Pow", x, graph.number(2)) if by_power else graph.add("Mul", x, x)
    power = graph.add("Add", graph.add("ReduceMean", square, np.array([-1])), graph.number(1e-3))
    return graph.add("Div", x, graph.add("Sqrt", power))


def float_weights(graph, x, quantized):
    if not quantized:
        return graph.linear(x)
    return graph.add("MatMul", x, graph.quantize(np.ones((WIDTH, WIDTH), graph.dtype)))


def several_products(graph, x, width):
    return graph.linear(graph.linear(x, WIDTH, width), width, 10)


FAULTS = {
    "quantized-residual": lambda graph, x, fault: residual(graph, x, fault),
    "quantized-normalization": lambda graph, x, fault: whole_norm(graph, x, fault),
    "float-weights-quantized": lambda graph, x, fault: float_weights(graph, x, fault),
    "attention-partly-quantized": lambda graph, x, fault: graph.attention(x, "qk" if fault else "qkvp", result=True),
    "attention-scores-quantized": lambda graph, x, fault: graph.attention(x, scores=fault),
    "format-not-supported": lambda graph, x, fault: graph.add("Add", graph.linear(x), graph.bias(fault)),
    "bad-scale": lambda graph, x, fault: graph.linear(graph.quantize(x, 0.0 if fault else 0.1)),
    "constant-overflow": lambda graph, x, fault: graph.add("Mul", x, graph.number(np.inf if fault else 2)),
    "data-dependent-shape": lambda graph, x, fault: graph.add(
        "Cast", graph.add("NonZero" if fault else "Neg", x), to=1
    ),
    "private-domain": lambda graph, x, fault: graph.add("Gelu", x, domain="com.microsoft" if fault else ""),
}


@pytest.mark.parametrize("fault", [True, False])
@pytest.mark.parametrize("rule", FAULTS)
def test_a_rule_finds_its_fault_and_nothing_else(rule, fault, tmp_path):
    path = build(tmp_path, lambda graph, x: FAULTS[rule](graph, x, fault))
    runtime = find_runtime("tensorrt", "10.16") if rule == "format-not-supported" else None
    assert names(path, runtime) == ({rule} if fault else set())


def test_normalizations_in_pieces(tmp_path):
    for by_power in (True, False):
        for dtype, quantized in ((np.float32, False), (np.float32, True), (np.float16, False)):
            path = build(tmp_path, lambda graph, x: norm_in_pieces(graph, x, quantized, by_power), dtype)  # noqa: B023
            expected = {"quantized-normalization"} if quantized else set()
            assert names(path) == expected | ({"half-precision-squares"} if dtype == np.float16 else set())


def test_a_layer_norm_in_pieces(tmp_path):
    for quantized in (True, False):
        path = build(tmp_path, lambda graph, x: norm_in_pieces(graph, x, quantized, centered=True))  # noqa: B023
        assert names(path) == ({"quantized-normalization"} if quantized else set())


def test_a_residual_whose_shape_is_known_in_part(tmp_path):
    def reshaped(graph, x):
        branch = graph.add("Reshape", graph.linear(graph.quantize(x)), np.array([-1, TOKENS, WIDTH]))
        return graph.add("Add", graph.quantize(x), branch)

    assert names(build(tmp_path, reshaped)) == {"quantized-residual"}


def test_operators_of_a_runtime_s_own_domain(tmp_path):
    for domain, own, other in (("trt", "tensorrt", "onnxruntime"), ("com.microsoft", "onnxruntime", "tensorrt")):
        path = build(tmp_path, lambda graph, x: graph.add("Own", x, domain=domain))  # noqa: B023
        newest = {"tensorrt": "10.16", "onnxruntime": "1.32"}
        assert names(path, find_runtime(own, newest[own])) == set()
        assert names(path, find_runtime(other, newest[other])) == {"private-domain"}


def test_a_bundle_is_checked_for_what_it_is_for(tmp_path):
    path = build(tmp_path, lambda graph, x: graph.add("Neg", x), opset=21)
    path.rename(tmp_path / FUSED_ONNX)
    (tmp_path / CPU_ONNX).write_bytes((tmp_path / FUSED_ONNX).read_bytes())
    assert list(lint_files([tmp_path], "tensorrt-10.7")) == [tmp_path / FUSED_ONNX]
    assert len(lint_files([tmp_path], "jetpack-6")) == len(lint_files([tmp_path])) == 2


def test_a_file_that_has_a_bundle_s_name_is_checked_for_tensorrt(tmp_path):
    path = build(tmp_path, lambda graph, x: graph.quantize(x, zero=np.uint8(0)))  # which ONNX Runtime takes
    assert path.name == CPU_ONNX
    assert {each.rule for each in lint_files([path], "jetpack-6")[path]} == {"version-too-new", "format-not-supported"}
    (tmp_path / "manifest.json").touch()
    assert lint_files([path], "jetpack-6")[path] == []


def test_graphs_that_would_hang_or_move_the_cursor(tmp_path):
    def cycle(graph, x):
        first = graph.add("Add", x, "Add_1")
        return graph.add("Add", first, x)

    assert_one_line_error(run_command("deploy/lint.py", build(tmp_path, cycle), timeout=60), "model.onnx")
    os.mkfifo(tmp_path / "pipe.onnx")
    assert_one_line_error(run_command("deploy/lint.py", tmp_path / "pipe.onnx", timeout=60), "pipe.onnx")
    path = build(tmp_path, lambda graph, x: residual(graph, x, True))
    model = onnx.load(path)
    model.graph.node[-1].name = "a\x1b[2J\nfake.onnx: nothing found"
    onnx.save(model, path)
    text = to_text(lint_files([path]))
    assert "\x1b" not in text and "\nfake" not in text and "fake.onnx" in text


def test_functions_that_grow_without_end_are_refused(tmp_path):
    """Each of 40 functions calls the next one twice."""
    path = build(tmp_path, lambda graph, x: graph.add("F0", x, domain="local"))
    model = onnx.load(path)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    model.opset_import.append(imports[1])
    for index in range(40):
        kind, domain = (f"F{index + 1}", "local") if index < 39 else ("Neg", "")
        nodes = [helper.make_node(kind, [a], [b], domain=domain) for a, b in (("a", "b"), ("b", "c"))]
        model.functions.append(helper.make_function("local", f"F{index}", ["a"], ["c"], nodes, imports))
    onnx.save(model, path)
    assert_one_line_error(run_command("deploy/lint.py", path, timeout=60), "functions")


@pytest.mark.parametrize("size", [-1, 0])
def test_sizes_of_older_exporters_are_dynamic(size, tmp_path):
    path = build(tmp_path, lambda graph, x: graph.add("Neg", x))
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = size
    onnx.save(model, path)
    assert names(path) == {"dynamic-shape"}


def test_both_names_of_onnx_s_domain(tmp_path):
    path = build(tmp_path, lambda graph, x: graph.add("Neg", x))
    model = onnx.load(path)
    model.opset_import[0].domain = "ai.onnx"
    onnx.save(model, path)
    assert names(path, find_runtime("tensorrt", "8.6")) == {"version-too-new"}


def test_a_mask_of_minus_infinity_is_no_overflow(tmp_path):
    mask = np.where(np.tri(TOKENS, WIDTH) > 0, 0, -np.inf).astype(np.float16)
    assert names(build(tmp_path, lambda graph, x: graph.add("Add", x, mask), np.float16)) == set()
    assert names(build(tmp_path, lambda graph, x: graph.add("Mul", x, mask), np.float16)) == {"constant-overflow"}
    square = np.full((TOKENS, WIDTH), -np.inf, np.float16)
    triangle = lambda graph, x: graph.add("Add", x, graph.add("Trilu", square, np.int64(1)))  # noqa: E731
    assert names(build(tmp_path, triangle, np.float16)) == set()


def test_attention_is_quantized_as_a_whole(tmp_path):
    """An 8-bit kernel needs Q/DQ at q, k, v, the softmax output and the result."""
    for quantized, result, expected in (
        ("", False, set()),
        ("qkvp", True, set()),
        ("qkvp", False, 1),
        ("qkv", True, 1),
    ):
        found = names(build(tmp_path, lambda graph, x: graph.attention(x, quantized, result=result)))  # noqa: B023
        assert found == (expected if isinstance(expected, set) else {"attention-partly-quantized"})


def test_products_of_odd_sizes(tmp_path):
    """The last product of a network has as many outputs as there are classes, which is only noted."""
    for width, expected in ((32, ["note"]), (20, ["warning", "note"])):
        path = build(tmp_path, lambda graph, x: several_products(graph, x, width))  # noqa: B023
        found = [each.severity for each in lint_graph(path) if each.rule == "product-shape"]
        assert found == expected


def test_dynamic_sizes(tmp_path):
    graph = Graph()
    graph.free = True
    path = graph.save(tmp_path / "model.onnx", graph.add("Neg", "x"))
    assert names(path) == {"dynamic-shape"}


@pytest.mark.parametrize(
    ("runtime", "settings", "fault", "expected"),
    [
        ("tensorrt-8.6", {"opset": 21}, lambda graph, x: graph.add("Neg", x), {"version-too-new"}),
        ("tensorrt-8.6", {"opset": 17}, lambda graph, x: graph.add("Neg", x), set()),
        ("onnxruntime-1.16", {"opset": 17}, lambda graph, x: graph.add("Neg", x), {"version-too-new"}),  # IR version 10
        ("tensorrt-8.5", {"opset": 17}, lambda graph, x: whole_norm(graph, x, False), {"operator-not-supported"}),
        ("tensorrt-8.6", {"opset": 17}, lambda graph, x: whole_norm(graph, x, False), set()),
        ("tensorrt-10.16", {}, lambda graph, x: graph.quantize(x, zero=np.uint8(0)), {"format-not-supported"}),
        ("onnxruntime-1.23", {}, lambda graph, x: graph.quantize(x, zero=np.uint8(7)), set()),
        ("tensorrt-10.16", {}, lambda graph, x: graph.quantize(x, zero=np.int8(3)), {"zero-point"}),
        ("tensorrt-10.16", {}, lambda graph, x: float_weights(graph, x, True), {"float-weights-quantized"}),
        ("tensorrt-8.6", {"opset": 17}, lambda graph, x: float_weights(graph, x, True), set()),
    ],
)
def test_what_a_runtime_loads(runtime, settings, fault, expected, tmp_path):
    name, _, version = runtime.partition("-")
    assert names(build(tmp_path, fault, **settings), find_runtime(name, version)) == expected


def test_half_precision_scales_are_wrong_in_tensorrt_8(tmp_path):
    path = build(tmp_path, lambda graph, x: graph.quantize(x), np.float16)
    assert names(path, find_runtime("tensorrt", "8.6")) == {"version-too-new", "half-precision-scale"}
    assert names(path, find_runtime("tensorrt", "10.7")) == set()


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8-attention", "w4a16"])
def test_nothing_is_found_in_our_own_graphs(scheme, tmp_path):
    torch.manual_seed(0)
    model = ILLaMA(ModelConfig(**SIZES)).eval()
    quantized = calibrate(model, resolve(shipped_scheme(scheme), model), [torch.randn(4, 3, 32, 32)])
    export_onnx(quantized, tmp_path / CPU_ONNX, "plain")
    export_onnx(quantized, tmp_path / FUSED_ONNX, "fused", torch.float16)
    assert list(lint_files([tmp_path]).values()) == [[], []]
    if scheme == "int8":
        for target, runtime in (("jetpack-6", ("tensorrt", "10.3")), ("jetpack-5", ("tensorrt", "8.5"))):
            before = lint_files([tmp_path / FUSED_ONNX], target)[tmp_path / FUSED_ONNX]
            assert any(each.severity == "error" for each in before)
            graph = load_graph(tmp_path / FUSED_ONNX)
            lower_for(graph, find_runtime(*runtime))
            (tmp_path / target).mkdir()
            save_graph(graph, tmp_path / target / FUSED_ONNX)
            assert list(lint_files([tmp_path / target], target).values()) == [[]]


def test_onnx_runtime_s_quantizer_quantizes_the_residual_stream(tmp_path):
    """What quantize_static makes of a network with its defaults, which were reported to ruin ViTs."""
    torch.manual_seed(0)
    export_onnx(ILLaMA(ModelConfig(**SIZES, norm="layer")).eval(), tmp_path / "float.onnx", "plain")
    graph = load_graph(tmp_path / "float.onnx")
    lower_for(graph, find_runtime("onnxruntime", "1.16"))
    save_graph(graph, tmp_path / "older.onnx")
    quant_pre_process(str(tmp_path / "older.onnx"), str(tmp_path / "prepared.onnx"))

    class Images(ort_quantization.CalibrationDataReader):
        def __init__(self):
            self.left = [{"images": np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)}]

        def get_next(self):
            return self.left.pop() if self.left else None

    ort_quantization.quantize_static(str(tmp_path / "prepared.onnx"), str(tmp_path / "int8.onnx"), Images())
    found = names(tmp_path / "int8.onnx")
    assert {"quantized-residual", "quantized-normalization", "attention-scores-quantized"} <= found


def test_the_command_as_text_and_as_json(tmp_path):
    path = build(tmp_path, lambda graph, x: residual(graph, x, True))
    result = run_command("deploy/lint.py", path)
    assert result.returncode == 0 and "quantized-residual" in result.stdout  # a warning
    assert run_command("deploy/lint.py", path, "--fail-on", "warning").returncode == 1
    result = run_command("deploy/lint.py", path, "--for", "tensorrt-8.6", "--format", "json")
    assert result.returncode == 1
    [file] = json.loads(result.stdout)["files"]
    assert file["file"] == str(path)
    assert {"rule", "severity", "node", "detail", "why", "fix", "source"} == set(file["findings"][0])
    assert {each["severity"] for each in file["findings"]} <= set(SEVERITIES)


def test_a_paragraph_names_a_few_operators(tmp_path):
    def many(graph, x):
        for _ in range(9):
            x = residual(graph, x, True)
        return x

    path = build(tmp_path, many)
    text = to_text(lint_files([path]))
    assert "9 warnings" in text and text.count("Add_") == 4 and "5 more" in text


def test_external_data(tmp_path):
    path = build(tmp_path, lambda graph, x: graph.linear(x))
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert names(path) == set()
    whole = (tmp_path / "weights.bin").read_bytes()
    (tmp_path / "weights.bin").write_bytes(whole[: len(whole) // 2])
    assert_one_line_error(run_command("deploy/lint.py", path), str(path))
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(UserError, match=r"weights\.bin"):
        lint_graph(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["no file"]),
        (["missing.onnx"], ["missing.onnx"]),
        (["README.md"], ["README.md", "ONNX"]),
        (["docs"], ["docs", "bundle"]),
        (["README.md", "--for", "jetpack-9"], ["jetpack-9"]),
    ],
)
def test_bad_input_ends_in_one_line(arguments, words):
    assert_one_line_error(run_command("deploy/lint.py", *arguments), *words)


def test_every_rule_is_described_and_in_the_guide():
    rules, code = read_rules(), "".join(path.read_text() for path in (ROOT / "deploy" / "findings").glob("*.py"))
    guide = (ROOT / "docs" / "lint.md").read_text()
    for name, rule in rules.items():
        assert f'"{name}"' in code and f"`{name}`" in guide
        assert rule.severity in SEVERITIES and all(len(text) > 10 for text in (rule.why, rule.fix, rule.source))
    assert set(re.findall(r'found\(\s*"([^"]+)"', code)) == set(rules)
    assert len(CHECKS) == len(set(CHECKS))
