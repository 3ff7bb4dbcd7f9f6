"""TensorRT engines, one interface to all runtimes, graph rewrites, and serving.

:func:`build` does for one bundle what ``python deploy/build.py`` does for several.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deploy.trt.engine_options import LibraryName

__all__ = ["build"]


def build(
    bundle: str | Path,
    targets: Sequence[str] = (),
    batch: tuple[int, int, int] = (1, 8, 64),
    library: LibraryName | None = None,
) -> Path:
    """Builds a TensorRT engine of a bundle; an engine of the same graph, library and options is kept.

    Args:
        bundle: path to a bundle with a ``model.fused.onnx``.
        targets: compute capabilities, such as ``("sm86", "sm89")``. Defaults to this GPU for TensorRT, and to Ampere
            and newer for TensorRT-RTX.
        batch: min, opt and max batch of the optimization profile.
        library: ``"tensorrt"`` or ``"tensorrt_rtx"``. Defaults to the first of the two that can build here.

    Returns:
        The path of the engine, in ``bundle/engines/``.

    Raises:
        UserError: no library can build here, it cannot build for a target, the bundle has no graph for TensorRT or
            one that no target supports, or an attention does not become one fused operator.
    """
    from deploy.trt.build_bundle import build_supported
    from deploy.trt.engine_options import EngineOptions
    from deploy.trt.library import require_library
    from illama.errors import UserError

    options = EngineOptions(tuple(targets), batch)
    path, reason = build_supported(require_library(library), Path(bundle), options)
    if path is None:
        raise UserError(f"{bundle}: {reason}; use INT8 there")
    return path
