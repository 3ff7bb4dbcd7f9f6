"""Predictions in chunks, by several processes and after an interruption, bit-identical; stored temperatures."""

import json
import shutil
import threading
from dataclasses import fields

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import assert_one_line_error, run_command, write_images, write_linear_bundle, write_made_up_engine
from torch.utils.data import Dataset

from deploy.runtimes.onnxruntime_engine import OnnxRuntimeEngine
from deploy.runtimes.temperature import read_temperature, store_temperature
from eval.measure.evaluate_split import Evaluation, _wait_for, evaluate
from eval.metrics.predictions import NotFinite, Predictions
from illama.bundle import FUSED_ONNX, TEMPERATURE
from illama.data.datasets import Transformed, open_data
from illama.errors import UserError
from illama.inference import predict, predict_chunks
from illama.manifest import Manifest
from illama.training.distributed import Processes

CLASSES = ["class0", "class1", "class2"]


def _same_bits(one, other):
    return all(
        np.array_equal(getattr(one, each.name), getattr(other, each.name))
        and getattr(one, each.name).dtype == getattr(other, each.name).dtype
        for each in fields(Predictions)
    )


@settings(deadline=None)
@given(st.data(), st.integers(1, 60), st.integers(2, 40), st.sampled_from([0.3, 1.0, 2.0]))
def test_any_split_concatenates_to_the_whole(data, images, classes, temperature):
    generator = np.random.default_rng(images * classes)
    logits = generator.integers(-3, 4, (images, classes)).astype(np.float32)  # with many ties
    logits[::2] += generator.normal(size=logits[::2].shape).astype(np.float32)
    labels = generator.integers(0, classes, images)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, images - 1)), max_size=5)) - {images})
    parts = [
        Predictions.of(*part, temperature) for part in zip(np.split(logits, cuts), np.split(labels, cuts), strict=True)
    ]
    whole = Predictions.of(logits, labels, temperature)
    assert _same_bits(Predictions.concatenate(parts), whole) and len(whole) == images
    order = np.argsort(-logits, axis=1, kind="stable")
    assert (whole.rank == (order == labels[:, None]).argmax(1)).all() and (whole.predicted == order[:, 0]).all()
    assert (whole.right == (logits.argmax(1) == labels)).all()


def test_what_is_kept_is_torch_s():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(300, 12, generator=generator) * 4, torch.randint(12, (300,), generator=generator)
    for temperature in (1.0, 0.6):
        kept = Predictions.of(logits.numpy(), labels.numpy(), temperature)
        scaled = logits.double() / temperature
        np.testing.assert_allclose(kept.log_likelihood, -F.cross_entropy(scaled, labels, reduction="none"))
        np.testing.assert_allclose(kept.confidence, scaled.softmax(1).amax(1))
        expected = (scaled.softmax(1) - F.one_hot(labels, 12)).square().sum(1)
        np.testing.assert_allclose(kept.brier, expected)


class Read(Dataset):
    """A split that records which images were read."""

    def __init__(self, split):
        self.split, self.indices = split, []

    def __len__(self):
        return len(self.split)

    def __getitem__(self, index):
        self.indices.append(index)
        return self.split[index]


class Task:
    """Two linear networks on 18 images, in chunks of 7 and calls of 3."""

    def __init__(self, folder):
        generator = np.random.default_rng(0)
        self.bundles = [
            write_linear_bundle(folder / name, generator.normal(size=(768, 3)) / 20, 16, CLASSES)
            for name in ("one", "two")
        ]
        self.images = write_images(folder / "images")
        self.models = {each.name: OnnxRuntimeEngine(each / "model.onnx").infer for each in self.bundles}
        self.transform = Manifest.read(self.bundles[0]).preprocessing.transform()
        self.split = Read(open_data(str(self.images)).test())

    def evaluate(self, work=None, models=None, **more):
        self.split.indices.clear()
        temperatures = more.pop("temperatures", {"two": 0.5})
        how = Evaluation(work, **{"batch": 3, "chunk": 7, "facts": {"data": "noise"}, **more})
        return evaluate(models or self.models, Transformed(self.split, self.transform), temperatures, how)


@pytest.fixture
def task(tmp_path):
    return Task(tmp_path)


def _equal(one, other):
    return one.keys() == other.keys() and all(
        _same_bits(one[name].plain, other[name].plain)
        and (one[name].scaled is other[name].scaled is None or _same_bits(one[name].scaled, other[name].scaled))
        for name in one
    )


def test_it_is_what_whole_logits_say(task, tmp_path):
    results = task.evaluate()
    assert task.split.indices == list(range(18))
    logits, labels = predict(task.models, task.split, task.transform, batch=3)
    assert list(results) == ["one", "two"] and results["one"].scaled is None
    for name, values in logits.items():
        np.testing.assert_array_equal(results[name].plain.predicted, values.argmax(1))
        np.testing.assert_allclose(results[name].plain.confidence, Predictions.of(values, labels).confidence, rtol=1e-5)
    np.testing.assert_allclose(results["two"].scaled.brier, Predictions.of(logits["two"], labels, 0.5).brier, rtol=1e-5)
    assert _equal(task.evaluate(workers=2), results)


def test_interrupted_it_goes_on_where_it_was(task, tmp_path):
    """Ctrl-C in the second of three chunks; then only the missing images are read."""
    whole, work, calls = task.evaluate(), tmp_path / "work", []
    work.mkdir()
    (work / ".run.json.draft-0123456789abcdef").touch()  # left by a process killed at the start

    def interrupted(images):
        calls.append(len(images))
        if sum(calls) > 10:
            raise KeyboardInterrupt
        return task.models["two"](images)

    with pytest.raises(KeyboardInterrupt):
        task.evaluate(work, {**task.models, "two": interrupted})
    assert sorted(path.name for path in work.iterdir()) == ["000000000.safetensors", "run.json"]
    kept = (work / "000000000.safetensors").stat().st_mtime_ns
    assert _equal(task.evaluate(work), whole) and task.split.indices == list(range(7, 18))
    assert (work / "000000000.safetensors").stat().st_mtime_ns == kept
    (work / "000000007.safetensors").unlink()
    assert _equal(task.evaluate(work), whole) and task.split.indices == list(range(7, 14))


def test_a_folder_of_another_evaluation_is_refused(task, tmp_path):
    work = tmp_path / "work"
    task.evaluate(work)
    for other, words in (
        ({"facts": {"data": "other"}}, "data"),
        ({"facts": {}}, "data"),
        ({"temperatures": {}}, "temperatures"),
        ({"batch": 4}, "batch"),
        ({"models": {"two": task.models["two"]}, "temperatures": {"two": 0.5}}, "models"),
    ):
        with pytest.raises(UserError, match=rf"\b{words}\b"):
            task.evaluate(work, **other)
    shutil.copyfile(work / "000000014.safetensors", work / "000000000.safetensors")  # 4 images in place of 7
    with pytest.raises(UserError, match=r"000000000.safetensors.*\b4\b.*\b7\b"):
        task.evaluate(work)
    (work / "000000000.safetensors").write_bytes(b"{")
    with pytest.raises(UserError, match=r"000000000\.safetensors"):
        task.evaluate(work)
    (work / "run.json").write_text("[1]")
    with pytest.raises(UserError, match=r"run\.json"):
        task.evaluate(work)
    with pytest.raises(UserError, match=str(task.images)):
        task.evaluate(task.images)
    with pytest.raises(ValueError, match="work"):
        task.evaluate(processes=Processes(0, 2, torch.device("cpu")))


def test_a_model_that_overflows_costs_no_other(task, overflow, tmp_path):
    """Nor does it if it overflows for one image, or if the run is resumed."""

    def overflows_once(images):
        logits = task.models["one"](images)
        logits[images[:, 0, 0, 0] == first] = np.nan
        return logits

    first = Transformed(task.split, task.transform)[9][0][0, 0, 0].numpy()
    broken = {"broken": OnnxRuntimeEngine(overflow / "model.onnx").infer, "once": overflows_once}
    for _ in range(2):
        results = task.evaluate(tmp_path / "work", {**task.models, **broken})
        assert results.pop("broken") == NotFinite(18, 18) and results.pop("once") == NotFinite(1, 18)
        assert _equal(results, task.evaluate())


def test_every_call_of_a_model_counts_as_progress(task):
    counts, images = [], Transformed(task.split, task.transform)
    total = len(images)
    models = dict.fromkeys("abc", lambda images: np.zeros((len(images), 3), np.float32))
    list(predict_chunks(models, images, [range(7), range(7, total)], batch=2, advance=counts.append))
    assert sum(counts) == total and len(counts) == 3 * (4 + -(-(total - 7) // 2)) and counts[0] < 2


def test_waiting_ends_when_no_chunk_comes(tmp_path):
    """Each new chunk restarts the wait; without one it ends."""
    paths = [tmp_path / str(index) for index in range(5)]
    timers = [threading.Timer(0.2 * index, path.touch) for index, path in enumerate(paths)]
    for timer in timers[:4]:
        timer.start()
    _wait_for(paths[:4], patience=0.5)
    with pytest.raises(UserError, match=r"0\.3 s.*1 of 5"):
        _wait_for(paths, patience=0.3)


def test_two_processes_give_what_one_does(task, tmp_path, run_here):
    store_temperature(task.bundles[1] / "model.onnx", 0.5, 512, "noise", "onnxruntime")
    arguments = [
        "eval/accuracy.py",
        *task.bundles,
        "--data",
        task.images,
        "--runtime",
        "onnxruntime",
        "--images",
        17,
        "--calibration-images",
        0,
    ]
    one = run_here(*arguments, "--out", tmp_path / "a")
    two = run_command(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        2,
        "--monitor-interval",
        0.1,
        *arguments,
        "--out",
        tmp_path / "b",
    )
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert one.stdout == two.stdout
    contents = [json.loads((tmp_path / out / "accuracy.json").read_text()) for out in "ab"]
    assert contents[0]["models"] == contents[1]["models"] and contents[1]["images"] == 17
    assert contents[1]["models"]["two"]["temperature"] == 0.5 and contents[1]["models"]["one"]["scaled"] is None


@pytest.fixture
def bundle(tmp_path):
    weights = np.random.default_rng(0).normal(size=(768, 3)) / 200
    return write_linear_bundle(tmp_path / "bundle", weights, 16, CLASSES)


def test_a_temperature_stays_with_its_weights(bundle, tmp_path):
    onnx = bundle / "model.onnx"
    assert read_temperature(onnx) is None
    store_temperature(onnx, 0.7, 512, "noise", "onnxruntime")
    assert read_temperature(onnx) == 0.7
    shutil.copyfile(onnx, bundle / FUSED_ONNX)
    assert read_temperature(bundle / FUSED_ONNX) is None
    store_temperature(bundle / FUSED_ONNX, 0.6, 512, "noise", "onnxruntime")
    store_temperature(onnx, 0.8, 256, "noise", "onnxruntime")
    assert (read_temperature(onnx), read_temperature(bundle / FUSED_ONNX)) == (0.8, 0.6)
    assert not list(bundle.glob(".*"))
    onnx.write_bytes(onnx.read_bytes() + b"\x00")
    assert read_temperature(onnx) is None and read_temperature(bundle / FUSED_ONNX) == 0.6
    for damage in ("{", "[]", '{"model.onnx": {}}', '{"model.onnx": 1}'):
        (bundle / TEMPERATURE).write_text(damage)
        with pytest.raises(UserError, match=r"temperature\.json"):
            read_temperature(onnx)
    with pytest.raises(UserError, match=r"nowhere\.onnx"):
        read_temperature(tmp_path / "nowhere.onnx")


@pytest.mark.parametrize("name", ["tensorrt-sm89-1.1.1/model.engine", "tensorrt.engine"])
def test_an_engine_has_that_of_its_graph(name, bundle):
    (bundle / "model.onnx").rename(bundle / FUSED_ONNX)
    engine = bundle / "engines" / name
    write_made_up_engine(engine)
    store_temperature(bundle / FUSED_ONNX, 0.6, 512, "noise", "onnxruntime")
    assert read_temperature(engine) == 0.6
    write_made_up_engine(engine, onnx_sha256="0" * 64)
    assert read_temperature(engine) is None


def test_predictions_are_calibrated_by_it(bundle, tmp_path, run_here):
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(photo)
    command = ["deploy/predict.py", photo, "--engine", bundle, "--runtime", "onnxruntime"]
    plain = run_here(*command)
    store_temperature(bundle / "model.onnx", 0.25, 512, "noise", "onnxruntime")
    calibrated = run_here(*command)
    assert "0.250" in calibrated.stdout and "0.250" not in plain.stdout
    image = Manifest.read(bundle).preprocessing.transform()(Image.open(photo))[None].numpy()
    logits = torch.from_numpy(OnnxRuntimeEngine(bundle / "model.onnx").infer(image))[0].double()
    for result, temperature in ((plain, 1), (calibrated, 0.25)):
        expected = (logits / temperature).softmax(0)
        order = expected.argsort(descending=True)
        shown = ", ".join(f"{CLASSES[index]} {expected[index]:.1%}" for index in order)
        assert f"photo.png: {shown} (" in result.stdout
    frames = run_here("deploy/camera.py", bundle, "--frame", "24x24", "--out", tmp_path / "camera")
    assert frames.returncode == 0, frames.stderr
    assert read_temperature(tmp_path / "camera" / "model.onnx") == 0.25
    (bundle / TEMPERATURE).write_text("{")
    assert_one_line_error(run_here(*command), "temperature.json")
