"""Golden answers: wrong engines are refused in every runtime, right ones never are, and the outcome is kept."""

import copy
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from support import assert_one_line_error

import deploy.runtimes.verification
from deploy.rewrites.camera_bundle import write_camera_bundle
from deploy.runtimes.engine import Engine
from deploy.runtimes.image_input import ImageInput
from deploy.runtimes.open_engine import load_engine, open_engine
from deploy.runtimes.torch_engine import TorchEngine
from deploy.runtimes.verification import VERIFIED, verify
from deploy.serving.known_answer import golden_file
from deploy.serving.repository import create_known_answer
from illama.bundle import CPU_ONNX, FUSED_ONNX, GOLDEN, TORCHAO
from illama.data.preprocessing import Preprocessing
from illama.errors import UserError
from illama.golden_answers import GoldenAnswers, golden_size, relative_error, repeat_pixels
from illama.manifest import Manifest
from illama.options import SourceOptions
from quant.export.golden import golden_answers
from quant.export.write_bundle import Origin, plan_quantization, quantize, write_graphs, write_quantized
from quant.inputs import open_inputs
from quant.schemes.scheme import shipped_scheme


@pytest.fixture(scope="module")
def inputs():
    return open_inputs(SourceOptions(calibration_images=64))


@pytest.fixture(scope="module")
def quantized(inputs):
    plan = plan_quantization(inputs.model, shipped_scheme("int8"))
    return quantize(inputs.model, plan, inputs.calibration), plan


@pytest.fixture(scope="module")
def bundle(inputs, quantized, tmp_path_factory):
    model, plan = quantized
    folder = tmp_path_factory.mktemp("golden") / "int8"
    return write_quantized(folder, model, plan, Origin.of(inputs), inputs.calibration)


@pytest.fixture
def own(bundle, tmp_path):
    """A copy of the bundle, to be changed."""
    return shutil.copytree(bundle, tmp_path / "int8", ignore=shutil.ignore_patterns(VERIFIED))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "illama"


def _insert(model, before, nodes, output):
    """Inserts nodes, which compute ``output`` from ``before``, and lets all later nodes use it."""
    first = next((i for i, node in enumerate(model.graph.node) if before in node.input), len(model.graph.node))
    for node in model.graph.node:
        node.input[:] = [output if name == before else name for name in node.input]
    for node in reversed(nodes):
        model.graph.node.insert(first, node)


def _constant(model, name, values):
    model.graph.initializer.append(numpy_helper.from_array(np.array(values), name))
    return name


def _replace_logits(model, nodes):
    """Adds nodes that compute the logits from ``before``."""
    for node in model.graph.node:
        node.output[:] = ["before" if name == "logits" else name for name in node.output]
    model.graph.node.extend(nodes)


def drop_mask(model):
    masks = {node.input[1] for node in model.graph.node if node.name.endswith("attn.core/Mul_2")}
    assert masks
    for each in model.graph.initializer:
        if each.name in masks:
            each.CopyFrom(numpy_helper.from_array(np.ones_like(numpy_helper.to_array(each)), each.name))


def swap_rows(model):
    values = [("starts", [-1]), ("ends", [np.iinfo(np.int64).min]), ("axes", [0]), ("steps", [-1])]
    names = [_constant(model, name, np.array(value, np.int64)) for name, value in values]
    _replace_logits(model, [helper.make_node("Slice", ["before", *names], ["logits"])])


def overflow(model):
    factor = _constant(model, "factor", np.float32(2000))
    nodes = [
        helper.make_node("Mul", ["blocks.1.norm2", factor], ["scaled"]),
        helper.make_node("Exp", ["scaled"], ["exponential"]),
        helper.make_node("Mul", ["blocks.1.norm2", "exponential"], ["large"]),
        helper.make_node("Div", ["large", "exponential"], ["back"]),
    ]
    _insert(model, "blocks.1.norm2", nodes, "back")


def wrong_at_batch_1(model):
    one, zero = _constant(model, "one", np.int64(1)), _constant(model, "zero", np.int64(0))
    names = ["before", _constant(model, "other", np.float32(-1))]
    nodes = [
        helper.make_node("Shape", ["images"], ["shape"]),
        helper.make_node("Gather", ["shape", zero], ["batch"]),
        helper.make_node("Equal", ["batch", one], ["alone"]),
        helper.make_node("Mul", names, ["negative"]),
        helper.make_node("Where", ["alone", "negative", "before"], ["logits"]),
    ]
    _replace_logits(model, nodes)


def not_a_number(model):
    bad = _constant(model, "bad", np.float32(np.nan))
    _replace_logits(model, [helper.make_node("Add", ["before", bad], ["logits"])])


def double_scale(model, weight="blocks.0.attn.proj"):
    for each in model.graph.initializer:
        if each.name == f"model.{weight}.frozen_scale":
            each.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(each), each.name))
            return
    raise AssertionError(weight)


_ALL = (drop_mask, swap_rows, overflow, wrong_at_batch_1, not_a_number, double_scale)
FAULTS = {each.__name__: each for each in _ALL}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_wrong_graph_is_refused(fault, runtime, own):
    model = onnx.load(own / CPU_ONNX)
    FAULTS[fault](model)
    onnx.save(model, own / CPU_ONNX)
    load_engine(own / CPU_ONNX, runtime)  # the runtime itself finds no fault
    for path in (own, own / CPU_ONNX):
        with pytest.raises(UserError, match="logits"):
            open_engine(path, runtime)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_network_in_pytorch_is_refused(fault, inputs, quantized, bundle):
    network = copy.deepcopy(quantized[0])
    assert verify(TorchEngine(network, "cpu"), bundle / CPU_ONNX, remember=False)
    if fault == "drop_mask":
        network.soft_mask = 1.0
    elif fault == "swap_rows":
        network.register_forward_hook(lambda _, __, logits: logits.flip(0))
    elif fault == "overflow":
        network.blocks[1].norm2.register_forward_hook(lambda _, __, x: (x * 2**21).half().float() / 2**21)
    elif fault == "wrong_at_batch_1":
        network.register_forward_hook(lambda _, __, logits: -logits if len(logits) == 1 else logits)
    elif fault == "not_a_number":
        network.head.bias.data[0] = torch.nan
    else:
        network.blocks[0].attn.proj.register_forward_hook(lambda layer, _, y: 2 * y - layer.bias)
    with pytest.raises(UserError, match="logits"):
        verify(TorchEngine(network, "cpu"), bundle / CPU_ONNX, remember=False)


def test_every_scale_of_a_weight_matters(own):
    """Also the one that matters least."""
    original = onnx.load(own / CPU_ONNX)
    names = [each.name for each in original.graph.initializer if each.name.endswith(".frozen_scale")]
    assert len(names) > 20
    for name in names[:: len(names) // 8]:
        model = onnx.ModelProto()
        model.CopyFrom(original)
        double_scale(model, name.removeprefix("model.").removesuffix(".frozen_scale"))
        onnx.save(model, own / CPU_ONNX)
        with pytest.raises(UserError, match="other logits"):
            open_engine(own / CPU_ONNX, "onnxruntime")


@pytest.mark.parametrize("name", ["fp32", "int8-attention", "fp8", "w4a4", "int8-dynamic"])
def test_right_engines_are_never_refused(name, inputs, tmp_path):
    """Here for some schemes; benchmarks/golden_answers.py does it for all."""
    folder, few, runs = tmp_path / name, inputs.calibration[:1], 0
    if name == "fp32":
        write_graphs(folder, inputs.model, Origin.of(inputs), (CPU_ONNX, FUSED_ONNX), few)
        network = inputs.model
    else:
        plan = plan_quantization(inputs.model, replace(shipped_scheme(name), reconstruction_iterations=0))
        network = quantize(inputs.model, plan, few)
        write_quantized(folder, network, plan, Origin.of(inputs), few)
    pairs = [(CPU_ONNX, "onnxruntime"), (CPU_ONNX, "openvino"), (FUSED_ONNX, "onnxruntime"), (TORCHAO, "torch")]
    for source in ("calibration", "noise"):
        assert GoldenAnswers.read(folder / GOLDEN).facts.source == source
        assert (folder / GOLDEN).stat().st_size < 100_000
        for file, runtime in pairs:
            if (folder / file).exists() and not (name == "w4a4" and runtime == "openvino"):
                assert open_engine(folder / file, runtime, threads=1).verified, (file, runtime)
                runs += 1
        golden_answers(network, inputs.preprocessing, [], name != "fp32").write(folder)
    assert runs >= 2


def test_the_outcome_is_kept_until_something_changes(own, monkeypatch):
    calls = []

    def counted(self, logits, arithmetic, check=GoldenAnswers.check):
        calls.append(len(logits))
        return check(self, logits, arithmetic)

    monkeypatch.setattr(GoldenAnswers, "check", counted)
    assert open_engine(own / CPU_ONNX, "onnxruntime").verified and calls == [1, 8]
    assert open_engine(own / CPU_ONNX, "onnxruntime").verified and calls == [1, 8]
    assert open_engine(own / CPU_ONNX, "openvino").verified and calls == [1, 8] * 2  # another runtime
    assert open_engine(own / CPU_ONNX, "onnxruntime").verified and calls == [1, 8] * 2
    (own / CPU_ONNX).touch()
    assert open_engine(own / CPU_ONNX, "onnxruntime").verified and calls == [1, 8] * 3
    monkeypatch.setattr(deploy.runtimes.verification, "cpu_name", lambda: "another processor")
    assert open_engine(own / CPU_ONNX, "onnxruntime").verified and calls == [1, 8] * 4
    (own / VERIFIED).write_text("damaged")
    assert open_engine(own / CPU_ONNX, "onnxruntime").verified and calls == [1, 8] * 5


def test_the_outcome_of_a_read_only_bundle_is_in_the_cache(own, cache, monkeypatch):
    (own / VERIFIED).mkdir()  # nobody can write the file, not even root
    assert open_engine(own / CPU_ONNX, "onnxruntime").verified
    (stored,) = cache.glob("verified-*.json")
    assert json.loads(stored.read_text())[0]["passed"]
    monkeypatch.setattr(GoldenAnswers, "check", lambda *_: pytest.fail("it was verified again"))
    assert open_engine(own / CPU_ONNX, "onnxruntime").verified


def test_a_refused_engine_runs_unverified_with_a_warning(own, run_here, capfd, tmp_path):
    model = onnx.load(own / CPU_ONNX)
    swap_rows(model)
    onnx.save(model, own / CPU_ONNX)
    picture = tmp_path / "noise.png"
    picture.write_bytes(golden_file(GoldenAnswers.read(own / GOLDEN), Manifest.read(own).preprocessing))
    command = ("deploy/predict.py", "--engine", own, picture)
    assert_one_line_error(run_here(*command), "mixes up the images")
    assert not json.loads((own / VERIFIED).read_text())[0]["passed"]
    result = run_here(*command, "--unverified")
    assert result.returncode == 0 and "NOT verified" in result.stdout and "mixes up" in result.stderr


def test_a_server_that_may_serve_wrong_networks_still_knows_the_right_answer(own):
    right = create_known_answer(own / CPU_ONNX, "onnxruntime")
    assert create_known_answer(own / CPU_ONNX, "onnxruntime", unverified=True).logits == right.logits
    model = onnx.load(own / CPU_ONNX)
    double_scale(model)
    onnx.save(model, own / CPU_ONNX)
    with pytest.raises(UserError, match="other logits"):
        create_known_answer(own / CPU_ONNX, "onnxruntime")
    wrong = create_known_answer(own / CPU_ONNX, "onnxruntime", unverified=True)
    assert wrong.image == right.image and wrong.logits != right.logits  # its own, or every probe would fail


def test_bundles_without_golden_answers(inputs, tmp_path, run_here):
    folder = write_graphs(tmp_path / "b", inputs.model, replace(Origin.of(inputs), golden="none"), (CPU_ONNX,), [])
    assert not (folder / GOLDEN).exists() and Manifest.read(folder).golden_answers == "none"
    assert not open_engine(folder).verified
    known = create_known_answer(folder / CPU_ONNX, "onnxruntime")
    assert known.matches(np.array(known.logits)) and not known.matches(-np.array(known.logits))


@pytest.mark.parametrize("damage", ["cut", "tensor", "metadata", "tolerance", "position"])
def test_damaged_golden_answers_are_refused(damage, own):
    golden = GoldenAnswers.read(own / GOLDEN)
    if damage == "cut":
        (own / GOLDEN).write_bytes((own / GOLDEN).read_bytes()[:-5])
    elif damage == "tensor":
        replace(golden, images=golden.images[:, :, :, 0]).write(own)
    elif damage == "metadata":
        replace(golden, facts=replace(golden.facts, size=(0, 28))).write(own)
    elif damage == "tolerance":
        replace(golden, facts=replace(golden.facts, tolerances={"float32": float("nan")})).write(own)
    else:
        replace(golden, positions=golden.positions + 5).write(own)
    with pytest.raises(UserError):
        open_engine(own / CPU_ONNX)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_golden_answers_of_another_network_are_refused(runtime, own):
    golden = GoldenAnswers.read(own / GOLDEN)
    replace(golden, facts=replace(golden.facts, size=(64, 56))).write(own)
    with pytest.raises(UserError, match=r"model\.onnx"):
        open_engine(own / CPU_ONNX, runtime)


def test_camera_bundles_have_golden_answers_of_their_own(bundle, tmp_path):
    for frame in ((56, 40, 1), (37, 61, 3)):
        out = tmp_path / "-".join(map(str, frame))
        write_camera_bundle(bundle, frame, out)
        for runtime in ("onnxruntime", "openvino"):
            assert open_engine(out / CPU_ONNX, runtime).verified
        assert open_engine(out / FUSED_ONNX).verified
        known = create_known_answer(out / CPU_ONNX, "onnxruntime")
        assert known.matches(open_engine(out / CPU_ONNX).infer(GoldenAnswers.read(out / GOLDEN).inputs(1))[0])


@pytest.mark.parametrize(
    ("size", "resize"), [((28, 28), None), ((28, 28), 28), ((224, 224), 256), ((48, 37), 61), ((31, 97), 97)]
)
def test_the_image_of_a_server_s_known_answer_is_the_golden_input(size, resize, bundle):
    golden = GoldenAnswers.read(bundle / GOLDEN)
    for channels in (1, 3):
        preprocessing = Preprocessing(size, channels, (0.4,) * channels, (0.2,) * channels, resize)
        height, width = golden_size(size)
        images = np.random.default_rng(0).integers(0, 256, (2, height, width, channels), dtype=np.uint8)
        facts = replace(golden.facts, size=size, mean=preprocessing.mean, std=preprocessing.std)
        own = replace(golden, images=images, facts=facts)
        found = _read(golden_file(own, preprocessing), preprocessing)
        np.testing.assert_allclose(found, own.inputs(1)[0], atol=1e-5)


def _read(png, preprocessing):
    return ImageInput(preprocessing).read(io.BytesIO(png), str)


@given(st.tuples(st.integers(1, 300), st.integers(1, 300)))
def test_sizes_of_golden_images(size):
    small = golden_size(size)
    assert max(small) <= 32
    images = np.arange(small[0] * small[1], dtype=np.uint32).reshape(1, *small, 1)
    large = repeat_pixels(images, size)
    assert large.shape == (1, *size, 1) and len(np.unique(large)) == images.size  # no pixel is cropped away


@settings(max_examples=30)
@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(-100, 100))
def test_errors_depend_neither_on_the_scale_nor_on_the_mean_of_logits(seed, scale, shift):
    random = np.random.default_rng(seed)
    expected, noise = random.normal(size=(4, 10)), 0.1 * random.normal(size=(4, 10))
    error = relative_error(expected + noise, expected)
    again = relative_error(scale * (expected + noise + shift), scale * (expected + shift))
    np.testing.assert_allclose(again, error, rtol=1e-6)


def test_the_largest_batch_repeats_the_images(bundle):
    golden = GoldenAnswers.read(bundle / GOLDEN)
    engine = load_engine(bundle / CPU_ONNX, "onnxruntime")
    engine.batches = (3, 21)
    assert verify(engine, bundle / CPU_ONNX, remember=False)

    class Late(Engine):  # wrong in the last image of a large batch only
        runtime, batches = "late", (1, 21)

        def infer(self, images):
            logits = engine.infer(images)
            if len(images) == 21:
                logits[-1] = 0
            return logits

    with pytest.raises(UserError, match="1 images in a batch of 21"):
        verify(Late(), bundle / CPU_ONNX, remember=False)
    assert golden.inputs(21).shape == (21, 1, 28, 28)
