"""Builds the engines of bundles and writes them with their records."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from deploy.trt.builder import BuiltEngine, build_engine, check_kernels, trtexec_line
from deploy.trt.engine_options import EngineOptions
from deploy.trt.library import RTX_TARGETS, Library
from deploy.trt.record import ENGINE, RECORD, EngineRecord, find_engines
from illama.atomic_write import bundles_in, sweep, write_folder
from illama.bundle import ENGINES, FUSED_ONNX, GOLDEN, MANIFEST, sha256
from illama.errors import UserError
from illama.graph.reader import has_constant, load_graph, precisions
from illama.manifest import Manifest

# Dtype of constants -> its name, and the first compute capability that has it.
_SINCE = {ir.DataType.FLOAT4E2M1: ("NVFP4", 100), ir.DataType.FLOAT8E4M3FN: ("FP8", 89)}
_PORTABLE = 89  # TensorRT-RTX's default, for all GPUs from Ampere on, takes formats of up to this capability


def expand_bundles(paths: Sequence[Path], files: Sequence[str] = (FUSED_ONNX,)) -> list[Path]:
    """Returns bundles, and in place of a folder of bundles those of them that have one of the files.

    Raises:
        UserError: a path is no folder, or neither a bundle nor a folder of such bundles.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is not a folder: give a bundle, or a folder of bundles")
        bundles = [path] if (path / MANIFEST).exists() else bundles_in(path, files)
        if not bundles:
            raise UserError(
                f"{path} is not a bundle and holds none with a {' or '.join(files)}: run python quant/ptq.py first"
            )
        found += bundles
    return found


def build_bundle(library: Library, bundle: Path, options: EngineOptions | None = None, name: str | None = None) -> Path:
    """Builds an engine of a bundle, unless the bundle has one of the same origin; returns the path of the engine file.

    Args:
        options: ``targets`` must be resolved (:meth:`deploy.trt.library.Library.resolve_targets`).
        name: name of the engine's folder in ``engines/``. Defaults to LIBRARY-TARGETS-BATCH.

    Raises:
        UserError: the bundle has no fused graph, an attention cannot be fused, or the name is in use.
    """
    options = options or EngineOptions()
    Manifest.read(bundle)  # raises before the long build if the bundle has none
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
    """Writes an engine and its record as one folder; returns the path of the engine file."""
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
        preprocessing=asdict(manifest.preprocessing),
        classes=list(manifest.classes),
        trtexec=trtexec_line(library, source, path, options),
        golden_answers=manifest.golden_answers,
    )
    with write_folder(path.parent, partial(_may_replace, record.origin)) as draft:
        (draft / ENGINE).write_bytes(built.data)
        if (golden := bundle / GOLDEN).exists():  # an engine may be copied without its bundle
            shutil.copyfile(golden, draft / GOLDEN)
        record.write(draft / ENGINE)
    return path


def _built_already(library: Library, bundle: Path, options: EngineOptions, name: str | None) -> Path | None:
    """Returns the bundle's engine of the same origin, or None; raises UserError if another engine has its name."""
    path, source = _engine_path(library, bundle, options, name), bundle / FUSED_ONNX
    digest = sha256(source) if source.exists() else ""
    origin = (digest, library.name, library.version, options.targets, options.batch, options.to_json())
    for each in [path] if name else find_engines(bundle, library.name):
        with suppress(UserError):
            if EngineRecord.read(each).origin == origin:
                print(f"{each} exists already")
                return each
    if path.parent.exists() and not _may_replace(origin, path.parent):
        raise UserError(
            f"{path.parent} exists, with another graph, library version or options: give another --name, or delete it"
        )
    if path.parent.exists():
        print(f"{path.parent} has no valid engine and is built again")
    return None


def _may_replace(origin: tuple[Any, ...], folder: Path) -> bool:
    """Whether a folder holds an invalid engine, or one of the same origin, which another process built meanwhile."""
    try:
        return EngineRecord.read(folder / ENGINE).origin == origin
    except UserError:
        return (folder / ENGINE).exists() or (folder / RECORD).exists()


def build_supported(
    library: Library, bundle: Path, options: EngineOptions | None = None, name: str | None = None
) -> tuple[Path | None, str]:
    """Builds an engine of a bundle for the targets that support its dtypes; returns (its path, why not for the others).

    Without targets, TensorRT-RTX builds for all GPUs from Ampere on, which have no NVFP4: then for those that have it.

    Raises:
        UserError: see :func:`build_bundle`; or the library cannot build for a target.
    """
    options = options or EngineOptions()
    model = load_graph(bundle / FUSED_ONNX)
    format_name, first = next((facts for dtype, facts in _SINCE.items() if has_constant(model, dtype)), ("", 0))
    targets = library.resolve_targets(options.targets)
    if not targets and first > _PORTABLE:
        targets = tuple(target for target in RTX_TARGETS if _number(target) >= first)
    supported = tuple(target for target in targets if not first or _number(target) >= first)
    unsupported = [target for target in targets if target not in supported]
    reason = f"not built for {', '.join(unsupported)}: {format_name} needs sm{first} or newer" if unsupported else ""
    if unsupported and not supported:
        return None, reason
    return build_bundle(library, bundle, replace(options, targets=supported), name), reason


def _number(target: str) -> int:
    return int(target.removeprefix("sm"))


def build_engines(
    library: Library | None,
    bundles: Sequence[Path],
    options: EngineOptions,
    step: Callable[[str], AbstractContextManager[None]],
) -> list[str]:
    """Builds an engine of every bundle with a fused graph; returns a message for each engine that was not built.

    Args:
        library: None if no TensorRT that can build is installed.
        step: takes the name of a build, and returns a context manager in which the build runs.
    """
    if library is None:
        return ["No engine was built: no TensorRT that can build is installed here."]
    not_built = []
    for bundle in (bundle for bundle in bundles if (bundle / FUSED_ONNX).exists()):
        reason = ""
        with step(f"build {bundle.name} engine"):
            try:
                _, reason = build_supported(library, bundle, options)
            except UserError as error:  # the other engines are built nevertheless
                not_built.append(f"No {bundle.name} engine: {error}.")
        if reason:
            not_built.append(f"{bundle.name} was {reason}.")
    return not_built
