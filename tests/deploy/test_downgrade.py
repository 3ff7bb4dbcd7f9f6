"""Graphs in older opsets compute the same, load in older runtimes, and are refused where they cannot be written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from step_difference import local_differences
from support import ROOT, assert_one_line_error, run_command

from deploy.rewrites.camera_bundle import write_camera_bundle
from deploy.rewrites.lower_opset import OPSETS, lower_for, lower_opset
from deploy.rewrites.older_bundle import write_older_bundle
from deploy.runtimes.open_engine import open_engine
from deploy.trt.builder import build_engine, prepare_graph
from deploy.trt.engine_options import EngineOptions
from deploy.trt.library import Library, find_library
from deploy.versions import find_runtime, find_target, opset_target, read_versions
from illama import ILLaMA, ModelConfig
from illama.bundle import CPU_ONNX, ENGINE_SCRIPT, FUSED_ONNX, SHIPPED, data_file
from illama.checkpoints.load import load_checkpoint
from illama.errors import UserError
from illama.graph.emulate_half import emulate_half
from illama.graph.reader import add_constant, array, is_constant, load_graph, producer
from illama.graph.session import cpu_session, session_of
from illama.graph.tensorrt_operators import DOMAIN, register_operators
from illama.graph.writer import save_graph
from illama.options import SourceOptions
from quant.export.onnx_export import export_onnx
from quant.export.verify import first_mismatch
from quant.export.write_bundle import Origin, plan_quantization, quantize, write_quantized
from quant.inputs import open_inputs
from quant.quantizers.calibrate import calibrate
from quant.schemes.scheme import resolve, shipped_scheme

IMAGES = np.random.default_rng(0).normal(size=(4, 1, 28, 28)).astype(np.float32)
OLDER_RUNTIME = Path(sys.prefix) / "onnxruntime-1.20"  # installed by `make setup`
SIZES = {"image_size": 28, "patch_size": 7, "in_channels": 1, "width": 64, "depth": 2, "heads": 2, "num_classes": 5}
SINCE = {"fp8": 19, "w4a16": 21}  # scheme -> the first opset with its number format
library = find_library()


def run(session):
    return session.run(None, {"images": IMAGES})[0]


def error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def in_float32(path):
    """The results of a graph without half precision, so that only a rewrite can change them."""
    model = load_graph(path)
    emulate_half(model, rounding=False)
    return run(session_of(model, 1))


@pytest.fixture(scope="module", params=["int8-attention", "fp8", "w4a16"])
def graphs(request, tmp_path_factory):
    """A small network by a scheme: the scheme's name, the folder of its two graphs, and the network."""
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp(request.param), ILLaMA(ModelConfig(**SIZES)).eval()
    plan = resolve(shipped_scheme(request.param), model)
    quantized = calibrate(model, plan, [torch.from_numpy(IMAGES)])
    export_onnx(quantized, folder / CPU_ONNX, "plain")
    export_onnx(quantized, folder / FUSED_ONNX, "fused", torch.float16)
    return request.param, folder, quantized


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The shipped network in int8, with golden answers."""
    inputs = open_inputs(SourceOptions(calibration_images=16))
    plan = plan_quantization(inputs.model, shipped_scheme("int8"))
    network = quantize(inputs.model, plan, inputs.calibration)
    folder = tmp_path_factory.mktemp("bundle") / "int8"
    return write_quantized(folder, network, plan, Origin.of(inputs), inputs.calibration)


@pytest.mark.parametrize("opset", [17, 19, 21])
@pytest.mark.parametrize("name", [CPU_ONNX, FUSED_ONNX])
def test_an_older_opset_computes_the_same(graphs, name, opset, tmp_path):
    scheme, folder, quantized = graphs
    model = load_graph(folder / name)
    if opset < SINCE.get(scheme, 17):
        with pytest.raises(UserError, match=f"opset {opset}"):
            lower_opset(model, opset)
        return
    lower_opset(model, opset)
    save_graph(model, tmp_path / name)  # checks it, with the types and shapes of that opset
    written = onnx.load(tmp_path / name)
    assert written.opset_import[0].version == opset
    assert written.ir_version == {17: 8, 19: 9, 21: 10}[opset]  # of the ONNX release that brought the opset
    kinds = {node.op_type for node in written.graph.node}
    assert all(onnx.defs.get_schema(kind, opset) for kind in kinds)
    assert not kinds & {"Attention", "RMSNormalization", "RotaryEmbedding"}
    if name == CPU_ONNX:  # layer by layer, since values at a tie are rounded to the other side and these errors grow
        assert first_mismatch(local_differences(quantized, tmp_path / name, IMAGES)) is None
    found, expected = (in_float32(path / name) for path in (tmp_path, folder))
    assert error(found, expected) < 0.05
    assert np.abs(found - expected).mean() < 0.01 * np.abs(expected).mean()


@pytest.mark.parametrize("mask", ["post_softmax", "pre_softmax", "bidirectional"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_float_graphs_are_equal_to_pytorch_in_onnx_s_reference(mask, norm, tmp_path):
    torch.manual_seed(0)
    model = ILLaMA(ModelConfig(**SIZES, mask=mask, norm=norm)).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(IMAGES)).numpy()
    for form, name in (("plain", CPU_ONNX), ("fused", FUSED_ONNX)):
        export_onnx(model, tmp_path / name, form)
        graph = load_graph(tmp_path / name)
        lower_opset(graph, 17, {"LayerNormalization"})
        assert not {"LayerNormalization", "Attention"} & {node.op_type for node in graph.graph}
        save_graph(graph, tmp_path / name)
        found = ReferenceEvaluator(str(tmp_path / name)).run(None, {"images": IMAGES})[0]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_masked_keys_have_no_weight_in_any_precision(bundle):
    """A whole tile of masked keys, as a fused kernel sees one, must give neither NaN nor a weight."""
    graph = load_graph(bundle / FUSED_ONNX)
    lower_opset(graph, 19)
    added = [node.inputs[0].producer() for node in graph.graph if node.op_type == "Softmax"]
    masks = [array(node.inputs[1]) for node in added if node.op_type == "Add"]
    assert len(masks) == 5  # the last block computes the class token alone, which sees all
    for mask in masks:
        masked = mask[mask != 0]
        assert mask.dtype == np.float16 and len(masked) and np.isfinite(masked).all()
        scores = masked + np.float16(-15)
        assert np.isfinite(scores).all() and (np.exp(scores.astype(np.float64) + 15) == 0).all()


def test_weights_for_tensorrt_8_keep_their_integers(bundle, tmp_path):
    model = load_graph(bundle / FUSED_ONNX)
    stored = {
        node.outputs[0].name: array(node.inputs[0])
        for node in model.graph
        if node.op_type == "DequantizeLinear" and is_constant(node.inputs[0])
    }
    assert lower_for(model, find_runtime("tensorrt", "8.5"))
    nodes = [node for node in model.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert all(len(node.inputs) == 3 and not array(node.inputs[2]).any() for node in nodes)  # zero points of 0
    assert all(array(node.inputs[1]).dtype == np.float32 for node in nodes)
    found = 0
    for node in nodes:
        quantize_node = producer(node.inputs[0], "QuantizeLinear")
        if quantize_node is None or not is_constant(quantize_node.inputs[0]):
            continue
        weight, scale = (array(value) for value in quantize_node.inputs[:2])
        assert weight.dtype == np.float32
        axis = quantize_node.attributes["axis"].value
        shape = [-1 if dim == axis else 1 for dim in range(weight.ndim)]
        np.testing.assert_array_equal(np.rint(weight / scale.reshape(shape)), stored[node.outputs[0].name])
        found += 1
    assert found == len(stored) > 20


def test_a_bundle_for_a_board_answers_as_before(bundle, tmp_path):
    lines = write_older_bundle(bundle, find_target("jetpack-6"), tmp_path / "board")
    assert len(lines) == 2
    opsets = {name: onnx.load(tmp_path / "board" / name).opset_import[0].version for name in (CPU_ONNX, FUSED_ONNX)}
    assert opsets == {CPU_ONNX: 21, FUSED_ONNX: 19}  # ONNX Runtime 1.23 has no QuantizeLinear of opset 23
    for runtime in ("onnxruntime", "openvino"):
        engine = open_engine(tmp_path / "board", runtime)
        assert engine.verified  # by the golden answers
        assert error(engine.infer(IMAGES), open_engine(bundle, runtime).infer(IMAGES)) < 0.03


def test_a_target_keeps_what_it_loads(bundle, tmp_path):
    write_older_bundle(bundle, find_target("jetpack-7"), tmp_path / "board")
    for name in (CPU_ONNX, FUSED_ONNX):
        assert (tmp_path / "board" / name).read_bytes() == (bundle / name).read_bytes()
    assert "--stronglyTyped" in (tmp_path / "board" / ENGINE_SCRIPT).read_text()
    write_older_bundle(bundle, find_target("tensorrt-10.14"), tmp_path / "second")  # Attention, but no RMSNormalization
    kinds = {node.op_type for node in onnx.load(tmp_path / "second" / FUSED_ONNX).graph.node}
    assert "Attention" in kinds and "RMSNormalization" not in kinds
    assert (tmp_path / "second" / CPU_ONNX).read_bytes() == (bundle / CPU_ONNX).read_bytes()


def test_external_data_moves_with_the_graph(bundle, tmp_path):
    beside = tmp_path / "beside"
    write_older_bundle(bundle, find_target("jetpack-7"), beside)
    save_graph(load_graph(bundle / CPU_ONNX), beside / CPU_ONNX, external_above=1000)
    write_older_bundle(beside, opset_target(17), tmp_path / "older")
    assert data_file(tmp_path / "older" / CPU_ONNX).exists()
    found, expected = (run(cpu_session(folder / CPU_ONNX, 1)) for folder in (tmp_path / "older", bundle))
    assert error(found, expected) < 1e-5


@pytest.fixture
def older_runtime(tmp_path):
    """A function that runs a file in ONNX Runtime 1.20, in a process of its own: the logits, or the error."""
    if not OLDER_RUNTIME.exists():
        pytest.skip("make setup installs ONNX Runtime 1.20")
    np.save(tmp_path / "images.npy", IMAGES)
    script = (
        "import sys, numpy, onnxruntime\n"
        "assert onnxruntime.__version__.startswith('1.20')\n"
        "options = onnxruntime.SessionOptions()\n"
        "options.log_severity_level = 4\n"
        "session = onnxruntime.InferenceSession(sys.argv[1], options, providers=['CPUExecutionProvider'])\n"
        "numpy.save(sys.argv[3], session.run(None, {'images': numpy.load(sys.argv[2])})[0])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(OLDER_RUNTIME)}

    def run_older(path):
        (tmp_path / "found.npy").unlink(missing_ok=True)
        arguments = [sys.executable, "-c", script, path, tmp_path / "images.npy", tmp_path / "found.npy"]
        result = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
        return result.stderr if result.returncode else np.load(tmp_path / "found.npy")

    return run_older


def test_an_older_onnx_runtime_computes_the_same(bundle, older_runtime, tmp_path):
    assert "opset" in older_runtime(bundle / CPU_ONNX)  # 23
    for opset in (17, 19, 21):
        write_older_bundle(bundle, opset_target(opset), tmp_path / str(opset))
        found = older_runtime(tmp_path / str(opset) / CPU_ONNX)
        assert error(found, run(cpu_session(bundle / CPU_ONNX, 1))) < 0.03


def test_an_older_onnx_runtime_computes_nvfp4(older_runtime, tmp_path):
    torch.manual_seed(0)
    model = ILLaMA(ModelConfig(**SIZES)).eval()
    quantized = calibrate(model, resolve(shipped_scheme("nvfp4"), model), [torch.from_numpy(IMAGES)])
    export_onnx(quantized, tmp_path / CPU_ONNX, "plain")
    graph = load_graph(tmp_path / CPU_ONNX)
    assert lower_for(graph, find_runtime("onnxruntime", "1.20")) and graph.opset_imports[""] == 21
    (tmp_path / "older").mkdir()
    save_graph(graph, tmp_path / "older" / CPU_ONNX)
    assert error(older_runtime(tmp_path / "older" / CPU_ONNX), run(cpu_session(tmp_path / CPU_ONNX, 1))) < 0.03


@pytest.mark.skipif(library is None, reason="needs tensorrt-rtx")
@pytest.mark.parametrize("target", ["tensorrt-8.5", "tensorrt-10.3", "tensorrt-10.7", "tensorrt-10.14"])
def test_tensorrt_builds_the_graphs(bundle, target, tmp_path):
    write_older_bundle(bundle, find_target(target), tmp_path / target)
    source, fused = tmp_path / target / FUSED_ONNX, target == "tensorrt-10.14"
    options = EngineOptions(targets=("sm89",), batch=(1, 1, 8), allow_unfused=not fused)
    assert build_engine(library, source, options).attentions == (6 if fused else 0)
    if not fused:
        with pytest.raises(UserError, match="--allow-unfused"):
            build_engine(library, source, EngineOptions(targets=("sm89",)))


def test_a_build_leaves_out_what_its_tensorrt_lacks(bundle):
    """TensorRT 10.14 has Attention, which stays one operator, but no RMSNormalization."""
    for version, expected in (("10.14.1.48", {"Attention"}), ("10.16.0", {"Attention", "RMSNormalization"})):
        tensorrt = Library("tensorrt", SimpleNamespace(__version__=version))
        kinds = {node.op_type for node in prepare_graph(tensorrt, bundle / FUSED_ONNX, EngineOptions()).graph}
        assert kinds & {"Attention", "RMSNormalization"} == expected


@pytest.mark.parametrize(
    ("target", "expected", "absent"),
    [
        ("tensorrt-8.5", ["--fp16", "--int8", "--buildOnly", "--precisionConstraints=obey"], ["--stronglyTyped"]),
        ("tensorrt-8.6", ["--fp16", "--int8", "--skipInference"], ["--stronglyTyped", "--buildOnly"]),
        ("tensorrt-10.3", ["--stronglyTyped", "--skipInference"], ["--fp16", "--int8", "--precisionConstraints=obey"]),
    ],
)
def test_the_script_calls_trtexec_as_its_version_expects(bundle, target, expected, absent, tmp_path):
    folder = tmp_path / "a folder"
    write_older_bundle(bundle, find_target(target), folder)
    (tmp_path / "trtexec").write_text('#!/bin/sh\nfor each in "$@"; do echo "$each"; done\n')
    (tmp_path / "trtexec").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["sh", folder / ENGINE_SCRIPT, "16"]
    arguments = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert set(expected) <= set(arguments) and not set(absent) & set(arguments)
    assert "--maxShapes=images:16x1x28x28" in arguments and f"--onnx={FUSED_ONNX}" in arguments
    precisions = [each.partition("=")[2] for each in arguments if each.startswith("--layerPrecisions=")]
    if precisions:  # names with a colon or a comma would be read as two
        named = [each.split(":") for each in precisions[0].split(",")]
        names = {node.name for node in onnx.load(folder / FUSED_ONNX).graph.node}
        assert all(name in names and precision == "fp32" for name, precision in named)
        assert {name for name, _ in named} >= {name for name in names if "RMSNormalization" in name}


def test_number_formats_decide_which_graphs_are_written(tmp_path):
    checkpoint = load_checkpoint(SHIPPED)
    plan = plan_quantization(checkpoint.model, shipped_scheme("fp8"))
    assert plan.onnx_formats == {"FLOAT8E4M3FN"}
    loads = {name: find_target(name).loads(plan.onnx_formats) for name in read_versions().platforms}
    assert [name for name, loaded in loads.items() if loaded] == ["jetpack-7.0", "jetpack-7"]
    assert find_target("jetpack-5").loads({"INT8"})
    assert find_runtime("tensorrt", "10").opset == 20 and not find_runtime("tensorrt", "10").weakly_typed


def test_runtimes_without_a_number_format_are_refused(graphs):
    scheme, folder, _ = graphs
    if scheme not in SINCE:
        pytest.skip("8-bit integers are in every opset")
    with pytest.raises(UserError, match="FLOAT8E4M3FN" if scheme == "fp8" else "INT4"):
        lower_for(load_graph(folder / CPU_ONNX), find_runtime("onnxruntime", "1.12"))


def test_the_command(bundle, tmp_path):
    result = run_command("deploy/downgrade.py", bundle.parent, "--for", "jetpack-5", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("opset 17") == 1 and result.stdout.count("opset 19") == 1
    assert (tmp_path / "out" / "int8" / ENGINE_SCRIPT).exists()
    again = run_command("deploy/downgrade.py", tmp_path / "out", "--opset", 21, "--out", tmp_path / "newer")
    assert again.returncode == 0, again.stderr
    assert onnx.load(tmp_path / "newer" / "int8" / CPU_ONNX).opset_import[0].version == 19  # as it was
    # The graph for TensorRT 8 no longer says what must run in float32, so that no script can be written for it.
    assert not any((tmp_path / "newer" / "int8" / name).exists() for name in (FUSED_ONNX, ENGINE_SCRIPT))
    twice = run_command(
        "deploy/downgrade.py", bundle, tmp_path / "out" / "int8", "--opset", 19, "--out", tmp_path / "x"
    )
    assert_one_line_error(twice, "int8")
    assert not (tmp_path / "x").exists()


def test_tensorrt_8_5_takes_no_camera_frames(bundle, tmp_path):
    write_camera_bundle(bundle, (40, 50, 1), tmp_path / "camera")
    lines = write_older_bundle(tmp_path / "camera", find_target("jetpack-5"), tmp_path / "five")
    assert any("uint8" in line for line in lines) and not (tmp_path / "five" / FUSED_ONNX).exists()
    write_older_bundle(tmp_path / "camera", find_target("jetpack-6"), tmp_path / "six")
    frames = np.random.default_rng(0).integers(0, 255, (2, 40, 50, 1)).astype(np.uint8)
    found, expected = (open_engine(tmp_path / name, "onnxruntime").infer(frames) for name in ("six", "camera"))
    assert error(found, expected) < 0.03


def test_a_name_that_a_shell_would_run_is_refused(bundle, tmp_path):
    copy = tmp_path / "int8"
    shutil.copytree(bundle, copy)
    graph = load_graph(copy / FUSED_ONNX)
    norm = next(node for node in graph.graph if node.op_type == "RMSNormalization")
    norm.name = "norm;touch pwned;$(touch pwned)"
    save_graph(graph, copy / FUSED_ONNX)
    lines = write_older_bundle(copy, find_target("tensorrt-8.6"), tmp_path / "older")
    assert any("norm;touch" in line for line in lines)
    assert not any((tmp_path / "older" / name).exists() for name in (ENGINE_SCRIPT, FUSED_ONNX))


def test_weights_with_a_zero_point_are_refused(bundle):
    graph = load_graph(bundle / FUSED_ONNX)
    node = next(node for node in graph.graph if node.op_type == "DequantizeLinear" and is_constant(node.inputs[0]))
    node.resize_inputs(3)
    node.replace_input_with(2, add_constant(graph.graph, "five", np.full(array(node.inputs[1]).shape, 5, np.int8)))
    with pytest.raises(UserError, match="zero point"):
        lower_for(graph, find_runtime("tensorrt", "8.6"))


def test_attention_with_a_cache_is_refused(bundle):
    graph = load_graph(bundle / FUSED_ONNX)
    node = next(node for node in graph.graph if node.op_type == "Attention")
    node.resize_inputs(6)
    for index in (4, 5):
        node.replace_input_with(index, node.inputs[1])
    with pytest.raises(UserError, match="attention"):
        lower_opset(graph, 17)


def test_constants_of_the_file_keep_their_values(bundle, tmp_path):
    graph = load_graph(bundle / CPU_ONNX)
    norm = next(node for node in graph.graph if node.op_type == "RMSNormalization")
    add_constant(graph.graph, f"{norm.name}/epsilon", np.float32(1e3))
    lower_opset(graph, 19)
    save_graph(graph, tmp_path / CPU_ONNX)
    assert error(run(cpu_session(tmp_path / CPU_ONNX, 1)), run(cpu_session(bundle / CPU_ONNX, 1))) < 0.03


def test_graphs_of_no_known_opset_are_refused(bundle):
    for opset in (0, 24):
        graph = load_graph(bundle / CPU_ONNX)
        graph.opset_imports[""] = opset
        with pytest.raises(UserError, match="opset"):
            lower_for(graph, find_runtime("onnxruntime", "1.16"))


def test_a_damaged_graph_is_an_error_and_not_left_out(bundle, tmp_path):
    copy = tmp_path / "int8"
    shutil.copytree(bundle, copy)
    (copy / CPU_ONNX).write_bytes((copy / CPU_ONNX).read_bytes()[:-1000])
    result = run_command("deploy/downgrade.py", copy, "--for", "jetpack-6", "--out", tmp_path / "out")
    assert_one_line_error(result, CPU_ONNX)
    assert not (tmp_path / "out" / "int8").exists()


def test_a_bundle_is_not_written_into_itself(bundle):
    before = sorted(bundle.iterdir())
    assert_one_line_error(run_command("deploy/downgrade.py", bundle, "--opset", 17, "--out", bundle), "--out")
    assert sorted(bundle.iterdir()) == before


def test_rotations_in_another_layout_are_refused(graphs):
    graph = load_graph(graphs[1] / CPU_ONNX)
    rotary = next(node for node in graph.graph if node.op_type == "RotaryEmbedding")
    rotary.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)
    with pytest.raises(UserError, match="rotat"):
        lower_opset(graph, 21)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["no bundle given"]),
        ([SHIPPED], ["--for"]),
        ([SHIPPED, "--for", "jetpack-9"], ["jetpack-9", "jetpack-6"]),
        ([SHIPPED, "--for", "tensorrt-7.1"], ["8.5"]),
        ([SHIPPED, "--for", "onnxruntime-new"], ["new"]),
        ([SHIPPED, "--for", "jetpack-6", "--opset", 17], ["--opset", "--for"]),
        (["no/such/folder", "--opset", 17], ["no/such/folder"]),
    ],
)
def test_bad_options_end_in_one_line(arguments, words):
    assert_one_line_error(run_command("deploy/downgrade.py", *arguments), *words)


def test_the_table_of_versions():
    versions = read_versions()
    register_operators()
    for runtime, table in versions.runtimes.items():
        numbers = [tuple(map(int, version.split("."))) for version in table.releases]
        assert numbers == sorted(numbers)
        opsets = [release.opset for release in table.releases.values()]
        assert opsets == sorted(opsets)
        entries = [*table.releases.values(), *table.operators, *table.formats]
        assert all(len(entry.source) > 10 for entry in entries)
        for operator in (each for each in table.operators if each.name != "uint8 images"):
            domain = DOMAIN if operator.name.startswith("TRT_") else ""
            assert onnx.defs.get_schema(operator.name, operator.opset, domain).since_version == operator.opset
            assert not operator.since or find_runtime(runtime, operator.since).opset >= operator.opset
    for release in versions.runtimes["onnxruntime"].releases.values():
        newest = max(row[2] for row in onnx.helper.VERSION_TABLE if row[1] <= release.ir)
        assert release.opset <= newest + 1
    guide = (ROOT / "docs" / "jetson.md").read_text()
    for platform in versions.platforms.values():
        assert f"| {platform.boards} | {platform.tensorrt} | {platform.python} |" in guide
        assert platform.source and find_runtime("tensorrt", platform.tensorrt).opset >= min(OPSETS)
