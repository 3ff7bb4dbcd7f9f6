"""Options of an engine. Imports nothing slow, so that ``--help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from annotated_types import Interval

from illama.errors import UserError
from illama.options import BatchSize, check_bounds

LibraryName = Literal["tensorrt", "tensorrt_rtx"]
Verbosity = Literal["none", "layer-names", "detailed"]


def read_batch(text: str) -> tuple[int, int, int]:
    """1:8:64 -> (1, 8, 64), and 8 -> (8, 8, 8); raises UserError for other text."""
    try:
        sizes = [int(part) for part in text.split(":")]
        min_batch, opt_batch, max_batch = sizes * 3 if len(sizes) == 1 else sizes
    except ValueError as error:
        raise UserError(f"a batch must be MIN:OPT:MAX, such as 1:8:64, or one number, not {text!r}") from error
    return min_batch, opt_batch, max_batch


BatchRange = Annotated[
    tuple[BatchSize, BatchSize, BatchSize],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="MIN:OPT:MAX",
        instance_from_str=lambda texts: read_batch(texts[0]),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [":".join(map(str, value))],
    ),
]


@dataclass(frozen=True)
class EngineOptions:
    """How to build an engine.

    Attributes:
        targets: compute capabilities, such as sm86,sm89. Defaults to this GPU for tensorrt, and to Ampere and newer
            for tensorrt_rtx.
        batch: min, opt and max batch of the optimization profile; one number for all three.
        workspace_gib: maximum workspace memory of a layer in GiB; defaults to the library's limit.
        timing_cache: path to a file of kernel timings, which is read if it exists, and updated (full TensorRT only).
        refit: allow replacing the weights of the built engine.
        weight_stripped: build without weights; they are read from the ONNX file when the engine is loaded (refit).
        version_compatible: allow newer versions of the library to run the engine (full TensorRT only).
        hardware_compatible: allow all GPUs from Ampere on to run the engine, at a lower speed (full TensorRT only).
        verbosity: how much the engine reports about its layers. Every build proves that attention is fused; detailed
            also looks for the kernels by name (on a GPU that the engine is for).
        allow_unfused: build even if an attention cannot be fused.
    """

    targets: tuple[str, ...] = ()
    batch: BatchRange = (1, 8, 64)
    workspace_gib: Annotated[float, Interval(gt=0, le=1 << 20)] | None = None
    timing_cache: Path | None = None
    refit: bool = False
    weight_stripped: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False
    verbosity: Verbosity = "layer-names"
    allow_unfused: bool = False

    def __post_init__(self) -> None:
        check_bounds(self)
        if not 1 <= self.batch[0] <= self.batch[1] <= self.batch[2]:
            raise UserError(
                f"--batch must be MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX, not {':'.join(map(str, self.batch))}"
            )
        if self.timing_cache is not None and (self.timing_cache.is_dir() or not self.timing_cache.parent.is_dir()):
            raise UserError(f"--timing-cache must be a file in an existing folder, not {self.timing_cache}")

    def to_json(self) -> dict[str, Any]:
        """Returns all options but targets and batch, for which a record has fields of its own."""
        names = [field.name for field in fields(EngineOptions) if field.name not in ("targets", "batch")]
        values = {name: getattr(self, name) for name in names}
        return values | {"timing_cache": str(self.timing_cache) if self.timing_cache else None}
