"""Class folders named by numbers: both orders, and the notes for permuted labels."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support import write_linear_bundle
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm_networks import saved

from illama.data.datasets import open_data
from illama.errors import UserError
from illama.inference import chance_note
from illama.manifest import Manifest
from illama.options import SourceOptions
from illama.training.start import check_class_order
from quant.export.write_bundle import Origin
from quant.inputs import open_inputs

COUNT = 12
WORDS = ("0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9")
NATURAL = tuple(map(str, range(COUNT)))


def block(number):
    """Returns a 16 x 16 image whose class is the position of its bright 4 x 4 square."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    row, column = divmod(number, 4)
    pixels[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 255
    return pixels


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "numbered"
    for split, count in (("train", 3), ("val", 2)):
        for number in range(COUNT):
            (folder / split / str(number)).mkdir(parents=True)
            for index in range(count):
                Image.fromarray(block(number)).save(folder / split / str(number) / f"{index}.png")
    return folder


@pytest.fixture
def bundles(tmp_path, numbered):
    """A network that is always right, with logits in natural order; the second bundle declares words."""
    weights = np.stack([block(number).transpose(2, 0, 1).ravel() / 255 for number in range(COUNT)], 1)
    found = []
    for name, order, classes in (("natural", "natural", NATURAL), ("permuted", "words", WORDS)):
        bundle = write_linear_bundle(tmp_path / name, weights, 16, list(classes))
        manifest = Manifest.read(bundle)
        replace(manifest, preprocessing=replace(manifest.preprocessing, class_order=order)).write(bundle)
        found.append(bundle)
    return found


def test_natural_order_is_timm_s(numbered, tmp_path):
    mixed = shutil.copytree(numbered, tmp_path / "mixed")
    for split in ("train", "val"):
        for number, name in ((3, "b12"), (4, "B2"), (5, "a1x10"), (6, "a1x9"), (7, "007")):
            (mixed / split / str(number)).rename(mixed / split / name)
    for folder in (numbered, mixed):
        data = open_data(str(folder), class_order="natural")
        reader = ReaderImageFolder(str(folder / "val"))
        assert dict(zip(data.classes, range(COUNT), strict=True)) == reader.class_to_idx
        assert dict(data.test().samples) == dict(reader.samples)
        assert data.training()[0].dataset.class_to_idx == reader.class_to_idx
        assert open_data(str(folder)).classes == tuple(sorted(data.classes))
    assert open_data(str(numbered)).classes == WORDS


def test_one_warning_if_the_orders_differ(numbered, tmp_path, image_folder, capfd):
    folder = shutil.copytree(numbered, tmp_path / "copy")
    for order, warnings in (("words", 1), ("natural", 1), ("natural", 0)):
        data = open_data(str(folder), class_order=order)
        data.training(), data.calibration(2), open_data(str(folder), class_order=order)
        lines = [line for line in capfd.readouterr().err.splitlines() if str(folder) in line]
        assert len(lines) == warnings and all(f"the order '{order}'" in line for line in lines)
    open_data(str(image_folder))
    assert str(image_folder) not in capfd.readouterr().err
    for split in ("train", "val"):
        (folder / split / "2").rename(folder / split / "²")  # a digit, but not a decimal number
    assert set(open_data(str(folder), class_order="natural").classes) == set(NATURAL) - {"2"} | {"²"}


def test_a_timm_network_s_folders_are_in_natural_order(numbered, tmp_path):
    _, path = saved(tmp_path, "small_vit_plain", num_classes=COUNT)
    options = SourceOptions(path, "timm:small_vit_plain", str(numbered), 4)
    for given, order, classes in ((None, "natural", NATURAL), ("words", "words", WORDS)):
        inputs = open_inputs(replace(options, class_order=given))
        manifest = Origin.of(inputs).manifest(inputs.model.config)
        assert manifest.classes == classes and manifest.preprocessing.class_order == order
        assert manifest.preprocessing.exif == "apply" and manifest.network == "timm"


def test_the_bundle_determines_the_order(bundles, numbered, run_here, tmp_path):
    """The command line of an evaluation has no order; for the permuted bundle, there is a note."""
    for bundle, right in zip(bundles, (100.0, 2 / 12 * 100), strict=True):
        out = tmp_path / f"accuracy-{bundle.name}"
        result = run_here(
            "eval/accuracy.py",
            bundle,
            "--data",
            numbered,
            "--out",
            out,
            "--calibration-images",
            0,
            "--runtime",
            "onnxruntime",
        )
        assert result.returncode == 0, result.stderr
        content = json.loads((out / "accuracy.json").read_text())
        assert content["models"][bundle.name]["top1"]["percent"] == pytest.approx(right)
        asked = ["class order" in text for text in (result.stdout, (out / "accuracy.md").read_text())]
        assert asked == [right < 50] * 2
        out = tmp_path / f"tradeoff-{bundle.name}"
        result = run_here(
            "eval/tradeoff.py",
            bundle,
            "--data",
            numbered,
            "--out",
            out,
            "--calibration-images",
            0,
            "--batches",
            1,
            "--seconds",
            0.05,
        )
        assert result.returncode == 0, result.stderr
        report = json.loads((out / "report.json").read_text())
        assert any("class order" in note for note in report["warnings"]) == (right < 50)
        assert ("class order" in result.stdout) == ("class order" in (out / "report.html").read_text()) == (right < 50)


def test_a_kept_head_needs_the_order_of_the_data(bundles):
    natural, words = bundles
    check_class_order(natural, NATURAL), check_class_order(words, WORDS)
    check_class_order(words, [f"class {name}" for name in NATURAL])  # other names: no check
    check_class_order(words / "model.onnx", NATURAL)  # a single file: no check
    with pytest.raises(UserError, match="--class-order"):
        check_class_order(words, NATURAL)


def test_chance_level_ends_a_tenth_of_the_way_to_100_percent():
    for classes in (2, 12, 1000):
        chance = 100 / classes
        limit = chance + (100 - chance) / 10
        assert chance_note("it", limit + 1e-9, classes) == chance_note("it", 100.0, classes) == ""
        for percent in (0.0, chance, limit - 1e-6):
            note = chance_note("it", percent, classes)
            assert note.startswith("it ") and "\n" not in note
            assert all(word in note for word in ("class order", "preprocessing", "checkpoint"))
