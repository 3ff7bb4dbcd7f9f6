"""Serving: a real Triton server and real test images over HTTP and gRPC, compared with the engine itself."""

import importlib.util
import io
import json
import math
import os
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import numpy_helper
from PIL import Image
from support import (
    ROOT,
    SMALL,
    assert_one_line_error,
    run_command,
    write_bundle,
    write_linear_bundle,
    write_made_up_engine,
)

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed: pip install 'tritonclient[http,grpc]'")
import serve_load
import serve_sizing
import tritonclient.grpc
import tritonclient.http
from google.protobuf import text_format
from serve_client import Client, Question, as_png, free_ports, is_wrong, read_questions
from serve_faults import judge
from serve_load import LoadOptions, load
from tritonclient.grpc.model_config_pb2 import ModelConfig as TritonConfig

import deploy.serving.health
import deploy.serving.server
from deploy.rewrites.camera_bundle import write_camera_bundle
from deploy.runtimes.image_input import ImageInput
from deploy.runtimes.open_engine import open_engine
from deploy.runtimes.recommended_runtime import recommend_runtime
from deploy.serve import ServeOptions, main
from deploy.serving.health import ServedRepository, UnhealthyError, live_backends
from deploy.serving.known_answer import KnownAnswer
from deploy.serving.repository import add_versions, name_models, write_repository
from deploy.serving.server import private_names, running_server
from deploy.serving.serving_options import ListenOptions, ServingOptions
from deploy.trt.record import EngineRecord
from illama import ILLaMA
from illama.bundle import CPU_ONNX, MANIFEST, SHIPPED
from illama.checkpoints.load import load_checkpoint
from illama.data.datasets import open_data
from illama.data.preprocessing import Preprocessing
from illama.errors import UserError
from illama.manifest import Manifest, Provenance
from illama.models.timm_vit import to_quantizable
from quant.export.onnx_export import export_onnx
from quant.export.write_bundle import Origin, quantize, write_graphs, write_quantized
from quant.schemes.scheme import resolve, shipped_scheme

INSTALLED = shutil.which("tritonserver") or importlib.util.find_spec("pytriton")
needs_server = pytest.mark.skipif(not INSTALLED, reason="no tritonserver: pip install --no-deps nvidia-pytriton")
CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    """A bundle of the shipped checkpoint."""
    folder = tmp_path_factory.mktemp("bundles") / "clothes"
    folder.mkdir()
    shutil.copy(SHIPPED / MANIFEST, folder)
    export_onnx(load_checkpoint(SHIPPED).model, folder / CPU_ONNX, "plain")
    return folder


@pytest.fixture(scope="module")
def other_clothes(clothes):
    """The same network with another last bias, so that its answers differ."""
    folder = shutil.copytree(clothes, clothes.with_name("other"))
    graph = onnx.load(folder / CPU_ONNX)
    biases = [tensor for tensor in graph.graph.initializer if list(tensor.dims) == [10]]
    biases[0].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(biases[0])[::-1] * 9, biases[0].name))
    onnx.save(graph, folder / CPU_ONNX)
    return folder


@pytest.fixture(scope="module")
def questions(clothes):
    return read_questions(open_data("fashion-mnist").test(), 64, clothes)


def _command(listen, *arguments):
    ports = ("--http-port", listen.http_port, "--grpc-port", listen.grpc_port, "--metrics-port", listen.metrics_port)
    return [sys.executable, "deploy/serve.py", *map(str, arguments), "--run", *map(str, ports)]


@contextmanager
def started(log, *arguments):
    """Runs the command as a user does; yields (where it listens, its process) when its server is ready."""
    listen = free_ports()
    with log.open("wb") as errors:
        process = subprocess.Popen(
            _command(listen, *arguments),
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=errors,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        assert any(line.startswith("ready:") for line in process.stdout), log.read_text()
        assert "no authentication" in process.stdout.readline()
        yield listen, process
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def served(log, *arguments):
    """Yields where a server listens; then sends Ctrl-C, after which it must have ended without an error."""
    with started(log, *arguments) as (listen, process):
        yield listen
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert (process.returncode, output.strip()) == (0, "stopped")
        assert "Traceback" not in log.read_text()
        with pytest.raises(urllib.error.URLError, match="refused"):
            urllib.request.urlopen(f"http://127.0.0.1:{listen.http_port}/v2/health/live")


@pytest.fixture(scope="module")
def server(clothes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    options = ("--name", "served", "--out", folder / "models", "--poll-seconds", 1)
    with served(folder / "log", clothes, *options) as listen:
        yield listen, folder / "models"


def _padded(files):
    longest = max(map(len, files))
    return np.stack([np.frombuffer(file.ljust(longest, b"\0"), np.uint8) for file in files])


def _infer(protocol, listen, tensor, model="served", version="", name="image", returned="logits", **output):
    """Returns the logits, classes or features of an answer over "http" or "grpc"."""
    triton, port = {"http": (tritonclient.http, listen.http_port), "grpc": (tritonclient.grpc, listen.grpc_port)}[
        protocol
    ]
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        request = triton.InferInput(name, tensor.shape, "UINT8" if tensor.dtype == np.uint8 else "FP32")
        request.set_data_from_numpy(tensor)
        outputs = [triton.InferRequestedOutput(returned, **output)]
        return client.infer(model, [request], model_version=version, outputs=outputs).as_numpy(returned)


@needs_server
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_the_server_gives_the_engines_logits(protocol, server, questions):
    for question in questions[:8]:
        np.testing.assert_array_equal(_infer(protocol, server[0], _padded([question.file]))[0], question.logits)


@needs_server
def test_several_files_in_a_request_and_the_classes_by_name(server, questions):
    files, expected = [q.file for q in questions[:32]], np.stack([q.logits for q in questions[:32]])
    np.testing.assert_allclose(_infer("grpc", server[0], _padded(files)), expected, atol=0.02 * np.abs(expected).max())
    best = _infer("http", server[0], _padded(files), class_count=1).ravel()
    named = [CLASSES.index(answer.decode().split(":")[2]) for answer in best]
    assert not any(is_wrong(np.eye(10)[index], logits) for index, logits in zip(named, expected, strict=True))


@needs_server
def test_a_jpeg_of_another_size_is_preprocessed_as_in_the_bundle(server, clothes):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)).save(file, "JPEG")
    transform = Manifest.read(clothes).preprocessing.transform()
    image = transform(Image.open(file).convert("RGB")).numpy()
    expected = open_engine(clothes / CPU_ONNX).infer(image[None])
    url = f"http://127.0.0.1:{server[0].http_port}/v2/models/served/infer"
    post = urllib.request.Request(url, file.getvalue(), {"Inference-Header-Content-Length": "0"})
    with urllib.request.urlopen(post) as answer:  # as curl --data-binary sends it
        body, head = answer.read(), int(answer.headers["Inference-Header-Content-Length"])
    np.testing.assert_array_equal(np.frombuffer(body[head:], np.float32), expected[0])
    np.testing.assert_array_equal(_infer("http", server[0], image[None], "served-network", name="images"), expected)


@needs_server
def test_a_command_asks_the_server(server, clothes, questions, run_here, tmp_path):
    (tmp_path / "a.png").write_bytes(questions[0].file)
    url = f"http://127.0.0.1:{server[0].http_port}/v2/models/served"
    remote = run_here("deploy/predict.py", tmp_path / "a.png", "--server", url)
    local = run_here("deploy/predict.py", tmp_path / "a.png", "--engine", clothes)
    assert remote.returncode == local.returncode == 0, remote.stderr + local.stderr
    ours, theirs = (each.stdout.splitlines()[-1].rpartition(" (")[0] for each in (local, remote))
    assert ours == theirs and "%" in ours
    (tmp_path / "b.png").write_text("no picture")
    for file, address in (("b.png", url), ("a.png", url.replace("served", "other")), ("a.png", "http://127.0.0.1:1")):
        assert_one_line_error(run_here("deploy/predict.py", tmp_path / file, "--server", address), "")


@needs_server
def test_an_invalid_image_does_not_affect_others(server, questions):
    for junk in (b"no picture", questions[0].file[:100]):
        with pytest.raises(tritonclient.grpc.InferenceServerException, match="number 1"):
            _infer("grpc", server[0], _padded([questions[0].file, junk]))
    np.testing.assert_array_equal(_infer("grpc", server[0], _padded([questions[0].file]))[0], questions[0].logits)


SCHEMES = ("int8", "fp8", "w4a8-dynamic")  # in OpenVINO, ONNX Runtime, and PyTorch


def _schemes_of_a_color_network(folder):
    """Returns bundles of one RGB network, each with another scheme."""
    torch.manual_seed(0)
    model, images = ILLaMA(SMALL).eval(), [torch.randn(8, 3, 32, 32)]
    origin = Origin(Preprocessing.imagenet(32), ("a", "b", "c"), Provenance())
    folder.mkdir()
    return [
        write_quantized(folder / name, quantize(model, plan, images), plan, origin, images)
        for name in SCHEMES
        for plan in [resolve(shipped_scheme(name), model)]
    ]


def _timm_bundle(folder, classes=("a", "b", "c")):
    """A bundle of a classifier, or of the features of all tokens if there are no classes."""
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=len(classes), depth=2)
    if not classes:
        vit.reset_classifier(0, "")
    origin = Origin(Preprocessing.imagenet(32), classes, Provenance())
    return write_graphs(folder, to_quantizable(vit.eval()), origin, (CPU_ONNX,), [])


def _noise_images(height, width, count, seed=0):
    """Returns PNG files of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return [as_png(Image.fromarray(each)) for each in pixels]


def _post(listen, model, file):
    """Returns (HTTP status, logits or message) of one file, sent like curl --data-binary."""
    url = f"http://127.0.0.1:{listen.http_port}/v2/models/{model}/infer"
    headers = {"Inference-Header-Content-Length": "0", "Content-Type": "application/octet-stream"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, file, headers)) as answer:
            body, head = answer.read(), int(answer.headers["Inference-Header-Content-Length"])
            return answer.status, np.frombuffer(body[head:], np.float32)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def _assert_close(actual, expected):
    """Within the difference that another batch size causes in bfloat16."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=0.02 * np.abs(expected).max())


def _assert_answered(listen, model, bundle):
    """The answers to one file and to several in one request must be those of the bundle."""
    manifest, choice = Manifest.read(bundle), recommend_runtime(bundle)
    image_input = ImageInput.of(manifest)
    files = _noise_images(*(image_input.frame or (40, 60))[:2], 3)
    inputs = np.stack([image_input.read(io.BytesIO(file), str) for file in files])
    expected = open_engine(choice.file, choice.runtime).infer(inputs)
    status, logits = _post(listen, model, files[0])
    assert status == 200, logits
    _assert_close(logits, expected[0].reshape(-1))
    _assert_close(_infer("grpc", listen, _padded(files), model, returned=manifest.output), expected)


def _assert_the_command_saves_features(listen, bundle, folder):
    (photo := folder / "photo.png").write_bytes(_noise_images(40, 60, 1)[0])
    url = f"http://127.0.0.1:{listen.http_port}/v2/models/features"
    result = run_command("deploy/predict.py", photo, "--server", url, "--save", folder / "features.npy")
    assert result.returncode == 0 and "probabilities" not in result.stdout, result.stderr
    image = ImageInput.of(Manifest.read(bundle)).read(str(photo), str)
    _assert_close(np.load(folder / "features.npy"), open_engine(bundle / CPU_ONNX, "onnxruntime").infer(image[None]))


def _assert_bad_requests_do_not_affect_others(listen, bundle):
    """Each of several simultaneous requests, which the server batches, must get its own answer or its own error."""
    image_input = ImageInput.of(Manifest.read(bundle))
    (good,) = _noise_images(16, 16, 1)
    expected = open_engine(bundle / CPU_ONNX).infer(image_input.read(io.BytesIO(good), str)[None])[0]
    white, large = as_png(Image.new("RGB", (16, 16), "white")), as_png(Image.new("RGB", (101, 100)))
    kinds = {good: 200, b"no picture": 400, b"": 400, white: 500, large: 400, good + bytes(10**5): 400}
    files = [file for file in kinds for _ in range(8)]
    np.random.default_rng(0).shuffle(files)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda file: _post(listen, bundle.name, bytes(file)), files))
    for file, (status, answer) in zip(files, answers, strict=True):
        assert status == kinds[bytes(file)], answer
        if status == 200:
            _assert_close(answer, expected)
    assert "finite" in _post(listen, bundle.name, white)[1]


def _backend(version):
    """Returns (process id, path of model.py) of the Python backend of a version of a model."""
    return next(each for each in live_backends() if each[1].parent.resolve() == version.resolve())


def _is_live(version):
    return any(path.parent.resolve() == version.resolve() for _, path in live_backends())


def _private_name(version):
    """Returns the name of the temporary files of the server that runs a version of a model."""
    return _backend(version)[1].parents[3].name


def _probe(repository, listen):
    return run_command("deploy/probe.py", repository, "--url", f"http://127.0.0.1:{listen.http_port}")


@needs_server
def test_every_kind_of_bundle_is_served_and_a_dead_backend_ends_the_server(tmp_path):
    schemes = _schemes_of_a_color_network(tmp_path / "schemes")
    color_bundles = {"timm": _timm_bundle(tmp_path / "timm"), "camera": tmp_path / "camera"}
    color_bundles["features"] = _timm_bundle(tmp_path / "features", ())
    write_camera_bundle(schemes[0], (40, 50, 3), color_bundles["camera"])
    # Its logits are finite for noise and for the known answer, whose mean pixel is 0, and infinite for white.
    linear = write_linear_bundle(tmp_path / "linear", np.full((768, 3), 1e36) * [1, 0.5, 0.1], 16, ["a", "b", "c"])
    out, log = tmp_path / "with space", tmp_path / "log"
    options = ServingOptions(live_versions=3, max_megapixels=0.01, max_file_mb=0.1, queue_delay_us=20_000)
    singles = {name: [bundle] for name, bundle in {**color_bundles, "linear": linear}.items()}
    write_repository(out, {"color": schemes, **singles}, options)
    with started(log, "--out", out) as (listen, process):
        for model, bundle in {**color_bundles, "color": schemes[-1]}.items():
            _assert_answered(listen, model, bundle)
        _assert_the_command_saves_features(listen, color_bundles["features"], tmp_path)
        images = torch.randn(2, 3, 32, 32).numpy()
        for version, bundle in enumerate(schemes, 1):
            choice = recommend_runtime(bundle)
            expected = open_engine(choice.file, choice.runtime).infer(images)
            _assert_close(_infer("grpc", listen, images, "color-network", str(version), "images"), expected)
        _assert_bad_requests_do_not_affect_others(listen, linear)
        assert "40x50" in _post(listen, "camera", _noise_images(50, 40, 1)[0])[1]
        assert _probe(out, listen).returncode == 0
        other = shutil.copytree(out, tmp_path / "other")
        known = KnownAnswer.read(out / "timm-network" / "1" / "known_answer.json")
        replace(known, logits=known.logits[::-1]).write(other / "timm-network" / "1" / "known_answer.json")
        with pytest.raises(UnhealthyError, match="timm"):
            ServedRepository(listen.url, other).check_answers()
        served = ServedRepository(listen.url, out)
        served.check()
        out.rename(tmp_path / "away")  # as if it was replaced: the server has what it loaded
        served.check()
        (tmp_path / "away").rename(out)
        name = _private_name(out / "timm-network" / "1")
        os.kill(_backend(out / "color-network" / "2")[0], signal.SIGKILL)
        assert process.wait(60) == 2
        assert "color-network" in log.read_text().splitlines()[-1]
        assert not _leftovers(name)
    assert _probe(out, listen).returncode == 1


def test_a_probe_fails_without_a_model_and_for_another_server(tmp_path):
    """Each error is one line."""
    (tmp_path / "rgb").mkdir()
    (tmp_path / "rgb" / "config.pbtxt").touch()
    with socketserver.TCPServer(("127.0.0.1", 0), _OtherServer) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_address[1]}"
        for folder, address in ((tmp_path, url), (tmp_path, "nowhere"), (tmp_path / "rgb", url)):
            result = run_command("deploy/probe.py", folder, "--url", address)
            assert result.returncode == 1 and len(result.stderr.splitlines()) == 1, result.stderr
        served = ServedRepository(url, tmp_path)
        for _OtherServer.answer in (b"<html>", b"5", b"[1]", b'[{"state": "READY"}]', b'{"status": "ok"}'):
            _OtherServer.answer = b"HTTP/1.0 200 OK\r\n\r\n" + _OtherServer.answer
            with pytest.raises(UnhealthyError, match="Triton"):
                served.check_models()
        other.shutdown()


class _OtherServer(socketserver.StreamRequestHandler):
    answer = b"SSH-2.0\n"

    def handle(self):
        while self.rfile.readline().strip():
            pass
        self.wfile.write(self.answer)


@needs_server
def test_many_clients_get_all_answers_and_errors_are_counted(server, questions):
    url = f"127.0.0.1:{server[0].grpc_port}"
    answers = load(url, questions, 8, 1.0)
    assert (answers.lost, answers.wrong) == (0, 0)
    assert len(answers.seconds) > 20
    client = Client(url)
    client.ask(Question(b"no picture", questions[0].logits))
    client.ask(Question(questions[0].file, np.roll(questions[0].logits, 1)))
    assert (client.answers.lost, client.answers.wrong) == (1, 1)


@needs_server
def test_a_busy_server_is_healthy_and_one_that_hangs_is_not(server, questions, monkeypatch):
    listen, repository = server
    served = ServedRepository(listen.url, repository, timeout=0.5)
    file = as_png(Image.new("L", (4000, 4000)))
    with ThreadPoolExecutor() as pool:
        large = pool.submit(_infer, "grpc", listen, _padded([file] * 32))
        time.sleep(0.2)
        start = time.monotonic()
        served.check()
        assert time.monotonic() - start > 0.5 and not large.done()
        monkeypatch.setattr(deploy.serving.health, "BUSY_SECONDS", 0.5)  # no request has finished for longer
        with pytest.raises(UnhealthyError, match="served"):
            served.check()
        assert not large.done()
        large.result()
    served.check()
    process, _ = _backend(repository / "served-network" / "1")
    os.kill(process, signal.SIGSTOP)
    try:
        with pytest.raises(UnhealthyError, match="served"):
            served.check()
    finally:
        os.kill(process, signal.SIGCONT)
    assert len(_infer("grpc", listen, _padded([questions[0].file]))) == 1


@needs_server
def test_an_invalid_request_does_not_end_the_server(server):
    """Triton 2.51 stores a request's JSON on the stack."""
    listen, _ = server
    for body in (b"x" * 12_000_000, b"[" * 400_000):
        request = urllib.request.Request(f"{listen.url}/v2/models/served/infer", body)
        with pytest.raises(urllib.error.HTTPError, match="HTTP Error"):
            urllib.request.urlopen(request)
    region = {"key": "/illama", "offset": 0, "byte_size": 1}
    request = urllib.request.Request(
        f"{listen.url}/v2/systemsharedmemory/region/x/register", json.dumps(region).encode()
    )
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request)


@needs_server
def test_versions_are_added_and_deleted_while_the_server_runs(server, clothes, other_clothes, questions):
    listen, repository = server
    main(ServeOptions(bundles=(other_clothes,), name="served", out=repository, add=True, poll_seconds=1))
    image = _padded([questions[0].file])
    new = read_questions(open_data("fashion-mnist").test(), 1, other_clothes)[0].logits
    assert not np.allclose(new, questions[0].logits)

    def answered_with(expected):
        end = time.monotonic() + 60
        while not np.array_equal(_infer("grpc", listen, image)[0], expected) and time.monotonic() < end:
            time.sleep(0.2)
        return np.array_equal(_infer("grpc", listen, image)[0], expected)

    assert answered_with(new)
    tensor = np.zeros((1, 1, 28, 28), np.float32)
    for version, bundle in (("1", clothes), ("2", other_clothes)):
        answer = _infer("grpc", listen, tensor, "served-network", version, "images")
        np.testing.assert_array_equal(answer, open_engine(bundle / CPU_ONNX).infer(tensor))
    served = ServedRepository(listen.url, repository)
    served.check()
    shutil.rmtree(repository / "served-network" / "2")
    served.check_answers()  # while it is still loaded
    assert answered_with(questions[0].logits)
    served.check()


def _python_model(repository, name, code):
    """Writes a model for Triton's Python backend that consists of the code."""
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "1" / "model.py").write_text(code)
    (repository / name / "config.pbtxt").write_text(
        f'name: "{name}" backend: "python" max_batch_size: 1 instance_group [{{kind: KIND_CPU}}] '
        'input [{name: "x" data_type: TYPE_FP32 dims: [1]}] output [{name: "y" data_type: TYPE_FP32 dims: [1]}]'
    )
    return repository


@needs_server
@pytest.mark.parametrize("polled", [0, 1])
def test_a_model_that_cannot_be_loaded_ends_the_start_with_its_reason(polled, tmp_path):
    models = _python_model(tmp_path / "models", "broken", "raise OSError('there is no disk')\n")
    with (
        (tmp_path / "log").open("wb") as log,
        pytest.raises(UserError, match=r"broken.*there is no disk"),
        running_server(models, replace(free_ports(), poll_seconds=polled), log),
    ):
        pass


@needs_server
def test_a_model_with_an_invalid_config(tmp_path):
    (tmp_path / "models" / "broken").mkdir(parents=True)
    (tmp_path / "models" / "broken" / "config.pbtxt").write_text("not a config")
    with (
        (tmp_path / "log").open("wb") as log,
        pytest.raises(UserError, match="broken"),
        running_server(tmp_path / "models", free_ports(), log),
    ):
        pass


def test_ports_in_use_and_invalid_addresses_are_rejected():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="--grpc-port"):
        listen = replace(free_ports(), grpc_port=taken.getsockname()[1])
        with running_server(Path(), listen):
            pass
    for wrong in ({"grpc_port": 8000}, {"http_port": 0}, {"http_port": 1 << 16}, {"address": "localhost"}):
        with pytest.raises(UserError, match=r"--http-port|--address"), running_server(Path(), ListenOptions(**wrong)):
            pass


def _leftovers(name):
    return [*Path("/dev/shm").glob(f"{name}*"), *Path(tempfile.gettempdir()).glob(f"{name}*")]


@needs_server
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_is_starting_ends_with_its_command(end, tmp_path):
    """It prints one line if it is terminated. If it is killed, the next start deletes its temporary files."""
    models = _python_model(tmp_path / "models", "slow", "import time\ntime.sleep(600)\n")
    (models / "repository.json").write_text('{"format": 4}')
    log = tmp_path / "log"
    with log.open("wb") as errors:
        process = subprocess.Popen(_command(free_ports(), "--out", models), cwd=ROOT, stdout=errors, stderr=errors)
    version = models / "slow" / "1"
    while not _is_live(version):
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    name = _private_name(version)
    assert _leftovers(name)
    process.send_signal(end)
    assert process.wait(60) == (0 if end == signal.SIGTERM else -end)
    if end == signal.SIGTERM:
        assert log.read_text().splitlines()[-1] == "stopped"
    until = time.monotonic() + 60
    while _is_live(version) and time.monotonic() < until:
        time.sleep(0.1)
    assert not _is_live(version)
    with private_names() as theirs, private_names():
        assert not _leftovers(name)
        assert len(_leftovers(theirs.name)) == 2  # the folder and the lock of a running server


@pytest.mark.parametrize(("end", "bundles", "status"), [(signal.SIGTERM, ["--run"], 0), (signal.SIGINT, ["x"], 130)])
def test_signals_stop_a_command_that_is_still_importing(end, bundles, status, tmp_path):
    command = [sys.executable, "-X", "importtime", "deploy/serve.py", "--out", tmp_path, *bundles]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert any(line.endswith(" numpy\n") for line in process.stderr)
        process.send_signal(end)
        output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (status, "stopped\n")


def test_tritonserver_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(deploy.serving.server.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="nvidia-pytriton"), running_server(tmp_path, ListenOptions()):
        pass


@pytest.fixture(scope="module")
def small_onnx(tmp_path_factory):
    """A small bundle with a model.onnx, and a mock engine with its record."""
    folder = write_bundle(tmp_path_factory.mktemp("small") / "small", SMALL)
    torch.manual_seed(0)
    export_onnx(ILLaMA(SMALL), folder / CPU_ONNX, "plain")
    write_made_up_engine(folder / "engines" / "tensorrt.engine")
    return folder


@pytest.fixture
def small(small_onnx, tmp_path):
    return Path(shutil.copytree(small_onnx, tmp_path / "small"))


def _configs(repository):
    return {
        path.parent.name: text_format.Parse(path.read_text(), TritonConfig())
        for path in repository.glob("*/config.pbtxt")
    }


def test_a_repository_for_gpus_is_valid_and_has_the_options(small, tmp_path):
    """Parsed as Triton does; running it would need a GPU."""
    main(
        ServeOptions(
            bundles=(small,),
            device="gpu",
            out=tmp_path / "models",
            max_batch=64,
            preferred_batches=(8, 64),
            queue_delay_us=500,
            instances=2,
            preprocess_instances=4,
            version=7,
        )
    )
    configs = _configs(tmp_path / "models")
    assert configs.keys() == {"small", "small-preprocess", "small-network"}
    assert all(config.name == name and config.max_batch_size == 64 for name, config in configs.items())
    network, kinds = configs["small-network"], TritonConfig().instance_group.add()
    assert network.platform == "tensorrt_plan" and not network.backend
    assert (network.input[0].name, list(network.input[0].dims)) == ("images", [3, 32, 32])
    assert (network.output[0].name, list(network.output[0].dims)) == ("logits", [3])
    assert (network.instance_group[0].kind, network.instance_group[0].count) == (kinds.KIND_GPU, 2)
    assert list(network.dynamic_batching.preferred_batch_size) == [8, 64]
    assert network.dynamic_batching.max_queue_delay_microseconds == 500
    assert [sample.batch_size for sample in network.model_warmup] == [1, 64]
    preprocess = configs["small-preprocess"].instance_group[0]
    assert (preprocess.kind, preprocess.count) == (kinds.KIND_CPU, 4)
    steps = configs["small"].ensemble_scheduling.step
    assert [step.model_name for step in steps] == ["small-preprocess", "small-network"]
    version = tmp_path / "models" / "small-network" / "7"
    assert (version / "model.plan").read_bytes() == (small / "engines" / "tensorrt.engine").read_bytes()
    assert (tmp_path / "models" / "small" / "labels.txt").read_text() == "class0\nclass1\nclass2\n"


def test_an_engine_that_does_not_match_its_record_is_not_served(small, tmp_path):
    gpu, engine = ServingOptions(device="gpu"), small / "engines" / "tensorrt.engine"

    def assert_rejected(match, options=gpu):
        with pytest.raises(UserError, match=match):
            write_repository(tmp_path / "models", {"small": [small]}, options)

    assert_rejected("1 to 64.*1 to 65", ServingOptions(device="gpu", max_batch=65))
    record = EngineRecord.read(engine)
    changes = {
        "8 to 64": {"batch": (8, 8, 64)},
        "--weight-stripped": {"options": {**record.options, "weight_stripped": True}},
        "{'images': ..uint8'": {"inputs": {"images": ["uint8", [-1, 480, 640, 3]]}},
        r"tensorrt\.json.*outputs": {"outputs": {"logits": ["half", [-1, 3]]}},
        "{'logits': ..float'": {"outputs": {"logits": ["float", [-1, 3, 32, 32]]}},
    }
    for match, values in changes.items():
        replace(record, **values).write(engine)
        assert_rejected(match)
    record.write(engine)
    values = json.loads(engine.with_suffix(".json").read_text())
    engine.with_suffix(".json").write_text(json.dumps({**values, "inputs": {}}))
    assert_rejected(r"tensorrt\.json.*0 inputs")
    engine.write_bytes(b"another")
    record.write(engine)
    assert_rejected(r"SHA-256.*tensorrt\.json")
    engine.with_suffix(".json").write_text("{}")
    assert_rejected(r"tensorrt\.json")
    engine.unlink()
    engine.with_suffix(".json").unlink()
    assert_rejected("small.*deploy/build.py")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_bundles_that_cannot_be_served(small, tmp_path):
    out = tmp_path / "models"

    def assert_rejected(match, *bundles, **more):
        with pytest.raises(UserError, match=match):
            main(ServeOptions(bundles=bundles, out=out, **more))

    assert_rejected("--out")
    assert_rejected("models", small, add=True)
    assert_rejected("--version", small, version=0)
    manifest = json.loads((small / MANIFEST).read_text())
    (small / MANIFEST).write_text(json.dumps({**manifest, "classes": ["one", "two"]}))
    assert_rejected("3 classes.* 2", small)
    (small / MANIFEST).write_text(json.dumps({**manifest, "preprocessing": {"size": [32, 32]}}))
    assert_rejected("preprocessing", small)
    (small / MANIFEST).write_text(json.dumps(manifest))
    graph = onnx.load(small / CPU_ONNX)
    shape = numpy_helper.from_array(np.array([-1, 3, 1, 1]), "map_shape")
    graph.graph.initializer.append(shape)
    graph.graph.node[-1].output[0] = "flat"
    graph.graph.node.append(onnx.helper.make_node("Reshape", ["flat", "map_shape"], ["logits"]))
    graph.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("logits", 1, ["batch", 3, 1, 1]))
    onnx.save(graph, small / CPU_ONNX)
    assert_rejected(r"\(3, 1, 1\)", small)
    (small / CPU_ONNX).write_bytes(b"not a graph")
    assert_rejected(r"model\.onnx", small)
    (small / CPU_ONNX).unlink()
    assert not out.exists()
    out.mkdir()
    (out / "mine").write_text("in the way")
    assert_rejected("models", small)
    assert_one_line_error(run_command("deploy/serve.py", small, "--out", tmp_path / "new"), "model.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "small"]
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_options_that_are_rejected():
    with pytest.raises(UserError, match="--preferred-batches"):
        ServingOptions(preferred_batches=(64,), max_batch=32)
    with pytest.raises(UserError, match="instances"):
        ServingOptions(preprocess_instances=0)
    with pytest.raises(UserError, match="--device gpu"):
        ServingOptions(runtime="tensorrt_rtx")
    with pytest.raises(UserError, match="versions"):
        ServingOptions(live_versions=1 << 31)
    for limit in ({"max_megapixels": 179}, {"max_megapixels": 1e-7}, {"max_file_mb": float("inf")}, {"max_file_mb": 0}):
        with pytest.raises(UserError, match="--max-megapixels"):
            ServingOptions(**limit)


def test_versions_of_a_model_and_those_that_are_rejected(small, tmp_path):
    out, options = tmp_path / "models", ServingOptions()
    write_repository(out, {"m": [small, small]}, options)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="2 of m"):
        add_versions(out, {"m": [small]}, options, 2)
    with pytest.raises(UserError, match=r"config\.pbtxt"):
        add_versions(out, {"m": [small]}, ServingOptions(max_batch=4))
    with pytest.raises(UserError, match="'other'"):
        add_versions(out, {"other": [small]}, options)
    manifest = json.loads((small / MANIFEST).read_text())
    (small / MANIFEST).write_text(json.dumps({**manifest, "classes": ["x", "y", "z"]}))
    with pytest.raises(UserError, match=r"labels\.txt"):
        add_versions(out, {"m": [small]}, options)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (small / MANIFEST).write_text(json.dumps(manifest))
    record = (out / "repository.json").read_text()
    (out / "repository.json").write_text(json.dumps({"command": "of an earlier version"}))
    with pytest.raises(UserError, match="models"):
        add_versions(out, {"m": [small]}, options)
    with pytest.raises(UserError, match="models"):
        main(ServeOptions(out=out, run=True))
    (out / "repository.json").write_text(record)
    assert add_versions(out, {"m": [small]}, options) == {"m": [3]}
    assert (out / "m-network" / "3" / CPU_ONNX).read_bytes() == (small / CPU_ONNX).read_bytes()


def test_names_of_models():
    assert name_models((Path("a/int8"), Path("a/fp8")), None).keys() == {"int8", "fp8"}
    assert name_models((Path("a/int8"), Path("b/int8")), "m") == {"m": (Path("a/int8"), Path("b/int8"))}
    with pytest.raises(UserError, match="--name"):
        name_models((Path("a/int8"), Path("b/int8")), None)
    with pytest.raises(UserError, match="'m-network'"):
        name_models((Path("m"), Path("m-network")), None)
    with pytest.raises(UserError, match=r"'\.\./m'"):
        name_models((Path("m"),), "../m")
    with pytest.raises(UserError, match="--name"):
        name_models((Path("m"),), "m" * 200)


def test_png_files_become_the_inputs_of_the_evaluation():
    test, transform = open_data("fashion-mnist").test(), open_data("fashion-mnist").preprocessing(28, 1).transform()
    for index in range(0, len(test), 500):
        image = Image.open(io.BytesIO(as_png(test[index][0]))).convert("RGB")
        torch.testing.assert_close(transform(image), transform(test[index][0]), rtol=0, atol=0)


def test_number_of_machines_for_a_load(tmp_path):
    row = {"clients": 4, "p99_ms": 20.0, "server_cpu_ms": 3.0}
    content = {
        "rows": [row, {**row, "p99_ms": 90.0, "server_cpu_ms": 1.0}],
        "memory_gib": 1.0,
        "machine": {"cpu": "a processor", "cores": 4},
    }
    (tmp_path / "m.json").write_text(json.dumps(content))

    def machines(p99, measured=tmp_path / "m.json"):
        serve_sizing.main(serve_sizing.SizingOptions(measured, images_per_second=1000, p99_ms=p99, out=tmp_path))
        return json.loads((tmp_path / "serve-sizing.json").read_text())["machines"]

    assert machines(50) == 3  # 1000 x 3 ms are 3 cores, 4 cores at 60% are 2.4: two machines, and one as a reserve
    assert machines(100) == 2
    with pytest.raises(UserError, match="p99"):
        machines(10)
    with pytest.raises(UserError, match=r"README\.md"):
        machines(10, ROOT / "README.md")
    (tmp_path / "coreless.json").write_text(json.dumps({**content, "machine": {"cpu": "a processor"}}))
    with pytest.raises(UserError, match=r"coreless\.json"):
        machines(50, tmp_path / "coreless.json")
    with pytest.raises(UserError, match="--busy"):
        serve_sizing.main(serve_sizing.SizingOptions(tmp_path / "m.json", images_per_second=math.inf))


def test_every_request_is_counted_once_when_some_fail():
    """Requests 0 and 5 are broken."""
    right, wrong = np.array([0.0, 9.0]), np.array([9.0, 0.0])
    refused, unavailable = (
        tritonclient.grpc.InferenceServerException("", status=f"StatusCode.{status}")
        for status in ("INVALID_ARGUMENT", "UNAVAILABLE")
    )
    answers = [refused, right, wrong, unavailable, refused, right, right]
    faults = judge([Question(b"", right)] * 7, answers, 1.0, 2.0)
    assert (faults.good, faults.answered, faults.wrong, faults.lost) == (5, 2, 1, 1)
    assert (faults.broken, faults.refused, faults.broken_lost, faults.mistaken) == (2, 1, 0, 2)


def test_loads_that_are_rejected(clothes):
    for values in ({"clients": ()}, {"clients": (0,)}, {"images": 0}, {"seconds": math.inf}):
        with pytest.raises(UserError, match="--clients"):
            LoadOptions(bundle=clothes, **values)
    with pytest.raises(UserError, match="--faults"):
        LoadOptions(bundle=clothes, faults=-1)
    with pytest.raises(UserError, match="--device gpu"):
        LoadOptions(bundle=clothes, device="gpu")


def test_a_load_that_fails_keeps_the_servers_log(clothes, tmp_path, monkeypatch):
    program = tmp_path / "bin" / "tritonserver"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho no memory\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    with pytest.raises(UserError, match=r"status 3.*out/clothes\.log"):
        serve_load.main(LoadOptions(bundle=clothes, images=1, out=tmp_path / "out"))
    assert (tmp_path / "out" / "clothes.log").read_text() == "no memory\n"
