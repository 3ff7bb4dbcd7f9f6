"""What an engine is built for and with. Imports nothing slow, so that ``--help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from illama.errors import UserError

LibraryName = Literal["tensorrt", "tensorrt_rtx"]
Verbosity = Literal["none", "layer-names", "detailed"]


def read_batch(text: str) -> tuple[int, int, int]:
    """1:8:64 -> (1, 8, 64); UserError for what is none."""
    try:
        smallest, best, largest = (int(part) for part in text.split(":"))
    except ValueError as error:
        raise UserError(f"--batch is smallest:best:largest, such as 1:8:64, not {text!r}") from error
    return smallest, best, largest


BatchRange = Annotated[
    tuple[int, int, int],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="MIN:BEST:MAX",
        instance_from_str=lambda texts: read_batch(texts[0]),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [":".join(map(str, value))],
    ),
]


@dataclass(frozen=True)
class EngineOptions:
    """What an engine is built for and with.

    Attributes:
        targets: compute capabilities, such as sm86,sm89; none for the library's portable default.
        batch: min, opt and max batch of the optimization profile.
        workspace_gib: memory that layers may use beside weights and activations; the library's own limit if not given.
        timing_cache: file of kernel timings, read if it is there and written back (full TensorRT).
        refit: allow weights to be replaced in the built engine.
        weight_stripped: leave the weights out; whoever loads it refits them from the ONNX file.
        version_compatible: let newer versions of the library run it (full TensorRT).
        hardware_compatible: let GPUs of Ampere and newer run it, at some speed (full TensorRT).
        verbosity: what the engine can tell of its layers.
        allow_unfused: build even if attention falls apart into pieces.
    """

    targets: tuple[str, ...] = ()
    batch: BatchRange = (1, 8, 64)
    workspace_gib: float | None = None
    timing_cache: Path | None = None
    refit: bool = False
    weight_stripped: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False
    verbosity: Verbosity = "layer-names"
    allow_unfused: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.batch[0] <= self.batch[1] <= self.batch[2]:
            raise UserError(
                f"--batch is smallest:best:largest, from 1 and rising, not {':'.join(map(str, self.batch))}"
            )
        if self.workspace_gib is not None and not self.workspace_gib > 0:
            raise UserError(f"--workspace-gib must be more than 0, not {self.workspace_gib}")
        if self.timing_cache is not None and (self.timing_cache.is_dir() or not self.timing_cache.parent.is_dir()):
            raise UserError(f"--timing-cache is a file in a folder that is there, not {self.timing_cache}")

    def to_json(self) -> dict[str, Any]:
        """Everything of how to build but targets and batch, which a record has of its own."""
        names = [field.name for field in fields(EngineOptions) if field.name not in ("targets", "batch")]
        values = {name: getattr(self, name) for name in names}
        return values | {"timing_cache": str(self.timing_cache) if self.timing_cache else None}
