"""Records of engines: how each was built, its inputs, and the SHA-256 that is checked before it is loaded.

An engine is a folder in its bundle, ``engines/NAME``. Earlier versions wrote ``engines/LIBRARY.engine`` and ``.json``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from deploy.trt.engine_options import LibraryName
from illama.atomic_write import list_folder
from illama.bundle import ENGINES, GoldenImages, sha256
from illama.errors import UserError
from illama.structured_files import check_regular, read_json

FORMAT = 2
Binding = tuple[Literal["float", "uint8"], tuple[int, ...]]  # dtype and shape of an input or output
ENGINE, RECORD, RUNTIME_CACHE = "model.engine", "record.json", "runtime-cache"


@dataclass(frozen=True)
class EngineRecord:
    """The JSON beside an engine.

    Attributes:
        onnx_sha256: SHA-256 of the graph that it was built from.
        engine_sha256: SHA-256 of the engine.
        engine_bytes: size of the engine.
        library: tensorrt or tensorrt_rtx.
        library_version: version that built it; unless it is version-compatible, no other version can load it.
        targets: compute capabilities; empty for the library's default.
        batch: min, opt and max batch of the optimization profile.
        options: other options (:meth:`EngineOptions.to_json`).
        precisions: layer -> dtype of its product in the graph.
        attentions: number of attentions.
        fused: whether each attention is one operator in the scheme's precision; False if --allow-unfused was given.
        inputs: name of the one input -> its dtype and shape, with -1 for the batch.
        outputs: likewise, of the one output.
        preprocessing: :class:`illama.data.preprocessing.Preprocessing` as a dict; in the engine if its input is uint8.
        classes: names of the classes, in the order of the logits.
        golden_answers: the images of the golden answers beside the engine.
        trtexec: command of the library's own tool that builds an equivalent engine, run in the bundle's folder.
    """

    onnx_sha256: str
    engine_sha256: str
    engine_bytes: int
    library: LibraryName
    library_version: str
    targets: tuple[str, ...]
    batch: tuple[int, int, int]
    options: dict[str, Any]
    precisions: dict[str, str]
    attentions: int
    fused: bool
    inputs: dict[str, Binding]
    outputs: dict[str, Binding]
    preprocessing: dict[str, Any]
    classes: list[str]
    trtexec: str
    golden_answers: GoldenImages | None = None
    format: int = FORMAT

    def __post_init__(self) -> None:
        if len(self.inputs) != 1 or len(self.outputs) != 1:
            raise UserError(f"it has {len(self.inputs)} inputs and {len(self.outputs)} outputs: build the engine again")

    @property
    def origin(self) -> tuple[Any, ...]:
        """Everything that determines an engine; engines with equal origins are interchangeable."""
        return (self.onnx_sha256, self.library, self.library_version, self.targets, self.batch, self.options)

    def write(self, engine: Path) -> None:
        """Writes the record beside ``engine``."""
        record_path(engine).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, engine: Path) -> EngineRecord:
        """Reads the record of an engine, and verifies the engine by its SHA-256.

        Raises:
            UserError: the engine or the record is missing, the record is damaged, or it belongs to another engine.
        """
        path = record_path(engine)
        if (found := read_json(path, _Facts, "ignore").format) != FORMAT:
            raise UserError(f"{path} has format {found}, this version reads {FORMAT}: build the engine again")
        record = read_json(path, cls, "ignore")
        check_regular(engine)
        actual = sha256(engine)
        if actual != record.engine_sha256:
            raise UserError(
                f"{engine} does not match the SHA-256 in its {path.name} and is not loaded: build the engine again"
            )
        return record


def record_path(engine: Path) -> Path:
    """Returns the path of the record of an engine."""
    return engine.with_name(RECORD) if engine.name == ENGINE else engine.with_suffix(".json")


def find_engines(bundle: Path, library: str | None = None) -> list[Path]:
    """Returns the engine files of a bundle, sorted by name.

    Args:
        library: tensorrt or tensorrt_rtx, to return only its engines and those whose record cannot be read.
    """
    folder = bundle / ENGINES
    paths = [path / ENGINE if path.is_dir() else path for path in list_folder(folder)] if folder.is_dir() else []
    engines = [path for path in paths if path.suffix == ".engine" and path.exists()]
    return [each for each in engines if library is None or _library_of(each) in (library, None)]


def _library_of(engine: Path) -> str | None:
    try:
        return read_json(record_path(engine), _Facts, "ignore").library
    except UserError:
        return None


@dataclass(frozen=True)
class _Facts:
    """The fields of a record of any format that are read first."""

    format: int = 1
    library: str | None = None
