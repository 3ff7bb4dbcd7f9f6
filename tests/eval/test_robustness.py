"""Corruptions against the library, their seeds and sizes; robustness by hand; the command, interrupted and resumed."""

import json

import imagecorruptions
import numpy as np
import pytest
import torch
from PIL import Image
from support import assert_one_line_error, write_linear_bundle

from eval.metrics.corrupted_accuracy import CLEAN, mean_drop, summarize
from eval.metrics.corruptions import CORRUPTIONS, CorruptedImages, after_framing, corrupt
from eval.metrics.paired import paired_drop
from illama.data.datasets import TensorImages
from illama.data.preprocessing import Preprocessing


def _photo(size, seed=0):
    """Returns a smooth picture: noise at an eighth of the size, enlarged."""
    small = np.random.default_rng(seed).integers(0, 256, (size // 8 + 1, size // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


@pytest.fixture
def gray():
    images = np.stack([np.array(_photo(28, seed).convert("L")) for seed in range(4)])
    return TensorImages(images, np.arange(4)), Preprocessing((28, 28), 1, (0.5,), (0.5,))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_at_224_pixels_it_is_the_library_s(name):
    image, more = _photo(224), {"seed": 7} if name in ("impulse_noise", "glass_blur") else {}
    np.random.seed(7)
    expected = imagecorruptions.corrupt(np.array(image), corruption_name=name, severity=3, **more)
    np.testing.assert_array_equal(np.array(corrupt(image, name, 3, seed=7)), expected)


def test_the_names_are_imagenet_c_s():
    assert list(CORRUPTIONS) == imagecorruptions.get_corruption_names("common")


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_depend_on_seed_and_index_alone(name, gray):
    images, preprocessing = gray
    split = CorruptedImages(images, preprocessing, name, 3)
    np.random.seed(1)
    state = np.random.get_state()[1].copy()
    first = [np.array(split[index][0]) for index in (0, 3)]
    assert (np.random.get_state()[1] == state).all()
    again = [np.array(split[index][0]) for index in (3, 0)][::-1]
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert first[0].shape == (28, 28) and split[3][1] == 3
    clean = images.images[0].numpy().astype(float)
    mild, strong = (
        np.abs(np.array(CorruptedImages(images, preprocessing, name, s)[0][0]) - clean).mean() for s in (1, 5)
    )
    assert mild > 0 and (strong > mild or name == "frost")  # a frost picture may be as bright as the image
    if name in ("gaussian_noise", "snow", "fog", "glass_blur", "impulse_noise"):
        other = np.array(CorruptedImages(images, preprocessing, name, 3, seed=1)[0][0])
        assert (other != first[0]).any()


def test_strengths_at_28_pixels():
    """Noise has its full strength on a gray image; a blur covers the same share of the picture as at 224 pixels."""
    flat = Image.new("L", (28, 28), 128)
    noisy = [np.array(corrupt(flat, "gaussian_noise", 1, seed)).astype(float) for seed in range(20)]
    assert np.std(noisy) == pytest.approx(0.08 * 255, rel=0.03)
    edge = np.zeros((224, 224), np.uint8)
    edge[:, 112:] = 255
    large = Image.fromarray(edge).convert("RGB")
    small = large.resize((28, 28), Image.Resampling.BOX)
    blurred = [
        np.array(corrupt(image, "defocus_blur", 5, 0).resize((28, 28)))[14, :, 0].astype(float)
        for image in (large, small)
    ]
    np.testing.assert_allclose(*blurred, atol=25)
    assert 20 < blurred[1][13] < 235  # a pixel at the edge is no longer black


def test_images_larger_than_imagenet_c_s_are_corrupted_at_its_size():
    image = _photo(384)
    expected = corrupt(image.resize((224, 224), Image.Resampling.BICUBIC), "pixelate", 2, 0)
    result = corrupt(image, "pixelate", 2, 0)
    assert result.size == (384, 384)
    np.testing.assert_array_equal(np.array(result), np.array(expected.resize((384, 384), Image.Resampling.BICUBIC)))


def test_framing_comes_first_and_once():
    """A crop of 32 pixels from 48 x 40: cropped, corrupted, then only normalized."""
    photo, preprocessing = (
        _photo(48).crop((0, 0, 48, 40)),
        Preprocessing((32, 32), 3, (0.0,) * 3, (1.0,) * 3, resize=36),
    )
    split = CorruptedImages([(photo, 5)], preprocessing, "brightness", 1)
    framed = preprocessing.frame(photo)
    assert framed.size == (32, 32)
    image, label = split[0]
    tensor = after_framing(preprocessing)(image)
    assert label == 5 and tensor.shape == (3, 32, 32)
    np.testing.assert_array_equal((tensor * 255).round().to(torch.uint8).permute(1, 2, 0).numpy(), np.array(image))
    clean = preprocessing.transform()(photo)
    assert (clean * 255).round().permute(1, 2, 0).numpy() == pytest.approx(np.array(framed))


def _right(*rows):
    return {model: np.array(row, bool) for model, row in zip("ab", rows, strict=True)}


def test_the_summary_by_hand():
    cells = {
        CLEAN: _right([1, 1, 1, 1], [1, 1, 1, 0]),
        ("fog", 1): _right([1, 1, 1, 0], [1, 1, 0, 0]),
        ("fog", 2): _right([1, 1, 0, 0], [1, 0, 0, 0]),
        ("snow", 1): _right([1, 1, 1, 1], [0, 1, 1, 1]),
    }
    summary = summarize(cells)
    a, b = summary["a"], summary["b"]
    assert a.by_corruption == {"fog": 62.5, "snow": 100} and a.corrupted == 81.25 and a.clean == 100
    assert b.by_corruption == {"fog": 37.5, "snow": 75} and b.corrupted == 56.25 and b.kept == 75
    assert b.drop.points == 25 and b.beyond_clean.points == 0
    assert (a.drop.points, a.drop.low, a.drop.high) == (0, 0, 0)


def test_on_one_cell_the_interval_is_that_of_the_paired_bootstrap():
    generator = np.random.default_rng(0)
    reference, other = generator.random(400) < 0.9, generator.random(400) < 0.85
    expected = paired_drop(reference, other)
    drop = mean_drop(reference.astype(float) - other)
    assert drop.points == pytest.approx(expected.points)
    assert (drop.low, drop.high) == pytest.approx((expected.low, expected.high), abs=0.3)


@pytest.mark.parametrize("gained", [0, 7])
def test_where_nothing_was_lost_the_interval_does_not_shrink_to_nothing(gained):
    reference, other = np.zeros(300, dtype=bool), np.arange(300) < gained
    expected, drop = paired_drop(reference, other), mean_drop(reference.astype(float) - other)
    assert (drop.points, drop.high) == pytest.approx((expected.points, expected.high)) and drop.high > drop.points
    assert drop.low == pytest.approx(expected.low, abs=0.3)
    assert mean_drop(np.zeros(300), largest=2.0).high == pytest.approx(2 * paired_drop(reference, reference).high)


def test_the_command_goes_on_where_it_was(image_folder, tmp_path, run_here):
    generator = np.random.default_rng(0)
    weights = generator.normal(size=(3 * 32 * 32, 3))
    classes = ["class0", "class1", "class2"]
    one = write_linear_bundle(tmp_path / "one", weights, 32, classes)
    other = write_linear_bundle(tmp_path / "other", weights + generator.normal(size=weights.shape) / 2, 32, classes)
    out = tmp_path / "out"

    def run(*more, bundles=(one, other)):
        return run_here(
            "eval/robustness.py",
            *bundles,
            "--data",
            image_folder,
            "--images",
            9,
            "--out",
            out,
            "--corruptions",
            "snow",
            "contrast",
            *more,
        )

    result = run("--severities", "1", "5")
    assert result.returncode == 0, result.stderr
    content = json.loads((out / "robustness.json").read_text())
    table = (out / "robustness.md").read_text()
    assert list(content["models"]) == ["one", "other"] and table in result.stdout
    assert "| one |" in table and "reference" in table and "| snow |" in table
    assert ("33.33%" in table) == (content["models"]["one"]["clean"] < 40)  # chance plus a tenth of the rest
    assert [(cell["corruption"], cell["severity"]) for cell in content["cells"]] == [
        CLEAN,
        ("snow", 1),
        ("snow", 5),
        ("contrast", 1),
        ("contrast", 5),
    ]

    (out / "cells" / "snow-5.safetensors").unlink()  # as if it had been interrupted there
    kept = (out / "cells" / "contrast-1.safetensors").stat().st_mtime_ns
    again = run("--severities", "1", "5")
    assert again.returncode == 0 and (out / "robustness.md").read_text() == table
    assert (out / "cells" / "contrast-1.safetensors").stat().st_mtime_ns == kept

    assert_one_line_error(run("--seed", "1"), "seed", "--out")
    assert_one_line_error(run("--workers", "-1"), "--workers")
    assert_one_line_error(run(bundles=(other,)), "files", "--out")
    assert_one_line_error(run("--severities", "6"), "--severities")
    assert_one_line_error(run("--images", "99"), "--images", "18")
    assert_one_line_error(run(bundles=(one, one)), "twice")
    assert_one_line_error(run("--out", tmp_path), str(tmp_path), "--out")
    assert_one_line_error(run("--corruptions", "rain"), "'rain'", "snow")
    assert_one_line_error(run("--corruptions"), "--corruptions")
    assert_one_line_error(run("--data", "fashion-mnist"), "fashion-mnist", "10", "3")
    for path in (tmp_path / "one" / "model.onnx", tmp_path / "one" / "model.onnx" / "x"):
        assert_one_line_error(run("--out", path), str(path))
    assert_one_line_error(run("--seed", "-1"), "--seed")
    for bundle in (one, other):
        manifest = json.loads((bundle / "manifest.json").read_text())
        manifest["preprocessing"]["class_order"] = "natural"
        (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert_one_line_error(run("--severities", "1", "5"), "preprocessing")
