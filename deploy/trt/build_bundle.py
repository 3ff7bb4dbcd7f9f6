"""An engine of a bundle: built unless it is there already, and written with its record."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from deploy.trt.builder import BuiltEngine, build_engine, check_kernels, trtexec_line
from deploy.trt.library import Library
from deploy.trt.options import EngineOptions
from deploy.trt.record import ENGINE, RECORD, EngineRecord, find_engines
from illama.atomic_write import sweep, write_folder
from illama.bundle import ENGINES, FUSED_ONNX, Manifest, sha256
from illama.errors import UserError
from illama.graph.reader import has_fp8, load_graph, precisions

FP8_OLDEST = 89


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


def build_engines(
    library: Library | None,
    bundles: Sequence[Path],
    options: EngineOptions,
    step: Callable[[str], AbstractContextManager[None]],
) -> list[str]:
    """Build an engine of every bundle with a fused graph; the reasons why others were not built.

    Args:
        library: None if no TensorRT that can build is installed.
        step: called with the name of each build, which then runs inside the context manager that it returns.
    """
    if library is None:
        return ["No engine was built: no TensorRT that can build is installed here."]
    not_built = []
    for bundle in (bundle for bundle in bundles if (bundle / FUSED_ONNX).exists()):
        unfit: tuple[str, ...] = ()
        with step(f"build {bundle.name} engine"):
            try:
                _, unfit = build_fitting(library, bundle, options)
            except UserError as error:  # the other engines are worth having without this one
                not_built.append(f"No {bundle.name} engine: {error}.")
        if unfit:
            not_built.append(f"No {bundle.name} engine for {', '.join(unfit)}: FP8 needs sm89 or newer.")
    return not_built


def unfit_targets(source: Path, targets: tuple[str, ...]) -> tuple[str, ...]:
    """The targets whose tensor cores lack a number format of the graph: FP8 came with compute capability 8.9."""
    if not has_fp8(load_graph(source)):
        return ()
    return tuple(target for target in targets if int(target.removeprefix("sm")) < FP8_OLDEST)
