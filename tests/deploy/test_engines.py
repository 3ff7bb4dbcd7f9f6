"""Every runtime computes the network's logits; predictions and camera frames on the command line."""

import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support import ROOT, SMALL, assert_one_line_error, run_command, write_bundle, write_made_up_engine

from deploy.rewrites.add_preprocessing import add_preprocessing
from deploy.runtimes.classify import top5
from deploy.runtimes.cpu_runtime import cpu_runtime
from deploy.runtimes.least_recently_used import LeastRecentlyUsed
from deploy.runtimes.onnxruntime_engine import OnnxRuntimeEngine
from deploy.runtimes.open_engine import open_engine, open_file
from deploy.runtimes.openvino_engine import OpenVinoEngine
from deploy.runtimes.tensorrt_engine import TensorRTEngine
from deploy.trt.build_bundle import build_bundle
from deploy.trt.library import find_library
from deploy.trt.record import EngineRecord
from illama import ILLaMA, ModelConfig
from illama.atomic_write import read_pinned
from illama.bundle import CPU_ONNX, FUSED_ONNX, SHIPPED, TORCHAO
from illama.checkpoints.load import load_checkpoint
from illama.data.datasets import open_data
from illama.data.preprocessing import Preprocessing
from illama.errors import UserError
from illama.graph.reader import to_bytes
from illama.inference import load_images
from illama.manifest import Manifest
from quant.export.onnx_export import export_onnx
from quant.quantizers.calibrate import calibrate
from quant.quantizers.torchao_backend import quantize_with_torchao, write_torchao
from quant.schemes.scheme import resolve, shipped_scheme

COLOR = ModelConfig(image_size=48, patch_size=16, width=64, depth=2, heads=2, num_classes=7)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ILLaMA(SMALL).eval()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    folder = write_bundle(tmp_path_factory.mktemp("engines") / "bundle", SMALL, model.state_dict())
    export_onnx(model, folder / CPU_ONNX, "plain")
    export_onnx(model, folder / FUSED_ONNX, "fused", torch.float16)
    return folder


@pytest.fixture(scope="module")
def expected(model, images):
    with torch.no_grad():
        return model.double()(torch.from_numpy(images).double()).float().numpy()


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch", "torch-compile"])
def test_a_runtime_computes_the_networks_logits(runtime, bundle, images, expected):
    engine = open_engine(bundle, runtime, threads=1)
    np.testing.assert_allclose(engine.infer(images), expected, atol=1e-5)
    np.testing.assert_allclose(engine.infer(images[:1]), expected[:1], atol=1e-5)
    assert runtime.partition("-")[0] in engine.runtime


def test_openvino_computes_them_in_float32_and_approximately_by_default(bundle, images, expected):
    np.testing.assert_allclose(OpenVinoEngine(bundle / CPU_ONNX, 1, "f32").infer(images), expected, atol=1e-5)
    by_default = OpenVinoEngine(bundle / CPU_ONNX)
    assert by_default.runtime.startswith("openvino") and by_default.floats in by_default.runtime
    for engine in (by_default, open_engine(bundle)):
        np.testing.assert_allclose(engine.infer(images), expected, atol=0.02 * np.abs(expected).max())


_TWO_ENGINES_THEN_CTRL_C = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background commands with SIGINT ignored
from pathlib import Path
from deploy.runtimes.openvino_engine import OpenVinoEngine
first, second = OpenVinoEngine(Path(sys.argv[1])), OpenVinoEngine(Path(sys.argv[1]))
del first
del second
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_is_handled_after_openvino_engines_are_deleted(bundle):
    result = run_command("-c", _TWO_ENGINES_THEN_CTRL_C, bundle / CPU_ONNX)
    assert (result.returncode, result.stdout) == (0, "interrupted\n"), result.stderr


def test_int8_in_openvino_is_as_accurate_as_in_onnx_runtime(tmp_path):
    """The shipped network on real images, with the rewrites for OpenVINO."""
    shipped, data = load_checkpoint(SHIPPED), open_data("fashion-mnist")
    transform = shipped.preprocessing.transform()
    calibration = torch.from_numpy(load_images(data.calibration(128), transform)[0]).split(64)
    export_onnx(
        calibrate(shipped.model, resolve(shipped_scheme("int8"), shipped.model), calibration),
        tmp_path / CPU_ONNX,
        "plain",
    )
    images, labels = load_images(data.test(), transform, 1000)
    both = [
        engine.infer(images) for engine in (OnnxRuntimeEngine(tmp_path / CPU_ONNX), open_engine(tmp_path / CPU_ONNX))
    ]
    right = [(logits.argmax(1) == labels).mean() for logits in both]
    assert (both[0].argmax(1) == both[1].argmax(1)).mean() >= 0.99 and abs(right[0] - right[1]) <= 0.005


def test_fp8_runs_in_onnx_runtime(tmp_path, model):
    path = tmp_path / "model.onnx"
    export_onnx(
        calibrate(model.float(), resolve(shipped_scheme("fp8"), model.float()), [torch.randn(2, 3, 32, 32)]),
        path,
        "plain",
    )
    assert cpu_runtime(path) == "onnxruntime"


def test_4_bit_activations_run_in_onnx_runtime(tmp_path, model):
    """OpenVINO 2026.4 ends the process with corrupted memory while it compiles them."""
    scheme = replace(shipped_scheme("w4a4"), reconstruction_iterations=0)
    path = tmp_path / "w4a4.onnx"
    export_onnx(calibrate(model, resolve(scheme, model), [torch.randn(4, 3, 32, 32)]), path, "plain")
    assert cpu_runtime(path) == "onnxruntime" and isinstance(open_engine(path), OnnxRuntimeEngine)
    with pytest.raises(UserError, match="--runtime onnxruntime"):
        OpenVinoEngine(path)


def test_a_network_quantized_by_torchao(tmp_path, model, images):
    folder = write_bundle(tmp_path / "bundle", SMALL, model.float().state_dict())
    quantized = quantize_with_torchao(model.float(), resolve(shipped_scheme("int8-weight-only-torchao"), model.float()))
    write_torchao(quantized, folder)
    with torch.no_grad():
        expected = quantized(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(open_engine(folder / TORCHAO).infer(images), expected, atol=1e-5)


def test_files_that_cannot_be_opened(bundle, tmp_path, monkeypatch):
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"not a graph")
    for path, runtime, match in (
        (tmp_path / "nothing.onnx", None, r"nothing\.onnx"),
        (tmp_path, None, tmp_path.name),
        (bundle, "tflite", "'tflite'.*openvino"),
        (broken, "onnxruntime", r"model\.onnx"),
        (broken, "openvino", r"model\.onnx"),
        (bundle / CPU_ONNX, "torch", r"model\.onnx.*torch"),
        (bundle / "model.safetensors", "openvino", r"model\.safetensors.*openvino"),
        (bundle / CPU_ONNX, "onnxruntime-tensorrt", "TensorrtExecutionProvider"),
    ):
        with pytest.raises(UserError, match=match):
            open_engine(path, runtime)
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert cpu_runtime(bundle / CPU_ONNX) == "onnxruntime"
    with pytest.raises(UserError, match="pip install openvino"):
        OpenVinoEngine(bundle / CPU_ONNX)


@pytest.mark.skipif(find_library() is None, reason="no TensorRT that can build is installed")
def test_an_engine_is_checked_before_it_is_deserialized(bundle, monkeypatch):
    path = build_bundle(find_library(), bundle, name="checked")
    for wanted in (path, path.parent) if not torch.cuda.is_available() else ():
        with pytest.raises(UserError, match="NVIDIA GPU"):
            open_engine(wanted)
    path.write_bytes(path.read_bytes() + b"x")
    monkeypatch.setattr("deploy.runtimes.tensorrt_engine.TensorRTEngine", lambda *_: pytest.fail("it was opened"))
    for wanted in (path, path.parent):
        with pytest.raises(UserError, match=r"SHA-256.*record\.json"):
            open_engine(wanted)
        with pytest.raises(UserError, match=r"SHA-256.*record\.json"):
            open_engine(wanted, "openvino")


@pytest.fixture
def without_record(bundle, tmp_path):
    """A bundle with a good graph and an engine without a record, because its writer was killed."""
    copy = Path(shutil.copytree(bundle, tmp_path / "without_record", ignore=shutil.ignore_patterns("engines")))
    write_made_up_engine(copy / "engines" / "tensorrt.engine")
    (copy / "engines" / "tensorrt.json").unlink()
    return copy


def test_a_bundle_with_an_invalid_engine_can_be_opened(without_record, images, expected, capsys):
    engine, file = open_file(without_record)
    assert file == without_record / CPU_ONNX
    np.testing.assert_allclose(engine.infer(images), expected, atol=0.02 * np.abs(expected).max())
    warning = capsys.readouterr().err.strip()
    assert len(warning.splitlines()) == 1 and "tensorrt.json" in warning
    for runtime in ("openvino", "torch"):
        open_engine(without_record, runtime)
    assert not capsys.readouterr().err
    for path, runtime in ((without_record / "engines" / "tensorrt.engine", None), (without_record, "tensorrt")):
        with pytest.raises(UserError, match=r"tensorrt\.json"):
            open_engine(path, runtime)


def test_predictions_of_a_bundle_with_an_invalid_engine(without_record, tmp_path, run_here):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "photo.png")
    command = ["deploy/predict.py", tmp_path / "photo.png", "--engine"]
    result = run_here(*command, without_record)
    assert result.returncode == 0 and "photo.png: class" in result.stdout and "tensorrt.json" in result.stderr
    assert_one_line_error(run_here(*command, without_record, "--runtime", "tensorrt"), "tensorrt.json")
    assert_one_line_error(run_here(*command, without_record / "engines" / "tensorrt.engine"), "tensorrt.json")
    assert_one_line_error(run_here(*command, without_record / "engines"), "engines")


def test_a_runtime_cache_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    """Without a GPU: the cache and the engine are mocked."""
    engine = object.__new__(TensorRTEngine)
    engine._cache = type("Cache", (), {"serialize": lambda self: b"kernels"})()
    for folder, warnings in ((tmp_path / "missing", 1), (tmp_path, 0)):
        engine._cache_path = folder / "runtime-cache"
        engine.close()
        assert len(capsys.readouterr().err.splitlines()) == warnings
    assert read_pinned(tmp_path / "runtime-cache") == b"kernels"


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_tensorrt_engine_computes_the_networks_logits(batch, bundle, model):
    library = find_library()
    path = build_bundle(library, bundle)
    images = np.random.default_rng(1).normal(size=(batch, 3, 32, 32)).astype(np.float32)
    engine = open_engine(path)
    with torch.no_grad():
        expected = model.double()(torch.from_numpy(images).double()).numpy()
    for _ in range(3):  # the later calls replay a CUDA graph
        np.testing.assert_allclose(engine.infer(images), expected, atol=1e-2 * np.abs(expected).max())
    engine.close()
    assert (path.parent / "runtime-cache").exists() == (library.name == "tensorrt_rtx")
    again = open_engine(path.parent)  # with the runtime cache, if there is one
    np.testing.assert_array_equal(again.infer(images), engine.infer(images))
    with pytest.raises(UserError, match="1 to 64"):
        engine.infer(np.zeros((65, 3, 32, 32), np.float32))


@pytest.mark.gpu
def test_contexts_are_bounded(bundle):
    path = build_bundle(find_library(), bundle)
    record = EngineRecord.read(path)
    images = np.random.default_rng(1).normal(size=(4, 3, 32, 32)).astype(np.float32)
    unbounded, bounded = TensorRTEngine(path, record, 8), TensorRTEngine(path, record, 2)
    for batch in (1, 2, 3, 1, 4, 2, 1):
        np.testing.assert_allclose(bounded.infer(images[:batch]), unbounded.infer(images[:batch]), rtol=1e-3)
        bounded.run_on_device(batch)  # may still run when its context is freed
        assert len(bounded._calls._values) <= 2


def test_least_recently_used_values_are_closed_first():
    events = []
    kept = LeastRecentlyUsed(2, lambda key: events.append(f"make {key}") or key * 10, lambda v: events.append(v))
    assert [kept[key] for key in (1, 2, 1, 3, 1, 2)] == [10, 20, 10, 30, 10, 20]
    assert events == ["make 1", "make 2", 20, "make 3", 30, "make 2"]
    with pytest.raises(ValueError, match="0"):
        LeastRecentlyUsed(0, str, print)


@given(keys=st.lists(st.integers(0, 5), max_size=30), capacity=st.integers(1, 4))
def test_a_bounded_store_makes_what_functools_would(keys, capacity):
    made, alive = [], []
    expected = lru_cache(capacity)(lambda key: key)
    kept = LeastRecentlyUsed(capacity, lambda key: made.append(key) or alive.append(key) or key, alive.remove)
    for key in keys:
        assert kept[key] == expected(key) == key
        assert len(made) == expected.cache_info().misses
        assert len(alive) == len(kept._values) == expected.cache_info().currsize


def test_a_value_that_cannot_be_made_leaves_room():
    def make(key):
        if key == "bad":
            raise MemoryError
        return key

    kept = LeastRecentlyUsed(1, make, lambda value: None)
    with pytest.raises(MemoryError):
        kept["bad"]
    assert kept["good"] == "good" and len(kept._values) == 1


@pytest.mark.parametrize("size", [(60, 80), (48, 48), (101, 67), (30, 200)])
@pytest.mark.parametrize("resize", [55, None])
@pytest.mark.parametrize(("frame_channels", "channels"), [(3, 3), (3, 1), (1, 1), (1, 3)])
def test_preprocessing_in_the_graph_equals_pillows(size, resize, frame_channels, channels, tmp_path):
    """The network's input, within one level of 256, for every shape of frame and kind of preprocessing."""
    preprocessing = Preprocessing((48, 48), channels, (0.4,) * channels, (0.25,) * channels, resize)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, frame_channels), dtype=np.uint8)
    picture = Image.fromarray(pixels if frame_channels == 3 else pixels[..., 0])
    expected = preprocessing.transform()(picture)[None].numpy()
    graph = ir.from_proto(_identity(channels, 48))
    add_preprocessing(graph, preprocessing, (*size, frame_channels))
    onnx.checker.check_model(to_bytes(graph), full_check=True)
    session = onnxruntime.InferenceSession(to_bytes(graph))
    actual = session.run(None, {"images": pixels[None].repeat(2, 0)})[0]
    assert actual.shape == (2, channels, 48, 48)
    levels = np.abs(actual - expected) * 0.25 * 255
    assert levels.max() < 1.01 and (levels > 0.5).mean() < 0.02


def _identity(channels, size):
    from onnx import TensorProto, helper

    shape = ["batch", channels, size, size]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["images"], ["logits"])],
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


@pytest.fixture(scope="module")
def color_bundle(tmp_path_factory):
    torch.manual_seed(0)
    model = ILLaMA(COLOR).eval()
    folder = write_bundle(tmp_path_factory.mktemp("color") / "bundle", COLOR, model.state_dict())
    export_onnx(model, folder / CPU_ONNX, "plain")
    export_onnx(model, folder / FUSED_ONNX, "fused", torch.float16)
    return folder


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(3).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_a_bundle_that_takes_frames(color_bundle, photo, tmp_path, run_here):
    out = tmp_path / "camera"
    result = run_here("deploy/camera.py", color_bundle, "--frame", "60x80", "--out", out)
    assert result.returncode == 0, result.stderr
    prepared = Manifest.read(color_bundle).preprocessing.transform()(Image.open(photo))[None].numpy()
    frame = np.asarray(Image.open(photo))[None]
    for name in (CPU_ONNX, FUSED_ONNX):
        whole, rest = OnnxRuntimeEngine(out / name).infer(frame), OnnxRuntimeEngine(color_bundle / name).infer(prepared)
        assert np.abs(whole - rest).max() < 0.02 * np.abs(rest).max()
    if library := find_library():
        record = EngineRecord.read(build_bundle(library, out))
        assert record.inputs == {"images": ("uint8", (-1, 60, 80, 3))} and record.fused
    plain = run_here("deploy/predict.py", photo, "--engine", color_bundle, "--runtime", "onnxruntime")
    camera = run_here("deploy/predict.py", photo, "--engine", out, "--runtime", "onnxruntime")
    assert plain.returncode == camera.returncode == 0, plain.stderr + camera.stderr
    assert [line.split(": ")[1].split(" ")[0] for line in plain.stdout.splitlines()[1:]] == [
        line.split(": ")[1].split(" ")[0] for line in camera.stdout.splitlines()[1:]
    ]
    assert_one_line_error(run_here("deploy/camera.py", out, "--out", tmp_path / "x"), "camera")
    assert_one_line_error(run_here("deploy/camera.py", color_bundle, "--frame", "big"), "--frame", "big")
    Image.new("RGB", (10, 10)).save(tmp_path / "small.png")
    result = run_here("deploy/predict.py", tmp_path / "small.png", "--engine", out)
    assert_one_line_error(result, "10x10", "60x80")


def test_predictions_that_are_rejected(color_bundle, tmp_path, photo, run_here):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    for arguments, words in (
        ((tmp_path / "broken.jpg", "--engine", color_bundle), "broken.jpg"),
        (("--engine", color_bundle), "--watch"),
        ((photo, "--engine", tmp_path / "nowhere"), tmp_path.name),
        (("--watch", tmp_path / "nowhere", "--engine", color_bundle), "nowhere"),
    ):
        assert_one_line_error(run_here("deploy/predict.py", *arguments), words)


def test_watching_a_folder(color_bundle, photo, tmp_path):
    """An existing file, a later one, and a broken one between them, which does not end the command."""
    folder = tmp_path / "line"
    folder.mkdir()
    (folder / "1.png").write_bytes(photo.read_bytes())
    (folder / "2.png").write_bytes(b"half an image")
    command = [
        sys.executable,
        "deploy/predict.py",
        "--watch",
        str(folder),
        "--engine",
        str(color_bundle),
        "--seconds",
        "8",
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        lines = iter(process.stdout.readline, "")
        next(lines)
        assert "1.png: class" in next(lines) and "2.png: skipped" in next(lines)
        time.sleep(0.1)
        (folder / "3.png").write_bytes(photo.read_bytes())
        assert "3.png: class" in next(lines)
        assert process.wait(timeout=30) == 0


def test_the_five_most_probable_classes():
    logits = np.log(np.array([1, 2, 4, 8, 16, 32, 1], dtype=np.float32))
    assert [name for name, _ in top5(logits, list("abcdefg"))] == list("fedcb")
    assert top5(logits, list("abcdefg"))[0][1] == pytest.approx(0.5)
    assert top5(np.array([1e4, 0], dtype=np.float32), ["a", "b"])[0] == ("a", 1.0)
    with pytest.raises(UserError, match=r"2 classes.*1"):
        top5(np.zeros(2, dtype=np.float32), ["a"])
