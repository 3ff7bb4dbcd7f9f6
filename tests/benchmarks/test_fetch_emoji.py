"""benchmarks/fetch_emoji.py with a substitute for npm that provides small packages of the same layout."""

import io
import json
import os
import runpy
import tarfile

import numpy as np
import pytest
from PIL import Image
from support import ROOT, assert_one_line_error, run_command

from illama.data.datasets import open_data
from illama.errors import UserError

SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "fetch_emoji.py"))
SOURCES, concept_of, is_held_out = (SCRIPT[name] for name in ("SOURCES", "concept_of", "is_held_out"))

NPM = """#!/bin/sh
[ -d "$STORE" ] || { echo "npm error code ECONNREFUSED" >&2; exit 1; }
cp "$STORE/$(echo "$5" | tr / _).tgz" "$4/"
"""
CODES = [f"{0x1F500 + i:X}" for i in range(60)] + ["0023-FE0F-20E3", "1F468-200D-2708-FE0F", "1F469-200D-2708-FE0F"]
FLAGS = [f"1F1E6-1F1{0xE6 + i:X}" for i in range(20)]


def _picture(code, style, size):
    """Returns noise with transparency; the first two flags are equal in the style "twitter"."""
    code = FLAGS[0] if style == "twitter" and code == FLAGS[1] else code
    pixels = np.random.default_rng((int(code.replace("-", "")[:12], 16), len(style))).integers(0, 256, (size, size, 4))
    pixels[0, 0] = 0
    return Image.fromarray(pixels.astype(np.uint8))


def _write_package(store, style, version):
    """Writes a package; the fluent style has no variation selectors, leading zeros or first code."""
    source = SOURCES[style]
    table = [{"unified": code, "category": "Travel & Places"} for code in CODES]
    table += [{"unified": code, "category": "Flags"} for code in FLAGS]
    table += [{"unified": "1F3FB", "category": "Component"}]
    files = {"package.json": json.dumps({"version": version}).encode()}
    if style != "fluent":
        files["emoji.json"] = json.dumps(table).encode()
    for entry in table[style == "fluent" :]:
        name, buffer = entry["unified"].lower(), io.BytesIO()
        name = name.replace("-fe0f", "").lstrip("0") if style == "fluent" else name
        size = 80 if style == "fluent" else 64
        _picture(entry["unified"], style, size).save(buffer, {"png": "png", "webp": "webp"}[source.suffix])
        files[f"{source.folder}/{name}.{source.suffix}"] = buffer.getvalue()
    with tarfile.open(store / f"{source.package.replace('/', '_')}@{source.version}.tgz", "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The folder from which the substitute for npm copies."""
    folder, programs = tmp_path / "store", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    (programs / "npm").write_text(NPM)
    (programs / "npm").chmod(0o755)
    for style in SOURCES:
        _write_package(folder, style, SOURCES[style].version)
    monkeypatch.setenv("STORE", str(folder))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return folder


def _fetch(folder):
    SCRIPT["main"](SCRIPT["FetchOptions"](folder))


def _contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_data_set_has_imagenet_s_layout(store, tmp_path, capsys):
    folder = tmp_path / "emoji"
    _fetch(folder)
    data = open_data(str(folder))
    assert data.classes == ("flags", "travel-and-places")
    assert len(data.test()) + len(data.calibration(1).dataset) == 3 * 83 - 2  # the fluent style lacks one, one repeats
    assert (
        "1 repeats" in capsys.readouterr().out
        and "emoji-datasource-twitter 16.0.0, CC-BY" in (folder / "LICENCES.txt").read_text()
    )

    splits = {
        split: [path.stem.partition("-")[2] for path in (folder / split).rglob("*.png")] for split in ("train", "val")
    }
    assert all("google-23" not in name for name in splits["train"] + splits["val"])
    assert not {concept_of(code) for code in splits["train"]} & {concept_of(code) for code in splits["val"]}
    assert sum(FLAGS[0].lower() in codes for codes in splits.values()) == 1  # drawn alike: one concept, one split
    assert sum(bool({code.lower() for code in FLAGS[:2]} & set(codes)) for codes in splits.values()) == 1

    with Image.open(next(folder.rglob(f"google-{CODES[5].lower()}.png"))) as image:
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (64, 64), (255, 255, 255))
    first = _contents(folder)
    _fetch(folder)
    assert _contents(folder) == first


def test_concepts():
    assert concept_of("1f468-200d-2708-fe0f") == concept_of("1f469-1f3fd-200d-2708-fe0f") == "2708"
    assert concept_of("1f468-200d-1f466") == concept_of("1f9d1") == "people"
    assert concept_of("1f3c3-200d-2640-fe0f") == "1f3c3"
    assert concept_of("0023-fe0f-20e3") == "0023"
    assert concept_of("1f1eb-1f1f7") == "1f1eb-1f1f7"
    held = sum(is_held_out(f"{number:x}") for number in range(10_000))
    assert held / 10_000 == pytest.approx(0.2, abs=0.02)


def test_errors(store, tmp_path, monkeypatch):
    other, emoji = tmp_path / "other", tmp_path / "emoji"
    other.mkdir()
    (other / "file").write_text("mine")
    with pytest.raises(UserError, match="other files"):
        _fetch(other)
    _write_package(store, "twitter", "15.0.0")
    with pytest.raises(UserError, match=r"emoji-datasource-twitter 15\.0\.0, not 16\.0\.0"):
        _fetch(emoji)
    (archive,) = store.glob("*twitter*")
    archive.write_bytes(archive.read_bytes()[:2000])
    with pytest.raises(UserError, match="emoji-datasource-twitter"):
        _fetch(emoji)
    monkeypatch.setenv("STORE", "/nowhere")
    with pytest.raises(UserError, match="ECONNREFUSED"):
        _fetch(emoji)
    assert not list(tmp_path.glob("*emoji*"))


def test_without_npm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    result = run_command("benchmarks/fetch_emoji.py", tmp_path / "emoji")
    assert_one_line_error(result, "apt-get install npm")
