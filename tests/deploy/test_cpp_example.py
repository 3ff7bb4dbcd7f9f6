"""examples/cpp: preprocessing equal to that in Python, errors, and a real build if TensorRT's headers are installed."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT, assert_one_line_error

from illama.bundle import GOLDEN
from illama.data.preprocessing import Preprocessing
from illama.golden_answers import GoldenAnswers, GoldenFacts, WrongAnswerError

SOURCE = ROOT / "examples" / "cpp"
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="C++ example not compiled: g++ is not installed")

HARNESS = r"""
#include <cstdio>
#include "golden.hpp"
int main(int count, char** arguments) {
    try {
        if (count == 4) {  // GOLDEN BATCH LOGITS: the input of the first images, and the check of the logits
            const Golden golden = read_golden(arguments[1]);
            const std::size_t batch = std::stoul(arguments[2]);
            for (std::size_t i = 0; i < std::min(batch, golden.images.size()); ++i) {
                if (golden.labels.mean.empty()) {
                    for (const int value : golden.images[i].pixels) std::printf("%d\n", value);
                } else {
                    for (const float value : normalize(golden.images[i], golden.labels)) std::printf("%.9g\n", value);
                }
            }
            std::istringstream words(read_file(arguments[3]));
            std::vector<float> logits;
            for (std::string word; words >> word;) logits.push_back(std::stof(word));
            check_logits(golden, logits, batch);
            return 0;
        }
        const Labels labels = read_labels(arguments[1]);
        for (const float value : normalize(read_image(arguments[2]), labels)) std::printf("%.9g\n", value);
        for (const auto& [index, probability] : top({0.5f, 3.0f, -1.0f, 3.0f}, 3)) {
            std::fprintf(stderr, "%s %.6f\n", labels.classes[index].c_str(), probability);
        }
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 2;
    }
}
"""


def _run(*command):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    (folder / "harness.cpp").write_text(HARNESS)
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined,address", f"-I{SOURCE}"]
    result = _run("g++", *flags, folder / "harness.cpp", "-o", folder / "harness")
    assert result.returncode == 0, result.stderr
    return folder / "harness"


def _write_labels(folder, preprocessing):
    numbers = [" ".join(map(str, values)) for values in (preprocessing.mean, preprocessing.std)]
    lines = [*numbers, "shirt", "ankle boot", "a", "b"]
    path = folder / "labels.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(("channels", "name"), [(3, "image.ppm"), (1, "image.pgm")])
def test_preprocessing_equals_that_in_python(harness, tmp_path, channels, name):
    preprocessing = Preprocessing.imagenet(32, channels)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, channels), dtype=np.uint8)
    image = Image.fromarray(pixels.squeeze())
    image.save(tmp_path / name)
    result = _run(harness, _write_labels(tmp_path, preprocessing), tmp_path / name)
    actual = torch.tensor([float(line) for line in result.stdout.split()]).reshape(channels, 32, 32)
    torch.testing.assert_close(actual, preprocessing.transform()(image), rtol=0, atol=1e-6)
    expected = torch.softmax(torch.tensor([0.5, 3.0, -1.0, 3.0]), 0)
    ranked = [line.rsplit(" ", 1) for line in result.stderr.splitlines()]
    assert [label for label, _ in ranked] == ["ankle boot", "b", "shirt"]
    np.testing.assert_allclose([float(p) for _, p in ranked], expected[[1, 3, 0]], atol=1e-6)


def test_a_header_with_comments(harness, tmp_path):
    (tmp_path / "image.pgm").write_bytes(b"P5 # made by hand\n# twice\n2 1\n255\n\x00\xff")
    labels = tmp_path / "labels.txt"
    labels.write_text("0.5\n0.25\na\nb\nc\nd\n")
    assert _run(harness, labels, tmp_path / "image.pgm").stdout.split() == ["-2", "2"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "image.ppm"),
        (b"P6 2 2 255\n123", "image.ppm"),
        (b"P6 30000 30000 255\n123", "image.ppm"),
        (b"P6 2 2 65535\n" + bytes(24), "8-bit"),
        (b"P3 1 1 255\n1 2 3", "8-bit"),
        (b"P6 -2 2 255\n" + bytes(12), "8-bit"),
        (b"P6 99999999999999999999 2 255\n", "8-bit"),
        (b"\x89PNG\r\n\x1a\n", "8-bit"),
        (b"P5 2 2 255\n" + bytes(4), "channel"),
    ],
)
def test_an_invalid_image_is_a_one_line_error(harness, tmp_path, content, words):
    (tmp_path / "image.ppm").write_bytes(content)
    result = _run(harness, _write_labels(tmp_path, Preprocessing.imagenet(32)), tmp_path / "image.ppm")
    assert_one_line_error(result, words)
    assert not result.stdout


@pytest.mark.parametrize("content", ["shirt\nboot\n", "0.5 0.5 0.5\n0.25\nshirt\n"])
def test_labels_without_mean_and_std_are_a_one_line_error(harness, tmp_path, content):
    (tmp_path / "labels.txt").write_text(content)
    assert_one_line_error(_run(harness, tmp_path / "labels.txt", "image.ppm"), "labels.txt")


def _golden(frames=False):
    random = np.random.default_rng(0)
    mean, std = ((), ()) if frames else ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    facts = GoldenFacts("noise", (37, 64), mean, std, {"float32": 0.1, "bfloat16": 0.2, "tensorrt": 0.04})
    images = random.integers(0, 256, (3, 19, 32, 3), dtype=np.uint8)
    return GoldenAnswers(images, np.array([0, 2, 5, 9]), random.normal(size=(3, 4)).astype(np.float32), facts)


@pytest.mark.parametrize("frames", [False, True])
@pytest.mark.parametrize("fault", [None, "nan", "swapped", "small error", "large error", "one image"])
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_golden_answers_equal_those_in_python(harness, tmp_path, batch, fault, frames):
    golden = _golden(frames)
    golden.write(tmp_path)
    logits = np.zeros((batch, 10), np.float32)
    logits[:, golden.positions] = golden.logits[np.arange(batch) % 3]
    if fault == "nan":
        logits[-1, 5] = np.nan
    elif fault == "swapped":
        logits = logits[::-1]
    elif fault in ("small error", "large error"):
        logits[:, 2] += 0.05 if fault == "small error" else 0.5
    elif fault == "one image":
        logits[-1, 9] += 0.3
    (tmp_path / "logits.txt").write_text(" ".join(map(str, logits.ravel().tolist())))
    result = _run(harness, tmp_path / GOLDEN, batch, tmp_path / "logits.txt")
    found = np.array(result.stdout.split(), np.float32)
    np.testing.assert_allclose(found, golden.inputs(min(batch, 3)).ravel(), atol=1e-5)
    try:
        golden.check(logits, "tensorrt")
    except WrongAnswerError:
        assert_one_line_error(result, "logits")
    else:
        assert result.returncode == 0 and (fault in (None, "small error") or (fault == "swapped" and batch == 1))


def test_damaged_golden_answers_are_a_one_line_error(harness, tmp_path):
    _golden().write(tmp_path)
    (tmp_path / "logits.txt").write_text("0 " * 10)
    whole = (tmp_path / GOLDEN).read_bytes()
    random = np.random.default_rng(0)
    for start in (0, 5, 9, 60, len(whole) // 2, len(whole) - 3):
        (tmp_path / GOLDEN).write_bytes(whole[:start])
        assert_one_line_error(_run(harness, tmp_path / GOLDEN, 1, tmp_path / "logits.txt"), "")
    for _ in range(20):
        changed = bytearray(whole)
        changed[random.integers(0, 600)] = random.integers(0, 256)
        (tmp_path / GOLDEN).write_bytes(changed)
        assert _run(harness, tmp_path / GOLDEN, 1, tmp_path / "logits.txt").returncode in (0, 2)


def _tensorrt():
    """Returns the folder with TensorRT's include/ and lib/, or None if they are in the system's folders."""
    if root := os.environ.get("TENSORRT_ROOT"):
        return Path(root)
    if any(Path("/usr/include").glob("*/NvInfer.h")) or Path("/usr/include/NvInfer.h").is_file():
        return None
    pytest.skip("C++ example not compiled: NvInfer.h is neither in /usr/include nor in $TENSORRT_ROOT/include")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if not shutil.which("cmake"):
        pytest.skip("C++ example not compiled: cmake is not installed")
    if not (Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include" / "cuda_runtime_api.h").is_file():
        pytest.skip("C++ example not compiled: no cuda_runtime_api.h in $CUDA_HOME/include or /usr/local/cuda/include")
    folder = tmp_path_factory.mktemp("cpp")
    root = _tensorrt()
    is_rtx = root and any((root / "lib").glob("libtensorrt_rtx*"))
    options = ["-DCMAKE_CXX_FLAGS=-Werror", f"-DTENSORRT_RTX={'ON' if is_rtx else 'OFF'}"]
    for command in (["-S", SOURCE, "-B", folder / "build", *options], ["--build", folder / "build"]):
        result = _run("cmake", *command)
        assert result.returncode == 0, result.stdout + result.stderr
    return folder / "build" / "classify"


def test_the_program_builds_and_reports_errors(program, tmp_path):
    labels = _write_labels(tmp_path, Preprocessing.imagenet(32))
    Image.new("RGB", (32, 32)).save(tmp_path / "image.ppm")
    (tmp_path / "an.engine").write_bytes(b"no engine")
    assert_one_line_error(_run(program), "ENGINE LABELS IMAGE.ppm")
    assert_one_line_error(_run(program, tmp_path / "none", labels, tmp_path / "image.ppm"), "none")
    result = _run(program, tmp_path / "an.engine", labels, tmp_path / "image.ppm")
    assert_one_line_error(result, "" if torch.cuda.is_available() else "GPU")
