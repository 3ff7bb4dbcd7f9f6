"""Tar and parquet shards: images and labels in any order, and damaged files."""

import io
import json
import os
import pickle
import tarfile
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import assert_one_line_error, run_command
from torch.utils.data import DataLoader

from illama.data.datasets import Transformed, open_data
from illama.errors import UserError

CLASSES = 3
TRAIN, VAL = 12, 7  # images per shard; each split has three shards


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _pixels(split, number):
    """Returns different noise for each number."""
    return np.random.default_rng((len(split), number)).integers(0, 256, (8 + number % 3, 10, 3), dtype=np.uint8)


def _encode(pixels, kind="png"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, lossless=True)
    return file.getvalue()


def _add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _write_tars(folder, pattern="imagenet1k-{split}-{shard:04}.tar", val="validation"):
    for split, count in (("train", TRAIN), (val, VAL)):
        for shard in range(3):
            path = folder / pattern.format(split=split, shard=shard)
            path.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
                for number in range(shard * count, (shard + 1) * count):
                    key, kind = f"n{'0' * 90 * (number == 1)}{number:05}", ("png", "webp")[number % 2]
                    _add(tar, f"{key}.cls", b"%d\n" % (number % CLASSES))  # WebDataset's writers sort: cls, jpg, json
                    _add(tar, f"{key}.{kind}", _encode(_pixels(split, number), kind))
                    _add(tar, f"{key}.json", b"{}")
    return folder


def _features(names):
    return {b"huggingface": json.dumps({"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}})}


def _write_parquet(folder, val="validation", names=("red", "green", "blue"), **more):
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", TRAIN), (val, VAL)):
        for shard in range(3):
            numbers = range(shard * count, (shard + 1) * count)
            images = [{"bytes": _encode(_pixels(split, n)), "path": f"{n}.png"} for n in numbers]
            table = pa.table({"image": images, "label": [n % CLASSES for n in numbers]})
            table = table.replace_schema_metadata(_features(list(names)) if names else None)
            pq.write_table(table, folder / "data" / f"{split}-{shard:05}-of-00003.parquet", row_group_size=5, **more)
    return folder


def _open(kind, folder):
    return open_data(f"{kind}:{folder}")


@pytest.fixture(params=["webdataset", "parquet"])
def kind(request):
    return request.param


@pytest.fixture
def shards(kind, tmp_path):
    return {"webdataset": _write_tars, "parquet": _write_parquet}[kind](tmp_path / "set")


def _number(image, split, numbers):
    return next(n for n in numbers if np.array_equal(np.asarray(image), _pixels(split, n)))


def test_images_and_labels_are_read_exactly_in_any_order(kind, shards):
    data = _open(kind, shards)
    test = data.test()
    assert len(test) == 3 * VAL
    for index in np.random.default_rng(0).permutation(len(test)):
        image, label = test[int(index)]
        assert np.array_equal(np.asarray(image), _pixels("validation", index)) and label == index % CLASSES
    training, validation = data.training()
    assert (len(training), len(validation)) == (33, 3)
    seen = []
    for part in (training, validation):
        for index in np.random.default_rng(1).permutation(len(part)):
            image, label = part[int(index)]
            seen.append(_number(image, "train", range(3 * TRAIN)))
            assert label == seen[-1] % CLASSES
    assert sorted(seen) == list(range(3 * TRAIN))
    calibration = data.calibration(4)
    assert [_number(calibration[i][0], "train", range(0, 36, 9)) for i in range(4)] == [0, 9, 18, 27]
    assert data.preprocessing(224, 3).resize == 256


def test_loader_workers_read_what_the_process_itself_reads(kind, shards):
    data = _open(kind, shards)
    for split in (data.test(), data.training()[0]):
        images = Transformed(split, data.preprocessing(16, 3).transform())
        expected = [(image.numpy().tobytes(), label) for image, label in (images[i] for i in range(len(images)))]
        loader = DataLoader(images, batch_size=4, num_workers=2)  # forked after this process has read
        found = [(image.numpy().tobytes(), int(label)) for batch in loader for image, label in zip(*batch, strict=True)]
        assert found == expected
        copy = pickle.loads(pickle.dumps(split))  # what a spawned worker gets
        assert all(np.array_equal(np.asarray(copy[i][0]), np.asarray(split[i][0])) for i in range(len(split)))


def test_opening_decodes_no_image(kind, shards, monkeypatch):
    monkeypatch.setattr("PIL.Image.open", lambda *_, **__: pytest.fail("an image was decoded"))
    data = _open(kind, shards)
    data.training()
    data.calibration(4)


def test_the_index_is_small(kind, shards):
    """ImageNet's 1.28 million images must fit: 20 bytes per image for tars, and at most 40 sent to a worker."""
    data = _open(kind, shards)
    test = data.test()
    unread = len(pickle.dumps(test))
    test[3]
    assert len(pickle.dumps(test)) == unread  # the row group in memory is not pickled
    images = data.training()[0].dataset
    assert images.index.itemsize == 20
    assert len(pickle.dumps(images)) < 40 * len(images) + 6000


@pytest.mark.parametrize("pattern", ["train-{split}", "{split}/{shard}.tar", "{split}-{shard:06}.tar"])
def test_layouts_of_tar_folders(tmp_path, pattern):
    if pattern.startswith("train-"):  # the first name of a split counts
        pattern = "{split}/val-{shard}.tar"
    folder = _write_tars(tmp_path / "a", pattern, val="val")
    assert len(_open("webdataset", folder).training()[0]) == 33
    assert _open("webdataset", folder).classes == ("0", "1", "2")
    (folder / "classnames.txt").write_text("red\ngreen\nblue\n\n")
    assert _open("webdataset", folder).classes == ("red", "green", "blue")


def test_layouts_of_parquet_folders(tmp_path):
    data = _open("parquet", _write_parquet(tmp_path / "test", val="test", compression="zstd"))
    assert data.classes == ("red", "green", "blue") and len(data.test()) == 21
    assert _open("parquet", _write_parquet(tmp_path / "numbers", names=None)).classes == ("0", "1", "2")
    folder = _write_parquet(tmp_path / "cifar")
    for path in (folder / "data").iterdir():
        pq.write_table(pq.read_table(path).rename_columns(["img", "fine_label"]), path)
    assert len(_open("parquet", folder).training()[0]) == 33


def test_parquet_is_unpacked_once_for_training_and_again_when_it_changes(tmp_path):
    cache, folder = tmp_path / "cache" / "illama", _write_parquet(tmp_path / "set")
    data = _open("parquet", folder)
    list(data.test()), list(data.calibration(8))
    assert not cache.exists()  # only training needs it
    for _ in range(2):
        _open("parquet", folder).training()
        (copy,) = cache.glob("parquet-*/images")
    assert copy.stat().st_size == sum(len(_encode(_pixels("train", n))) for n in range(36))
    os.utime(next((folder / "data").glob("train-*")), (1, 1))
    _open("parquet", folder).training()
    assert len(list(cache.glob("parquet-*/images"))) == 2
    assert not list(cache.glob(".*"))


def test_no_space_to_unpack_parquet(tmp_path, monkeypatch):
    data = _open("parquet", _write_parquet(tmp_path / "set"))
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        data.training()
    (tmp_path / "cache").unlink()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(UserError, match=r"0\.0 GB .* XDG_CACHE_HOME"):
        data.training()


def _shard(kind, shards, split, number=1):
    suffix = {"webdataset": "tar", "parquet": "parquet"}[kind]
    return sorted(shards.rglob(f"*{split}*.{suffix}"))[number]


@pytest.mark.parametrize("keep", [0, 300, 0.3, 0.6])
def test_a_truncated_shard_is_named(kind, shards, keep):
    path = _shard(kind, shards, "validation")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=rf"{path.name}.* is truncated"):
        _open(kind, shards)


def test_a_tar_truncated_or_damaged_between_two_members(tmp_path):
    folder = _write_tars(tmp_path / "set")
    path = _shard("webdataset", folder, "validation")
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        fourth = tar.getmembers()[3].offset
    for damaged in (content[:fourth], content[:fourth] + b"\1" * 512 + content[fourth + 512 :]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{path.name} is truncated or damaged"):
            _open("webdataset", folder)


def test_a_damaged_row_group_is_named(tmp_path):
    folder = _write_parquet(tmp_path / "set", compression="zstd")
    path = _shard("parquet", folder, "validation", 0)
    content = bytearray(path.read_bytes())
    content[100:400] = b"\xff" * 300
    path.write_bytes(content)
    with pytest.raises(UserError, match=path.name):
        list(_open("parquet", folder).test())


def test_the_error_for_a_broken_image_names_its_shard(tmp_path):
    tars = _write_tars(tmp_path / "tars")
    for split in ("train", "validation"):
        path = _shard("webdataset", tars, split, 2)
        with tarfile.open(path, "a") as tar:
            _add(tar, "broken.cls", b"0")
            _add(tar, "broken.jpg", _encode(_pixels("train", 0))[:90])
    with pytest.raises(UserError, match=rf"broken\.jpg in .*{path.name}"):
        _open("webdataset", tars).test()[21]
    parquet = _write_parquet(tmp_path / "parquet")
    path = _shard("parquet", parquet, "train", 2)
    rows = pq.read_table(path).to_pylist()
    rows[7]["image"]["bytes"] = b"no image"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    with pytest.raises(UserError, match=rf"row 7 of .*{path.name}"):
        list(_open("parquet", parquet).calibration(36))
    out = ("--out", tmp_path / "out", "--image-size", 32, "--epochs", 1, "--batch-size", 2, "--workers", 2)
    assert_one_line_error(run_command("illama/train.py", "--data", f"webdataset:{tars}", *out), "broken.jpg in ")


def _rewrite(path, change):
    """Changes the rows of a parquet file, a list of dicts."""
    pq.write_table(pa.Table.from_pylist(change(pq.read_table(path).to_pylist())), path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda row: {"picture": row["image"], "label": 0}, "no column image or img .*but picture, label"),
        (lambda row: {"image": row["image"]}, "no column label or fine_label or labels"),
        (lambda row: {"image": row["image"]["bytes"], "label": 0}, "column image is binary"),
        (lambda row: {**row, "label": "red"}, "column label is string"),
        (lambda row: {**row, "label": -1}, r"label -1, outside 0\.\."),
        (lambda row: {**row, "label": None if row["label"] == 1 else 1}, "a row has no label"),
    ],
)
def test_wrong_parquet_columns_and_rows(tmp_path, change, message):
    folder = _write_parquet(tmp_path / "set")
    for path in (folder / "data").glob("validation*"):
        _rewrite(path, lambda rows: [change(row) for row in rows])
    with pytest.raises(UserError, match=message):
        _open("parquet", folder)


def test_parquet_with_paths_instead_of_images(tmp_path):
    folder = _write_parquet(tmp_path / "set")
    path = _shard("parquet", folder, "validation", 1)
    _rewrite(
        path,
        lambda rows: [{**row, "image": {"bytes": None if i == 3 else b"", "path": "a"}} for i, row in enumerate(rows)],
    )
    with pytest.raises(UserError, match=rf"row 3 of .*{path.name} is only a path"):
        _open("parquet", folder).test()[VAL + 3]


@pytest.mark.parametrize(
    "members, message",
    [
        ({"a.png": b"", "b.cls": b"0"}, r"has no (label \(\.cls\)|image)"),
        ({"a.png": b"", "a.cls": b"cat"}, r"a\.cls .*b'cat'"),
        ({"a.png": b"", "a.cls": b"-1"}, "b'-1'"),
        ({"a.txt": b""}, r"no images in .*expected KEY\.jpg and KEY\.cls"),
        ({"a.png": b"", "a.cls": b"0"}, "one class only"),
    ],
)
def test_wrong_tar_members(tmp_path, members, message):
    with tarfile.open(tmp_path / "val-0.tar", "w") as tar:
        for name, content in members.items():
            _add(tar, name, content)
    with pytest.raises(UserError, match=message):
        _open("webdataset", tmp_path)


def test_missing_shards_splits_and_classes(kind, shards, tmp_path):
    with pytest.raises(UserError, match="no folder"):
        _open(kind, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no shards in"):
        _open(kind, tmp_path / "empty")
    if kind == "parquet":
        (away := _shard(kind, shards, "train")).rename(tmp_path / "away")
        with pytest.raises(UserError, match="2 of 3 train shards"):
            _open(kind, shards)
        (tmp_path / "away").rename(away)
    for number in range(3):
        _shard(kind, shards, "train", 0).rename(tmp_path / str(number))
    data = _open(kind, shards)
    assert len(data.test()) == 21  # sufficient for an evaluation
    with pytest.raises(UserError, match="no training shards"):
        data.training()
    for path in [*shards.rglob("*validation*")]:
        path.rename(path.with_name(path.name.replace("validation", "train")))
    with pytest.raises(UserError, match="no validation shards"):
        _open(kind, shards)


def test_training_labels_must_fit_the_classes(tmp_path):
    folder = _write_tars(tmp_path / "set")
    for names, message in (("a b", "label 2, outside 0..1"), ("a b c d", r"no training image of class 3 \(1 of 4")):
        (folder / "classes.txt").write_text("\n".join(names.split()))
        with pytest.raises(UserError, match=message):
            _open("webdataset", folder).training()
