"""Build TensorRT engines from bundles: python deploy/build.py runs/ptq/int8 --targets sm86,sm89 --batch 1:8:64

Works without a GPU where tensorrt-rtx is installed. The build fails unless every attention is one fused operator in
the precision that the scheme asks for (deploy/trt/fusion.py).
"""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from deploy.trt.builder import BuiltEngine, build_engine, check_kernels, trtexec_line
from deploy.trt.engine_options import EngineOptions, LibraryName
from deploy.trt.library import Library, find_library
from deploy.trt.record import ENGINE, RECORD, EngineRecord, find_engines
from illama.atomic_write import sweep, write_folder
from illama.bundle import ENGINES, FUSED_ONNX, Manifest, sha256
from illama.cli import run_command
from illama.errors import UserError
from illama.graph.reader import has_fp8, load_graph, precisions

FP8_OLDEST = 89


@dataclass(frozen=True)
class BuildOptions(EngineOptions):
    """Build a TensorRT engine for each bundle that `python quant/ptq.py` wrote.

    What is built already from the same graph, by the same library with the same options, is left as it is.

    Attributes:
        bundles: folders with a model.fused.onnx.
        library: tensorrt or tensorrt_rtx; whichever can build here, tensorrt first, if not given.
        name: of the engine's folder in the bundle's engines/; LIBRARY-TARGETS-BATCH if not given.
    """

    bundles: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    library: LibraryName | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name is not None and not re.fullmatch(r"\w[\w.+-]{,99}", self.name, re.ASCII):
            raise UserError(f"--name is a folder's, of letters, digits and ._+-, not {self.name!r}")


def build_bundle(library: Library, bundle: Path, options: EngineOptions | None = None, name: str | None = None) -> Path:
    """Build an engine of a bundle into a folder of its own in ``engines/``, unless one was built just so: its file.

    ``options.targets`` are resolved ones (:meth:`deploy.trt.library.Library.resolve_targets`).

    Args:
        name: of that folder; see :class:`BuildOptions`.

    Raises:
        UserError: no fused graph in the bundle, an attention that cannot be fused, or another engine of that name.
    """
    options = options or EngineOptions()
    Manifest.read(bundle)  # before the long work, whether there is one
    sweep(bundle / ENGINES)
    if (path := _built_already(library, bundle, options, name)) is not None:
        return path
    built = build_engine(library, bundle / FUSED_ONNX, options)
    if not options.allow_unfused:
        check_kernels(library, built, options)
    return write_engine(library, bundle, built, options, name)


def _engine_path(library: Library, bundle: Path, options: EngineOptions, name: str | None) -> Path:
    targets = ".".join(options.targets) or "portable"
    return bundle / ENGINES / (name or f"{library.name}-{targets}-{'.'.join(map(str, options.batch))}") / ENGINE


def write_engine(
    library: Library, bundle: Path, built: BuiltEngine, options: EngineOptions, name: str | None = None
) -> Path:
    """Write an engine of the bundle's fused graph and its record, as one folder; the engine's file."""
    manifest, source = Manifest.read(bundle), bundle / FUSED_ONNX
    path = _engine_path(library, bundle, options, name)
    record = EngineRecord(
        onnx_sha256=sha256(source),
        engine_sha256=hashlib.sha256(built.data).hexdigest(),
        engine_bytes=len(built.data),
        library=library.name,
        library_version=library.version,
        targets=options.targets,
        batch=options.batch,
        options=options.to_json(),
        precisions=precisions(load_graph(source)),
        attentions=built.attentions,
        fused=built.fused,
        inputs=built.inputs,
        outputs=built.outputs,
        preprocessing=manifest.preprocessing,
        classes=manifest.classes,
        trtexec=trtexec_line(library, source, path, options),
    )
    with write_folder(path.parent, partial(_may_replace, record.origin)) as draft:
        (draft / ENGINE).write_bytes(built.data)
        record.write(draft / ENGINE)
    return path


def _built_already(library: Library, bundle: Path, options: EngineOptions, name: str | None) -> Path | None:
    """The bundle's engine that was built just so; None if there is none; UserError if another one has its name."""
    path, source = _engine_path(library, bundle, options, name), bundle / FUSED_ONNX
    digest = sha256(source) if source.exists() else ""
    origin = (digest, library.name, library.version, options.targets, options.batch, options.to_json())
    for each in [path] if name else find_engines(bundle, library.name):
        with suppress(UserError):
            if EngineRecord.read(each).origin == origin:
                print(f"{each} is built already")
                return each
    if path.parent.exists() and not _may_replace(origin, path.parent):
        raise UserError(
            f"{path.parent} is there, of another graph, library version or options: choose another --name, or delete it"
        )
    if path.parent.exists():
        print(f"{path.parent} holds no engine that can be used, and is built again")
    return None


def _may_replace(origin: tuple[Any, ...], folder: Path) -> bool:
    """Whether a folder is of an engine that is refused, or of one that another process built just so."""
    try:
        return EngineRecord.read(folder / ENGINE).origin == origin
    except UserError:
        return (folder / ENGINE).exists() or (folder / RECORD).exists()


def build_fitting(
    library: Library, bundle: Path, options: EngineOptions | None = None, name: str | None = None
) -> tuple[Path | None, tuple[str, ...]]:
    """Build a bundle for the targets that have its number formats: (the engine, the targets left out).

    Raises:
        UserError: as :func:`build_bundle` does, and for an impossible target.
    """
    options = options or EngineOptions()
    wanted = library.resolve_targets(options.targets)
    unfit = unfit_targets(bundle / FUSED_ONNX, wanted)
    fit = tuple(target for target in wanted if target not in unfit)
    return (build_bundle(library, bundle, replace(options, targets=fit), name) if fit or not unfit else None), unfit


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
        path, unfit = build_fitting(library, bundle, options, options.name)
        if unfit:
            print(f"{bundle}: not for {', '.join(unfit)}, which lacks FP8; use INT8 there")
        if path:
            record = EngineRecord.read(path)
            proof = "fused attentions" if record.fused else "attentions, which may be in pieces"
            print(f"{path}: {record.engine_bytes / 1e6:.1f} MB, {record.attentions} {proof}\n  {record.trtexec}")


if __name__ == "__main__":
    run_command(BuildOptions, main)
