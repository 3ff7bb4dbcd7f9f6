"""Options that choose an older ONNX opset. Imports nothing slow, so that ``--help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from deploy.versions import Target, find_target, opset_target
from illama.errors import UserError

TargetName = Annotated[str, find_target]


@dataclass(frozen=True)
class OpsetOptions:
    """Which runtimes the graphs are for.

    Attributes:
        opset: ONNX opset of the graphs: 17 (for TensorRT 8.5), 19 (for TensorRT 10.0) or 21 (for 10.6) instead of 23.
        load_in: write graphs that load in the runtimes of jetpack-5, jetpack-6.0, jetpack-6 (6.1 and 6.2), jetpack-7.0
            or jetpack-7 (7.2), or in one runtime, such as onnxruntime-1.20 or tensorrt-8.6.
    """

    opset: Literal[17, 19, 21] | None = None
    load_in: Annotated[TargetName | None, tyro.conf.arg(name="for")] = None

    def __post_init__(self) -> None:
        if self.opset and self.load_in:
            raise UserError("--opset and --for both choose the opset: give one of them")

    @property
    def target(self) -> Target | None:
        """What the graphs must load in; None if neither option is given."""
        if self.load_in:
            return find_target(self.load_in)
        return opset_target(self.opset) if self.opset else None
