"""What is written beside an engine, so that it can be trusted, found again and used by those who did not build it.

An engine is a folder in its bundle, ``engines/NAME``. Earlier versions wrote ``engines/LIBRARY.engine`` and ``.json``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from illama.atomic_write import list_folder
from illama.bundle import ENGINES, sha256
from illama.errors import UserError

FORMAT = 2
ENGINE, RECORD, RUNTIME_CACHE = "model.engine", "record.json", "runtime-cache"


@dataclass(frozen=True)
class EngineRecord:
    """The JSON beside an engine.

    Attributes:
        onnx_sha256, engine_sha256: of the file it was built from and of the engine.
        library, library_version: what built it, and (unless version-compatible) the only version that reads it.
        targets: compute capabilities; empty for the library's own choice.
        options: what else it was built with, as :class:`deploy.trt.builder.EngineOptions` has it.
        precisions: layer -> the type its product is computed in, by the graph.
        attentions: how many there are.
        fused: whether each is one operator that could not be decomposed, in the precision asked for.
        inputs, outputs: name -> [type, shape], -1 for the batch.
        preprocessing: :class:`illama.data.datasets.Preprocessing` as a dict; the graph's own work if the input is
            uint8.
        classes: names of the classes, in the order of the logits.
        trtexec: the command that builds the like.
    """

    onnx_sha256: str
    engine_sha256: str
    engine_bytes: int
    library: str
    library_version: str
    targets: tuple[str, ...]
    batch: tuple[int, int, int]
    options: dict[str, Any]
    precisions: dict[str, str]
    attentions: int
    fused: bool
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    preprocessing: dict[str, Any]
    classes: list[str]
    trtexec: str
    format: int = FORMAT

    @property
    def origin(self) -> tuple[Any, ...]:
        """What decides an engine; two of one origin do the same."""
        return (self.onnx_sha256, self.library, self.library_version, self.targets, self.batch, self.options)

    def write(self, engine: Path) -> None:
        """Write it beside ``engine``."""
        record_path(engine).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, engine: Path) -> EngineRecord:
        """The record beside an engine, whose bytes are those it speaks of.

        Raises:
            UserError: no such engine or record, a damaged one, or another engine's.
        """
        path = record_path(engine)
        try:
            values = json.loads(path.read_text())
            if values["format"] != FORMAT:
                raise UserError(f"{path} is of format {values['format']}, this version reads {FORMAT}: build it again")
            values |= {key: tuple(values[key]) for key in ("targets", "batch")}
            record = cls(**{field.name: values[field.name] for field in fields(cls)})
            actual = sha256(engine)
        except OSError as error:
            raise UserError(f"cannot read {error.filename} ({error.strerror}): run python deploy/build.py") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: build the engine again with python deploy/build.py") from error
        if actual != record.engine_sha256:
            raise UserError(f"{engine} is not the engine that {path.name} speaks of, and is not loaded: build it again")
        return record


def record_path(engine: Path) -> Path:
    """Where the record of an engine is."""
    return engine.with_name(RECORD) if engine.name == ENGINE else engine.with_suffix(".json")


def find_engines(bundle: Path, library: str | None = None) -> list[Path]:
    """The engine files of a bundle, in the order of their names.

    Args:
        library: tensorrt or tensorrt_rtx, whose engines are wanted. One whose record cannot be read may be of any.
    """
    folder = bundle / ENGINES
    paths = [path / ENGINE if path.is_dir() else path for path in list_folder(folder)] if folder.is_dir() else []
    engines = [path for path in paths if path.suffix == ".engine" and path.exists()]
    return [each for each in engines if library is None or _library_of(each) in (library, None)]


def _library_of(engine: Path) -> str | None:
    try:
        return str(json.loads(record_path(engine).read_text())["library"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
