"""Files from outside that claim more than they hold, or are not what they seem: refused in one line, at once."""

import gzip
import io
import os
import tarfile
import time
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from support import SMALL, write_images

from illama import ILLaMA
from illama.checkpoints.load import load_checkpoint
from illama.data.datasets import open_data
from illama.data.idx_files import read_idx
from illama.errors import UserError


def _refused(read, *words):
    start = time.perf_counter()
    with pytest.raises(UserError) as caught:
        read()
    message = str(caught.value)
    assert time.perf_counter() - start < 5 and "\n" not in message and len(message) <= 300
    assert all(word in message for word in words), message


TENSORS = {
    "one value with strides of 0 and terabytes": torch.zeros(1).expand(1 << 20, 1 << 20),
    "sparse": torch.eye(4).to_sparse(),
    "meta": torch.zeros(3, device="meta"),
    "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "complex": torch.zeros(3, dtype=torch.complex64),
    "float8": torch.zeros(3).to(torch.float8_e4m3fn),
    "no tensor": [1, 2],
}


@pytest.mark.parametrize("value", TENSORS.values(), ids=TENSORS)
def test_tensors_that_a_network_cannot_have_are_refused(value, tmp_path):
    path = tmp_path / "a.pth"
    torch.save({**ILLaMA(SMALL).state_dict(), "extra": value}, path)
    _refused(lambda: load_checkpoint(path), "a.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["blocks.99999999.norm1.weight", "blocks.1023.norm1.weight"])
def test_the_depth_that_names_claim_is_bounded_by_the_tensors(name, suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    state = {**ILLaMA(SMALL).state_dict(), name: torch.zeros(64)}
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    _refused(lambda: load_checkpoint(path), "depth")


def test_names_must_be_text_and_a_compressed_archive_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({3: torch.zeros(3)}, path)
    _refused(lambda: load_checkpoint(path), "a.pth")
    torch.save({"a": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in members.items():
            new.writestr(name, content)
    _refused(lambda: load_checkpoint(path), "a.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_pipe_is_not_waited_for(suffix, tmp_path):
    os.mkfifo(tmp_path / f"a{suffix}")
    _refused(lambda: load_checkpoint(tmp_path / f"a{suffix}"), "regular")


@pytest.mark.parametrize(
    "content",
    [
        b"\0\0\x08\x01" + (1 << 31).to_bytes(4, "big"),
        b"\0\0\x08\x03" + bytes([255] * 12),
        b"\0\0\x08\xff" + bytes(2000),
        b"\0\0\x08\x01\0\0\0\x02abc",
        b"\0\0\x08\x01\0\0\0\x05abc",
        b"",
    ],
)
def test_an_idx_file_with_another_size_than_its_header_says_is_refused(content, tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(content))
    _refused(lambda: read_idx(tmp_path / "a.gz"), "a.gz")


def _png():
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def _member(name, content=b"", **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in fields.items():
        setattr(member, key, value)
    return member, io.BytesIO(content)


LABEL = {
    "huge": [_member("0.cls", b"999999999")],
    "negative": [_member("0.cls", b"-1")],
    "long": [_member("0.cls", b"1" * 5000)],
    "a link": [_member("0.cls", type=tarfile.SYMTYPE, linkname="/etc/passwd")],
    "a folder": [_member("0.cls", type=tarfile.DIRTYPE)],
    "twice": [_member("0.cls", b"1"), _member("0.cls", b"1")],
}


@pytest.mark.parametrize("members", LABEL.values(), ids=LABEL)
def test_a_tar_with_a_bad_label_is_refused(members, tmp_path):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}-0.tar", "w") as tar:
            for member, content in [_member("0.png", _png()), *members]:
                content.seek(0)
                tar.addfile(member, content)
    _refused(lambda: open_data(f"webdataset:{tmp_path}"))


def test_a_tar_whose_member_has_a_negative_size_is_refused(tmp_path):
    with tarfile.open(tmp_path / "val-0.tar", "w") as tar:
        tar.addfile(*_member("0.png", _png()))
    content = bytearray((tmp_path / "val-0.tar").read_bytes())
    content[124:136] = b"\xff" * 12
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    (tmp_path / "val-0.tar").write_bytes(content)
    _refused(lambda: open_data(f"webdataset:{tmp_path}"), "val-0.tar")


@pytest.mark.parametrize("label", [2**40, -(2**63), 999_999_999, -1])
def test_a_label_of_a_parquet_file_is_bounded(label, tmp_path):
    table = pa.table({"image": [{"bytes": _png(), "path": ""}] * 2, "label": [0, label]})
    for split in ("train", "val"):
        pq.write_table(table, tmp_path / f"{split}-0.parquet")
    _refused(lambda: open_data(f"parquet:{tmp_path}"), str(label))


def test_rows_that_take_no_space_are_refused(tmp_path):
    rows = 10_000_000
    image = pa.nulls(rows, pa.struct({"bytes": pa.binary()}))
    table = pa.table({"image": image, "label": pa.array(np.zeros(rows, np.int8))})
    pq.write_table(table, tmp_path / "val-0.parquet", row_group_size=rows)
    assert (tmp_path / "val-0.parquet").stat().st_size < rows
    _refused(lambda: open_data(f"parquet:{tmp_path}"), "val-0.parquet")


def test_links_that_lead_to_each_other_end_and_names_must_be_utf8(tmp_path):
    folder = write_images(tmp_path / "images", train=1, val=1)
    for name in ("a", "b"):
        (folder / "val" / "class0" / name).symlink_to(folder / "val" / "class0")
    assert len(open_data(str(folder)).test()) == 3
    (folder / "val" / os.fsdecode(b"\xff")).mkdir()
    _refused(lambda: open_data(str(folder)), "UTF-8")
