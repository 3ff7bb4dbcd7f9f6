"""What is written beside an engine, so that it can be trusted, found again and used by those who did not build it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from illama.atomic_write import write_file
from illama.bundle import sha256
from illama.errors import UserError

FORMAT = 2


@dataclass(frozen=True)
class EngineRecord:
    """The JSON beside an engine, under the same name.

    Attributes:
        onnx_sha256, engine_sha256: of the file it was built from and of the engine.
        library, library_version: what built it, and (unless version-compatible) the only version that reads it.
        targets: compute capabilities; empty for the library's own choice.
        options: what else it was built with, as :class:`deploy.builder.EngineOptions` has it.
        precisions: layer -> the type its product is computed in, by the graph.
        attentions: how many there are.
        fused: whether each is one operator that could not be decomposed, in the precision asked for.
        inputs, outputs: name -> [type, shape], -1 for the batch.
        preprocessing: :class:`illama.data.Preprocessing` as a dict; the graph's own work if the input is uint8.
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

    def write(self, engine: Path) -> None:
        """Write it beside ``engine``."""
        with write_file(record_path(engine)) as draft:
            draft.write_text(json.dumps(asdict(self), indent=2) + "\n")

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
        except FileNotFoundError as error:
            raise UserError(f"there is no {error.filename}: build the engine with python deploy/build.py") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: build the engine again with python deploy/build.py") from error
        if actual != record.engine_sha256:
            raise UserError(f"{engine} is not the engine that {path.name} speaks of, and is not loaded: build it again")
        return record


def record_path(engine: Path) -> Path:
    """Where the JSON of an engine stands."""
    return engine.with_suffix(".json")
