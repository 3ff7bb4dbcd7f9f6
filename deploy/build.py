"""Build TensorRT engines from bundles: python deploy/build.py runs/ptq/int8 --targets sm86,sm89 --batch 1:8:64

Works without a GPU where tensorrt-rtx is installed. The build fails unless every attention is one fused operator in
the precision that the scheme asks for (deploy/fusion.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from deploy.builder import BuiltEngine, EngineOptions, build_engine, check_kernels, trtexec_line
from deploy.graph import has_fp8, load_graph, precisions
from deploy.record import EngineRecord
from deploy.tensorrt_library import Library, LibraryName, find_library
from illama.atomic_write import write_file
from illama.bundle import ENGINES, FUSED_ONNX, Manifest, sha256
from illama.errors import UserError, run_command

FP8_OLDEST = 89


@dataclass(frozen=True)
class BuildOptions(EngineOptions):
    """Build a TensorRT engine for each bundle that `python quant/ptq.py` wrote.

    What is built already from the same graph, by the same library with the same options, is left as it is.

    Attributes:
        bundles: folders with a model.fused.onnx.
        library: tensorrt or tensorrt_rtx; whichever can build here, tensorrt first, if not given.
    """

    bundles: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    library: LibraryName | None = None


def build_bundle(library: Library, bundle: Path, options: EngineOptions | None = None) -> EngineRecord:
    """Build the engine of a bundle into its ``engines/`` folder, with its record beside it, unless it is there.

    ``options.targets`` are resolved ones (:meth:`deploy.tensorrt_library.Library.resolve_targets`).

    Raises:
        UserError: no fused graph in the bundle, or an attention that cannot be fused.
    """
    options = options or EngineOptions()
    source, path = bundle / FUSED_ONNX, bundle / ENGINES / f"{library.name}.engine"
    Manifest.read(bundle)  # before the long work, whether there is one
    if (record := built_already(library, source, path, options)) is not None:
        return record
    built = build_engine(library, source, options)
    if not options.allow_unfused:
        check_kernels(library, built, options)
    return write_engine(library, bundle, built, options)


def write_engine(library: Library, bundle: Path, built: BuiltEngine, options: EngineOptions) -> EngineRecord:
    """Write an engine of the bundle's fused graph, and its record beside it."""
    manifest, source = Manifest.read(bundle), bundle / FUSED_ONNX
    path = bundle / ENGINES / f"{library.name}.engine"
    path.parent.mkdir(exist_ok=True)
    with write_file(path) as draft:
        draft.write_bytes(built.data)
    record = EngineRecord(
        onnx_sha256=sha256(source), engine_sha256=sha256(path), engine_bytes=len(built.data),
        library=library.name, library_version=library.version, targets=options.targets, batch=options.batch,
        options=options.to_json(), precisions=precisions(load_graph(source)), attentions=built.attentions,
        fused=built.fused, inputs=built.inputs, outputs=built.outputs,
        preprocessing=manifest.preprocessing, classes=manifest.classes,
        trtexec=trtexec_line(library, source, path, options),
    )  # fmt: skip
    record.write(path)
    return record


def built_already(library: Library, source: Path, engine: Path, options: EngineOptions) -> EngineRecord | None:
    """The record of an engine that was built from ``source`` just so; None if there is none that can be trusted."""
    try:
        record = EngineRecord.read(engine)
    except UserError:
        return None
    same = (record.onnx_sha256, record.library, record.library_version, record.targets, record.batch, record.options)
    wanted = (sha256(source), library.name, library.version, options.targets, options.batch, options.to_json())
    return record if same == wanted else None


def build_fitting(
    library: Library, bundle: Path, options: EngineOptions | None = None
) -> tuple[EngineRecord | None, tuple[str, ...]]:
    """Build a bundle for the targets that have its number formats: (the engine's record, the targets left out).

    Raises:
        UserError: as :func:`build_bundle` does, and for an impossible target.
    """
    options = options or EngineOptions()
    wanted = library.resolve_targets(options.targets)
    unfit = unfit_targets(bundle / FUSED_ONNX, wanted)
    fit = tuple(target for target in wanted if target not in unfit)
    return (build_bundle(library, bundle, replace(options, targets=fit)) if fit or not unfit else None), unfit


def unfit_targets(source: Path, targets: tuple[str, ...]) -> tuple[str, ...]:
    """The targets whose tensor cores lack a number format of the graph: FP8 came with compute capability 8.9."""
    if not has_fp8(load_graph(source)):
        return ()
    return tuple(target for target in targets if int(target.removeprefix("sm")) < FP8_OLDEST)


def main(options: BuildOptions) -> None:
    library = find_library(options.library)
    if library is None:
        raise UserError("no TensorRT that can build here: pip install tensorrt-rtx, or see docs/jetson.md on a Jetson")
    if not options.bundles:
        raise UserError("name a bundle: python deploy/build.py runs/ptq/int8")
    for bundle in options.bundles:
        record, unfit = build_fitting(library, bundle, options)
        if unfit:
            print(f"{bundle}: not for {', '.join(unfit)}, which lacks FP8; use INT8 there")
        if record:
            proof = "fused attentions" if record.fused else "attentions, which may be in pieces"
            print(f"{bundle / ENGINES / library.name}.engine: {record.engine_bytes / 1e6:.1f} MB, "
                  f"{record.attentions} {proof}\n  {record.trtexec}")  # fmt: skip


if __name__ == "__main__":
    run_command(BuildOptions, main)
