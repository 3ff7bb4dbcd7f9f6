"""The shipped images, ImageNet's and CIFAR's layouts, and errors in them."""

import gzip
import hashlib
import json
import pickle
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import write_images
from timm.data import create_transform
from torchvision import datasets
from torchvision.transforms import v2

from illama.data.datasets import DEBIAN_FASHION_MNIST, Transformed, note_channels, open_data
from illama.data.idx_files import read_idx
from illama.data.preprocessing import Preprocessing
from illama.errors import UserError, warn_once
from illama.structured_files import parse_json


def _digests(images):
    return {images[i][0].numpy().tobytes() for i in range(len(images))}


def test_shipped_fashion_mnist():
    data = open_data("fashion-mnist")
    test, calibration = data.test(), data.calibration(2000)
    assert len(test) == 10_000
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert not _digests(test) & _digests(calibration)
    assert test[0][0].shape == (1, 28, 28)
    some = [data.calibration(100)[i] for i in (0, 99)]
    assert [label for _, label in some] == [calibration[i][1] for i in (0, 1980)]


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_training_images_leave_out_the_shipped_calibration_images():
    data = open_data("fashion-mnist")
    training, validation = data.training()
    assert (len(training), len(validation)) == (58_000, 2_000)
    assert _digests(validation) == _digests(data.calibration(2000))


def test_the_error_for_missing_training_images_names_the_package(tmp_path):
    with pytest.raises(UserError, match="dataset-fashion-mnist"):
        open_data(f"fashion-mnist:{tmp_path}").training()


@pytest.mark.parametrize("size", [32, 112, 224, 384])
def test_the_evaluation_transform_is_timm_s(size):
    """The paper's code evaluates with timm's transforms."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    crop = {"crop_pct": 1.0, "crop_mode": "squash"} if size in (32, 384) else {"crop_pct": size / (size * 256 // 224)}
    expected = create_transform(size, is_training=False, interpolation="bicubic", **crop)(image)
    torch.testing.assert_close(Preprocessing.imagenet(size).transform()(image), expected, atol=1e-5, rtol=0)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["L", "RGB"]), st.sampled_from([1, 3]), st.tuples(*[st.integers(1, 90)] * 2), st.integers(1, 40),
    st.one_of(st.none(), st.integers(0, 20)), st.sampled_from(["bicubic", "bilinear"]), st.integers(0, 99),
)  # fmt: skip
def test_an_image_becomes_the_same_input_to_the_bit_as_in_torchvision(
    mode, channels, old, side, margin, interpolation, seed
):
    pixels = np.random.default_rng(seed).integers(0, 256, (*old, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    resize = None if margin is None else side + margin
    mean, std = (0.485, 0.456, 0.406)[:channels], (0.229, 0.224, 0.225)[:channels]
    preprocessing = Preprocessing((side, side), channels, mean, std, resize, interpolation)
    kind = v2.InterpolationMode(interpolation)
    crop = [v2.Resize(resize, kind), v2.CenterCrop(side)] if resize else []
    whole = v2.Compose([*crop, v2.Resize([side, side], kind), *preprocessing.tensor_steps()])
    assert torch.equal(torch.from_numpy(preprocessing.to_array(image)), whole(image))
    assert torch.equal(preprocessing.transform()(image), whole(image))


def test_an_image_folder(image_folder):
    data = open_data(str(image_folder))
    assert data.classes == ("class0", "class1", "class2")
    assert (len(data.test()), len(data.calibration(24))) == (18, 24)
    assert {data.calibration(6)[i][1] for i in range(6)} == {0, 1, 2}
    image, label = Transformed(data.test(), Preprocessing.imagenet(32).transform())[17]
    assert image.shape == (3, 32, 32) and label == 2
    grey = Transformed(data.test(), Preprocessing.imagenet(32, 1).transform())[0][0]
    assert grey.shape == (1, 32, 32)


def test_preprocessing_is_read_from_json_or_rejected():
    preprocessing = Preprocessing.imagenet(224)
    values = json.loads(json.dumps(asdict(preprocessing)))
    assert parse_json(json.dumps(values), Preprocessing, "preprocessing") == preprocessing
    wrong = {"crop": 1, "mean": None, "std": [0, 1, 1], "size": [224], "resize": 100, "exif": "yes", "interpolation": 3}
    for damaged in (*({**values, name: value} for name, value in wrong.items()), {"size": [224, 224]}, []):
        with pytest.raises(UserError):
            parse_json(json.dumps(damaged), Preprocessing, "preprocessing")


def test_too_many_calibration_images(image_folder):
    with pytest.raises(UserError, match=r"25 .*1 to 24 .*--calibration-images"):
        open_data(str(image_folder)).calibration(25)
    with pytest.raises(UserError, match=r"2001 .*--calibration-images"):
        open_data("fashion-mnist").calibration(2001)


def test_a_picture_beside_the_splits_does_not_take_the_classes_away(tmp_path, image_folder):
    picture = next((image_folder / "val").rglob("*.png")).read_bytes()
    (image_folder / "labels.png").write_bytes(picture)
    assert len(open_data(str(image_folder)).classes) == 3
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "1.png").write_bytes(picture)
    with pytest.raises(UserError, match="one picture"):
        open_data(str(flat))
    (flat / "2.png").write_bytes(picture)
    (flat / "3.png").write_bytes(picture)
    data = open_data(str(flat))
    assert data.classes == () and not data.labeled
    taken = [[split.dataset.paths[i].name for i in split.indices] for split in (data.calibration(None), data.test())]
    assert taken == [["1.png", "3.png"], ["2.png"]]  # no image is in both
    with pytest.raises(UserError, match="no classes"):
        data.training()
    (flat / "val").mkdir()  # a split is missing: no folder of pictures
    with pytest.raises(UserError):
        open_data(str(flat))


@pytest.mark.parametrize(("color", "channels", "words"), [((9, 9, 9), 3, "gray"), ((9, 0, 9), 1, "color")])
def test_images_of_other_channels_are_noted_once(tmp_path, capsys, color, channels, words):
    for number in range(4):
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{number}.png")
    images = open_data(str(tmp_path)).test()
    note_channels(images, 4 - channels)
    assert not capsys.readouterr().err
    warn_once.cache_clear()
    for _ in range(2):
        note_channels(images, channels)
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_wrong_folders_are_rejected(tmp_path, image_folder):
    with pytest.raises(UserError, match="nowhere"):
        open_data(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no val/ folder"):
        open_data(str(tmp_path / "empty"))
    (tmp_path / "empty" / "val").mkdir()
    with pytest.raises(UserError, match="one folder per class"):
        open_data(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="one class only"):
        open_data(str(write_images(tmp_path / "one", classes=1)))
    (image_folder / "train" / "class0").rename(image_folder / "train" / "class9")
    with pytest.raises(UserError, match="train/ and val/"):
        open_data(str(image_folder)).calibration(2)


def test_a_broken_image_is_named(image_folder):
    broken = image_folder / "val" / "class1" / "2.png"
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(UserError, match=r"class1/2\.png"):
        list(open_data(str(image_folder)).test())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not gzip",
        gzip.compress(b"\0\0\x0d\x01\0\0\0\1", mtime=0),
        gzip.compress(b"\0\0\x08\x01\0\0\0\xff12", mtime=0),
    ],
)
def test_a_damaged_idx_file_is_rejected(tmp_path, content):
    (tmp_path / "file.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"file\.gz"):
        read_idx(tmp_path / "file.gz")


def test_a_huge_image_is_named_in_one_line(image_folder, monkeypatch, recwarn):
    """Pillow only warns above its limit, and raises an error from twice the limit on."""
    with Image.open(image_folder / "val" / "class0" / "0.png") as image:
        pixels = image.width * image.height
    for limit in (pixels * 2 // 3, pixels // 3):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UserError, match=r"class0/0\.png .* million pixels"):
            open_data(str(image_folder)).test()[0]
    assert not recwarn.list


CIFAR = {
    "cifar10": (
        datasets.CIFAR10,
        "cifar-10-batches-py",
        [f"data_batch_{i}" for i in range(1, 6)],
        "test_batch",
        "labels",
        "label_names",
    ),
    "cifar100": (datasets.CIFAR100, "cifar-100-python", ["train"], "test", "fine_labels", "fine_label_names"),
}


def _write_cifar(name, root):
    """Writes a CIFAR of 10 images per batch; returns its content, and the MD5 sums that torchvision checks."""
    _, folder, train, test, labels, names = CIFAR[name]
    generator, classes = np.random.default_rng(0), int(name.removeprefix("cifar"))
    contents = {
        batch: {"data": generator.integers(0, 256, (10, 3072), dtype=np.uint8), labels: list(range(10))}
        for batch in [*train, test]
    }
    meta = CIFAR[name][0].meta["filename"]
    contents[meta] = {names: [f"kind{i}" for i in range(classes)]}
    (root / folder).mkdir(parents=True)
    for batch, content in contents.items():
        (root / folder / batch).write_bytes(pickle.dumps(content))
    return contents, {batch: hashlib.md5((root / folder / batch).read_bytes()).hexdigest() for batch in contents}


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_in_its_published_layout(name, tmp_path, monkeypatch):
    reader, _, train, test, _, _ = CIFAR[name]
    contents, sums = _write_cifar(name, tmp_path)
    with pytest.raises(UserError, match=f"no intact {name}"):  # its MD5 sums are wrong
        open_data(f"{name}:{tmp_path}")
    monkeypatch.setattr(reader, "train_list", [[batch, sums[batch]] for batch in train])
    monkeypatch.setattr(reader, "test_list", [[test, sums[test]]])
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": sums[reader.meta["filename"]]})
    data = open_data(f"{name}:{tmp_path}")
    assert data.classes == tuple(f"kind{i}" for i in range(int(name.removeprefix("cifar"))))
    count = 10 * len(train)
    assert (len(data.test()), len(data.calibration(count))) == (10, count)
    image, label = data.calibration(count)[count - 1]
    expected = contents[train[-1]]["data"][9].reshape(3, 32, 32).transpose(1, 2, 0)
    assert label == 9 and np.array_equal(np.asarray(image), expected)
    image, _ = Transformed(data.test(), data.preprocessing(32, 3).transform())[0]
    assert image.shape == (3, 32, 32)
