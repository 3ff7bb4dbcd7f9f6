"""Download a small data set of color drawings, emoji in three styles: python benchmarks/fetch_emoji.py FOLDER

It has about 5,600 drawings in nine categories, as 64x64 RGB PNG files on white, in ImageNet's layout (train/CATEGORY
and val/CATEGORY), for ``--data FOLDER``. They are few, and drawings, not photographs, for tests with color images where
no larger data set is available.

npm provides the packages at fixed versions and checks their SHA-512. val/ contains about a fifth of the concepts, and
none that is in train/ in another style or variant, see :func:`concept_of`.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image
from tqdm import tqdm

from illama.cli import run_command
from illama.atomic_write import write_folder
from illama.errors import UserError

SIZE = 64
HELD_OUT_TENTHS = 2
LICENCES = "LICENCES.txt"
TITLE = "Emoji in three styles, by python benchmarks/fetch_emoji.py\n"


@dataclass(frozen=True)
class Source:
    """An npm package; its drawings are the files ``folder``/CODE.``suffix``."""

    package: str
    version: str
    folder: str
    suffix: str
    licence: str


SOURCES = {
    "google": Source("emoji-datasource-google", "16.0.0", "img/google/64", "png", "Apache-2.0 (Noto Emoji, Google)"),
    "twitter": Source(
        "emoji-datasource-twitter",
        "16.0.0",
        "img/twitter/64",
        "png",
        "CC-BY-4.0 (Twemoji, Twitter, Inc and other contributors)",
    ),
    "fluent": Source(
        "@lobehub/fluent-emoji-3d", "1.1.0", "assets", "webp", "MIT (Fluent Emoji, Microsoft; packed by LobeHub)"
    ),
}
TABLE = "emoji.json"  # file in Google's package: code points and category of every emoji

# A woman pilot, a man pilot and a pilot are drawn alike, and are one concept, "pilot".
JOINERS = {"200d", "fe0f", "2640", "2642", *(f"1f3f{tone}" for tone in "bcdef")}
PEOPLE = {"1f466", "1f467", "1f468", "1f469", "1f46a", "1f9d1", "1f9d2"}


@dataclass(frozen=True)
class FetchOptions:
    """Download emoji in three styles (about 150 MB) and write them as train/CATEGORY and val/CATEGORY.

    Attributes:
        folder: path to the new folder; an earlier result of this command there is replaced.
    """

    folder: Annotated[Path, tyro.conf.Positional]


@dataclass(frozen=True)
class Drawing:
    """A drawing on white, and its concept, which determines its split."""

    style: str
    code: str
    category: str
    concept: str
    image: Image.Image


def download(source: Source, folder: Path) -> Path:
    """Downloads the package's archive into ``folder`` with npm, which checks its SHA-512."""
    if not shutil.which("npm"):
        raise UserError("npm is not installed: on Debian or Ubuntu run 'apt-get install npm'")
    command = ["npm", "pack", "--ignore-scripts", "--pack-destination", str(folder)]
    result = subprocess.run([*command, f"{source.package}@{source.version}"], capture_output=True, text=True)
    archives = list(folder.glob("*.tgz"))
    if result.returncode or len(archives) != 1:
        said = [line for line in result.stderr.splitlines() if line.startswith(("npm error", "npm ERR!"))]
        reason = said[0].split(maxsplit=2)[-1] if said else f"exit status {result.returncode}"
        raise UserError(f"npm could not download {source.package} {source.version} ({reason}): try again later")
    return archives[0]


def read_package(source: Source, archive: Path) -> tuple[dict[str, bytes], bytes]:
    """Returns the drawings by code, and the table of emoji, which is empty if the package has none.

    Raises:
        UserError: the archive is damaged or of another version.
    """
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                name = member.name.partition("/")[2]
                content = tar.extractfile(member)
                if content and (name in ("package.json", TABLE) or Path(name).parent == Path(source.folder)):
                    files[name] = content.read()
        version = json.loads(files.pop("package.json"))["version"]
    except (tarfile.TarError, EOFError, OSError, KeyError, ValueError) as error:
        raise UserError(f"the archive of {source.package} is damaged: run the command again") from error
    if version != source.version:
        raise UserError(f"npm gave {source.package} {version}, not {source.version}: run the command again")
    table = files.pop(TABLE, b"")
    return {Path(name).stem: data for name, data in files.items() if name.endswith(f".{source.suffix}")}, table


def spellings(code: str) -> list[str]:
    """Returns the file names of a code in different packages: with or without variation selector and leading zeros."""
    forms = [code, code.replace("-fe0f", "")]
    return forms + ["-".join(point.lstrip("0") for point in form.split("-")) for form in forms]


def concept_of(code: str) -> str:
    """Returns the concept of an emoji: its first code point that is not a person, joiner, gender sign or skin tone.

    The concept of a flag is all of its letters. People without any other code point are one concept.
    """
    points = code.split("-")
    if points[0].startswith("1f1"):
        return code
    return next((point for point in points if point not in JOINERS | PEOPLE), "people")


def is_held_out(concept: str) -> bool:
    """Returns whether a concept belongs to val/, by a hash, so that the split is the same on every machine."""
    return int.from_bytes(hashlib.sha256(concept.encode()).digest()[:8], "big") % 10 < HELD_OUT_TENTHS


def on_white(content: bytes) -> Image.Image:
    """Returns a transparent drawing as a 64x64 RGB image on white."""
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def fetch_drawings() -> list[Drawing]:
    """Returns all drawings of all styles, without bare skin tones (category "Component")."""
    packages: dict[str, dict[str, bytes]] = {}
    table = b""
    for style, source in tqdm(SOURCES.items(), desc="fetch", unit="package", disable=None):
        with tempfile.TemporaryDirectory() as folder:
            packages[style], found = read_package(source, download(source, Path(folder)))
            table = table or found
    entries = [entry for entry in json.loads(table) if entry["category"] != "Component"]
    drawings = []
    for entry in tqdm(entries, desc="draw", unit="emoji", disable=None):
        code = entry["unified"].lower()
        category = entry["category"].lower().replace(" & ", "-and-")
        for style, files in packages.items():
            name = next((name for name in spellings(code) if name in files), None)
            if name:  # the fluent style lacks some
                drawings.append(Drawing(style, code, category, concept_of(code), on_white(files[name])))
    return drawings


def without_repeats(drawings: list[Drawing]) -> list[Drawing]:
    """Removes repeated images, and merges concepts that a style draws alike (the flags of Norway and Svalbard)."""
    first: dict[bytes, Drawing] = {}
    same: dict[str, str] = {}

    def root(concept: str) -> str:
        return root(same[concept]) if concept in same else concept

    for drawing in drawings:
        known = first.setdefault(drawing.image.tobytes(), drawing)
        low, high = sorted((root(known.concept), root(drawing.concept)))
        if low != high:
            same[high] = low
    return [replace(drawing, concept=root(drawing.concept)) for drawing in first.values()]


def write(drawings: list[Drawing], folder: Path) -> None:
    """Writes the drawings to their splits and categories, with the licenses of the sources."""
    counts: Counter[tuple[str, str]] = Counter()
    for drawing in drawings:
        split = "val" if is_held_out(drawing.concept) else "train"
        place = folder / split / drawing.category
        place.mkdir(parents=True, exist_ok=True)
        drawing.image.save(place / f"{drawing.style}-{drawing.code}.png")
        counts[split, drawing.category] += 1
    lines = [f"{style}: {s.package} {s.version}, {s.licence}" for style, s in SOURCES.items()]
    changes = "Changed here: put on white, resized to 64x64, repeats taken out; split by concept."
    (folder / LICENCES).write_text("\n".join([TITLE, *lines, "", changes]) + "\n")
    print(f"{'category':20} {'train':>6} {'val':>6}")
    for category in sorted({category for _, category in counts}):
        print(f"{category:20} {counts['train', category]:6} {counts['val', category]:6}")
    totals = [sum(n for (split, _), n in counts.items() if split == name) for name in ("train", "val")]
    print(f"{'all':20} {totals[0]:6} {totals[1]:6}")


def is_ours(folder: Path) -> bool:
    """Returns whether this command wrote a folder, so that it may be replaced."""
    return (folder / LICENCES).is_file() and (folder / LICENCES).read_text().startswith(TITLE)


def main(options: FetchOptions) -> None:
    with write_folder(options.folder, is_ours) as draft:
        drawings = fetch_drawings()
        kept = without_repeats(drawings)
        write(kept, draft)
    print(f"{len(drawings) - len(kept)} repeats and the category Component (bare skin tones) left out")


if __name__ == "__main__":
    run_command(FetchOptions, main)
