"""Image files of every depth and orientation, compared with independent writers and readers; rejected files."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import get_args
from unittest import mock

import cv2
import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from torchvision.transforms import InterpolationMode, v2

from illama.data import images
from illama.data.images import Interpolation, decode_image, resize_and_crop, resize_weights
from illama.errors import UserError

CASES = Path(__file__).parents[1] / "data"
GRAY = np.random.default_rng(0).integers(0, 256, (6, 9), dtype=np.uint8)


def decode(content, exif="apply", mode="L", **more):
    return np.asarray(decode_image(io.BytesIO(content), lambda: "this one", exif, mode, **more))


def png(width, height, depth, kind, rows, *chunks):
    """Returns a PNG of the given rows of bytes, with further chunks before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


def gray_png(values, *chunks):
    """Returns a gray PNG of 16 bits."""
    height, width = values.shape
    return png(width, height, 16, 0, [row.astype(">u2").tobytes() for row in values], *chunks)


def tiff(values, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, values, **{"photometric": "minisblack", **options})
    return file.getvalue()


def scaled(values, top):
    return np.rint(np.clip(np.asarray(values, np.float64) / top, 0, 1) * 255)


def test_every_value_of_16_bits():
    values = np.arange(65536).reshape(256, 256)
    expected = scaled(values, 65535)
    assert np.array_equal(decode(gray_png(values)), expected)
    written = cv2.imencode(".png", values.astype(np.uint16))[1].tobytes()
    assert np.array_equal(decode(written), expected)
    for order in "<>":
        assert np.array_equal(decode(tiff(values.astype(np.uint16), byteorder=order)), expected)
    assert np.array_equal(decode(b"P5\n256 256\n65535\n" + values.astype(">u2").tobytes()), expected)
    assert np.array_equal(decode(gray_png(GRAY * np.uint16(257))), GRAY)


@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "f4"])
@pytest.mark.parametrize("order", "<>")
def test_a_tiff_is_scaled_by_the_depth_that_it_declares(kind, order):
    dtype = np.dtype(kind)
    if dtype.kind == "f":
        values, top = np.array([[0, 0.25, 0.5, 0.999, 1, -3, 2.5, np.inf, -np.inf]], dtype), 1
    else:
        top = np.iinfo(dtype).max
        values = np.array([[0, 1, top // 2, top // 3, top - 1, top, np.iinfo(dtype).min, top // 7, 100]], dtype)
    content = tiff(values, byteorder=order)
    if (kind, order) == ("u4", ">"):  # Pillow does not read it
        with pytest.raises(UserError, match="this one"):
            decode(content)
        return
    assert np.array_equal(decode(content), scaled(values, top))
    assert np.array_equal(decode(content, mode="RGB")[..., 1], scaled(values, top))
    compressed = tiff(values, byteorder=order, compression="zlib")
    try:
        assert np.array_equal(decode(compressed), scaled(values, top))
    except UserError:  # Pillow would swap the bytes twice
        assert order == ">" and kind in ("i2", "i4", "f4")


@pytest.mark.parametrize("values", [GRAY, GRAY * np.uint16(257), GRAY / np.float32(255)], ids=["8", "16", "float"])
def test_a_tiff_in_which_white_is_zero(values):
    assert np.array_equal(decode(tiff(values, photometric="miniswhite")), 255 - GRAY)


def test_12_bits_of_a_tiff():
    """Two pixels in three bytes, packed here, since no installed library writes them."""
    values = np.arange(4096).reshape(64, 64)
    pairs = values.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
    tags = {256: 64, 257: 64, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 64, 279: packed.size}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    content = struct.pack("<2sHI", b"II", 42, 8 + packed.size) + packed.astype(np.uint8).tobytes() + directory
    assert np.array_equal(decode(content), scaled(values, 4095))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_of_a_png(bits):
    values = np.arange(8) % 2**bits
    row = np.packbits(np.unpackbits(values.astype(np.uint8)[:, None], axis=1)[:, 8 - bits :].ravel()).tobytes()
    assert np.array_equal(decode(png(8, 1, bits, 0, [row]))[0], scaled(values, 2**bits - 1))


@pytest.mark.parametrize("highest", [1, 100, 255, 1023, 65535])
def test_a_pgm_is_scaled_by_its_highest_value(highest):
    values = np.linspace(0, highest, 50).round().astype(int)[None]
    binary = values.astype(">u2" if highest > 255 else "u1").tobytes()
    text = " ".join(map(str, values[0])).encode()
    for content in (b"P5\n50 1\n%d\n%b" % (highest, binary), b"P2\n50 1\n%d\n%b\n" % (highest, text)):
        assert np.abs(decode(content) - scaled(values, highest)).max() <= (0 if highest in (1, 255, 65535) else 1)


def test_the_upper_8_of_16_bits_of_colors_are_kept():
    colours = np.random.default_rng(1).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    content = cv2.imencode(".png", colours[..., ::-1])[1].tobytes()
    assert np.array_equal(decode(content, mode="RGB"), colours >> 8)


def test_an_image_with_nan_is_broken():
    with pytest.raises(UserError, match="this one"):
        decode(tiff(np.array([[0.5, np.nan]], np.float32)))


STORED = np.kron(np.array([[10, 200, 90], [160, 40, 240]], np.uint8), np.ones((16, 16), np.uint8))
UPRIGHT = {
    1: STORED,
    2: np.fliplr(STORED),
    3: np.rot90(STORED, 2),
    4: np.flipud(STORED),
    5: STORED.T,
    6: np.rot90(STORED, -1),
    7: np.rot90(STORED, 2).T,
    8: np.rot90(STORED),
}


def exif_of(orientation, order="<"):
    """Returns EXIF data with one entry."""
    mark = {"<": b"II", ">": b"MM"}[order]
    return struct.pack(f"{order}2sHIHHHIHHI", mark, 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def declaring(kind, orientation):
    """Returns a file of STORED with an orientation."""
    file, header = io.BytesIO(), b"Exif\0\0" + exif_of(orientation, ">" if orientation % 2 else "<")
    if kind == "TIFF":
        return tiff(STORED, extratags=[(0x0112, "H", 1, orientation, True)])
    if kind == "PNG":
        return gray_png(STORED * np.uint16(257), (b"eXIf", exif_of(orientation)))
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True, "exact": True}}[kind]
    Image.fromarray(STORED).convert("RGB").save(file, kind, exif=header, **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_declared_orientation_is_applied(kind, orientation):
    content, tolerance = declaring(kind, orientation), 2 if kind == "JPEG" else 0
    found = decode(content).astype(int)
    assert found.shape == UPRIGHT[orientation].shape and np.abs(found - UPRIGHT[orientation]).max() <= tolerance
    if kind == "JPEG":  # compared with an independent reader
        seen = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_GRAYSCALE)
        assert np.abs(found - seen).max() <= tolerance
    if kind != "TIFF":  # Pillow rotates a TIFF by itself
        assert np.abs(decode(content, "ignore").astype(int) - STORED).max() <= tolerance
    if kind == "PNG":
        assert np.array_equal(decode(content, mode=None), STORED * np.uint16(257))


@pytest.mark.parametrize(
    "damaged",
    [
        b"Exif\0\0",
        b"Exif\0\0MM",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        exif_of(9),
        b"\xff" * 40,
        exif_of(6)[:12],
        exif_of(0),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_damaged_metadata_is_ignored(kind, damaged, recwarn):
    file = io.BytesIO()
    Image.fromarray(STORED).convert("RGB").save(
        file, kind, exif=damaged, **({"lossless": True} if kind == "WEBP" else {})
    )
    assert np.abs(decode(file.getvalue()).astype(int) - STORED).max() <= 2
    assert not recwarn.list


def test_the_first_image_of_an_mpo_is_decoded():
    file = io.BytesIO()
    first, second = (Image.fromarray(array).convert("RGB") for array in (STORED, 255 - STORED))
    first.save(file, "MPO", save_all=True, append_images=[second], quality=95)
    assert Image.open(io.BytesIO(file.getvalue())).format == "MPO"
    assert np.abs(decode(file.getvalue()).astype(int) - STORED).max() <= 2


def test_other_formats_are_rejected_with_any_name(tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    for kind in ("EPS", "ICO", "TGA", "PCX", "SGI"):
        path = tmp_path / f"{kind}.jpg"
        Image.fromarray(STORED).convert("RGB").save(path, kind)
        with pytest.raises(UserError, match=rf"{kind}\.jpg"):
            decode_image(str(path), lambda path=path: str(path))
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UserError, match=r"pipe\.jpg"):
        decode_image(str(tmp_path / "pipe.jpg"), lambda: "pipe.jpg")
    for kind in images.FORMATS:
        Image.fromarray(STORED).convert("RGB").save(path, kind)
        assert decode_image(str(path), lambda: "").size == STORED.shape[::-1]


def test_values_of_a_label_map_are_never_scaled():
    packed = png(4, 1, 4, 0, [b"\x12\x34"])
    with pytest.raises(UserError, match="this one"):
        decode(packed, mode=None)
    file = io.BytesIO()
    indices = Image.fromarray(GRAY % 4).convert("L")
    indices.putpalette([0, 0, 0, 9, 9, 9, 200, 0, 0, 0, 50, 0])
    indices.save(file, "PNG")
    assert np.array_equal(decode(file.getvalue(), mode=None), GRAY % 4)


def test_the_size_is_checked_before_decoding():
    header = png(30_000, 20_000, 8, 0, [])  # without pixels
    for content, limit, identifier in (
        (header, None, "more than 89.5 million pixels"),
        (gray_png(np.zeros((20, 60))), 1199, "more than"),
        (png(1_000_001, 1, 1, 0, []), None, "1000000 along a side"),
    ):
        with pytest.raises(UserError, match=identifier):
            decode(content, max_pixels=limit)
    assert decode(gray_png(np.zeros((20, 60))), max_pixels=1200).shape == (20, 60)


@st.composite
def pictures(draw):
    """Draws (image, short, size) of long images: noise of any values, or black and white, whose resize overshoots."""
    narrow = draw(st.integers(1, 30))
    long = int(narrow * draw(st.floats(4, 300)))
    assume(long < 4000)
    # Pillow 12 shrinks a tall image in another order, with other rounding.
    tall = [(long, narrow)] if int(Image.__version__.split(".")[0]) >= 13 else []
    shape = draw(st.sampled_from([(narrow, long), *tall]))
    pixels = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, (*shape, 3), dtype=np.uint8)
    pixels = pixels // 128 * np.uint8(255) if draw(st.booleans()) else pixels
    size = draw(st.integers(1, 50)), draw(st.integers(1, 50))
    short = max(size) + draw(st.integers(0, 30))
    return Image.fromarray(pixels), short, size, draw(st.sampled_from(get_args(Interpolation)))


@settings(max_examples=80, deadline=None)
@given(pictures())
def test_the_crop_equals_the_crop_of_the_resized_image(case):
    picture, short, size, interpolation = case
    whole = v2.Compose([v2.Resize(short, InterpolationMode(interpolation)), v2.CenterCrop(size)])
    expected = np.asarray(whole(picture)).astype(int)
    assert np.array_equal(np.asarray(resize_and_crop(picture, short, size, interpolation)), expected)
    with mock.patch.object(images, "MAX_RESIZED", 0):
        assert np.abs(np.asarray(resize_and_crop(picture, short, size, interpolation)) - expected).max() <= 1


@pytest.mark.parametrize("shape", [(10, 12_000), (12_000, 10)])
def test_beyond_the_limit_the_crop_is_the_same(shape):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    whole = v2.Compose([v2.Resize(256, InterpolationMode.BICUBIC), v2.CenterCrop(224)])(picture)
    with mock.patch.object(images, "resize", side_effect=AssertionError("the whole picture was resized")):
        found = resize_and_crop(picture, 256, (224, 224))
    assert np.abs(np.asarray(found).astype(int) - np.asarray(whole)).max() <= 1


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from(get_args(Interpolation)), st.data())
@example(28, 28, "bicubic", None)
def test_the_weights_equal_pytorch_s(old, new, interpolation, data):
    first = data.draw(st.integers(0, new - 1)) if data else 0
    count = data.draw(st.integers(1, new - first)) if data else new
    expected = F.interpolate(
        torch.eye(old, dtype=torch.float64)[None, None], size=(new, old), mode=interpolation, antialias=True
    )[0, 0, first : first + count].numpy()
    low, weights = resize_weights(old, new, first, count, interpolation)
    found = np.zeros((count, old))
    found[:, low : low + weights.shape[1]] = weights
    np.testing.assert_allclose(found, expected, atol=1e-12)


MEMORY = """
import resource, sys
from PIL import Image
from illama.data.preprocessing import Preprocessing
from illama.errors import UserError
from illama.data.images import decode_image

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

def read(size, name):
    return transforms[size](decode_image(name, lambda: name))

transforms = {size: Preprocessing.imagenet(size).transform() for size in (224, 384)}
for transform in transforms.values():
    transform(Image.new("RGB", (300, 300)))
for name, megabytes in (("20000x1.png", 40), ("1x20000.png", 40), ("100000x100.png", 150)):
    for size in transforms:
        before = peak()
        assert read(size, name).shape == (3, size, size)
        assert peak() - before < megabytes, (name, size, peak() - before)
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000,) * 2)
try:
    read(224, "9000x9000.png")
except UserError as error:
    print(error)
"""


def test_memory_does_not_depend_on_the_shape(tmp_path):
    for width, height in ((20_000, 1), (1, 20_000), (100_000, 100), (9000, 9000)):
        Image.new("L", (width, height)).save(tmp_path / f"{width}x{height}.png")
    result = subprocess.run([sys.executable, "-c", MEMORY], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "9000x9000.png is too large for this machine's memory" in result.stdout
