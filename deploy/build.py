"""Build TensorRT engines from bundles: python deploy/build.py runs/ptq/int8 --targets sm89

Works without a GPU where tensorrt-rtx is installed. The build fails unless every attention is one fused
operator: an engine whose attention fell apart into pieces would be slow, and nothing else would tell.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import onnx
import tyro
from google.protobuf.message import DecodeError

from deploy.library import Library, find_library
from illama.bundle import ENGINES, FUSED_ONNX, Manifest, sha256, write_file
from illama.errors import UserError, run_command

FP8_OLDEST = 89


@dataclass(frozen=True)
class EngineRecord:
    """What is written beside an engine, in JSON under the same name.

    Attributes:
        onnx_sha256, engine_sha256: of the file it was built from and of the engine.
        library, library_version: what built it, and the only version that reads it.
        targets: compute capabilities; empty for the library's own choice.
        batch: smallest, best served and largest batch.
        fused_attentions: attentions that are one non-decomposable operator, which is all of them.
        input_shape: channels, height, width of the float32 input ``images``.
    """

    onnx_sha256: str
    engine_sha256: str
    engine_bytes: int
    library: str
    library_version: str
    targets: tuple[str, ...]
    batch: tuple[int, int, int]
    fused_attentions: int
    input_shape: tuple[int, ...]
    preprocessing: dict[str, Any]
    classes: list[str]


@dataclass(frozen=True)
class BuildOptions:
    """Build a TensorRT engine for each bundle that `python quant/ptq.py` wrote.

    Attributes:
        bundles: folders with a model.fused.onnx.
        targets: compute capabilities, such as sm86 sm89 sm120; none for the library's portable default.
        batch: smallest, best served and largest batch.
    """

    bundles: Annotated[tuple[Path, ...], tyro.conf.Positional]
    targets: tuple[str, ...] = ()
    batch: tuple[int, int, int] = (1, 8, 64)


def build_bundle(
    library: Library, bundle: Path, targets: tuple[str, ...] = (), batch: tuple[int, int, int] = (1, 8, 64)
) -> EngineRecord:
    """Build the engine of a bundle into its ``engines/`` folder, with its JSON beside it.

    ``targets`` are resolved ones (:meth:`deploy.library.Library.resolve_targets`).

    Raises:
        UserError: no fused graph in the bundle, or an attention that cannot be fused.
    """
    manifest = Manifest.read(bundle)
    source = bundle / FUSED_ONNX
    engine, fused = build_engine(library, source, targets, batch)
    shape = tuple(manifest.preprocessing[name] for name in ("in_channels", "image_size", "image_size"))
    path = bundle / ENGINES / f"{library.name}.engine"
    path.parent.mkdir(exist_ok=True)
    with write_file(path) as draft:
        draft.write_bytes(engine)
    record = EngineRecord(sha256(source), sha256(path), len(engine), library.name, library.version, targets, batch,
                          fused, shape, manifest.preprocessing, manifest.classes)  # fmt: skip
    with write_file(path.with_suffix(".json")) as draft:
        draft.write_text(json.dumps(asdict(record), indent=2) + "\n")
    return record


def build_fitting(
    library: Library, bundle: Path, targets: tuple[str, ...], batch: tuple[int, int, int] = (1, 8, 64)
) -> tuple[EngineRecord | None, tuple[str, ...]]:
    """Build a bundle for the targets that have its number formats: (the engine's record, the targets left out).

    Raises:
        UserError: as :func:`build_bundle` does, and for an impossible target.
    """
    wanted = library.resolve_targets(targets)
    unfit = unfit_targets(bundle / FUSED_ONNX, wanted)
    fit = tuple(target for target in wanted if target not in unfit)
    return (build_bundle(library, bundle, fit, batch) if fit or not unfit else None), unfit


def unfit_targets(source: Path, targets: tuple[str, ...]) -> tuple[str, ...]:
    """The targets whose tensor cores lack a number format of the graph: FP8 came with compute capability 8.9."""
    try:
        graph = onnx.load(source).graph
    except FileNotFoundError as error:
        raise UserError(f"{source.parent} has no {source.name}: make it with python quant/ptq.py") from error
    except DecodeError as error:
        raise UserError(f"{source} is not an ONNX file: make it again with python quant/ptq.py") from error
    if all(tensor.data_type != onnx.TensorProto.FLOAT8E4M3FN for tensor in graph.initializer):
        return ()
    return tuple(target for target in targets if int(target.removeprefix("sm")) < FP8_OLDEST)


def build_engine(
    library: Library, source: Path, targets: tuple[str, ...], batch: tuple[int, int, int]
) -> tuple[bytes, int]:
    """(serialized engine, number of fused attentions) of an ONNX file with dynamic batch.

    Raises:
        UserError: with the library's own words, if it cannot parse, fuse or build the graph.
    """
    trt = library.trt
    messages, logger = _collect_errors(trt)
    builder = trt.Builder(logger)
    network = library.create_network(builder)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(source)):
        raise UserError(f"{library.name} cannot parse {source}: {_last(messages)}")
    fused = count_fused_attentions(trt, network, source)
    config = builder.create_builder_config()
    library.set_targets(config, targets)
    profile = builder.create_optimization_profile()
    images = network.get_input(0)
    profile.set_shape(images.name, *((size, *tuple(images.shape)[1:]) for size in batch))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UserError(f"{library.name} {library.version} cannot build {source}: {_last(messages)}")
    return bytes(engine), fused


def count_fused_attentions(trt: Any, network: Any, source: Path) -> int:
    """The attentions of a parsed network, each checked to be one operator that must not be decomposed.

    Raises:
        UserError: if one may be decomposed, or a bare softmax shows that one was exported in pieces.
    """
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    inputs = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
    if any(layer.type == trt.LayerType.SOFTMAX for layer in layers) or not inputs:
        raise UserError(f"{source} has attention that is not one Attention operator, so it cannot be fused")
    for layer in inputs:
        layer.__class__ = trt.IAttentionInputLayer  # the bindings hand out the base class; this is their cast
    if any(layer.attention.decomposable for layer in inputs):
        raise UserError(f"{source} lets attention be decomposed, so a build would not prove that it is fused")
    return len(inputs)


def _collect_errors(trt: Any) -> tuple[list[str], Any]:
    messages: list[str] = []

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                messages.append(" ".join(message.split()))

    return messages, Logger()


def _last(messages: list[str]) -> str:
    return messages[-1] if messages else "it gave no reason"


def main(options: BuildOptions) -> None:
    library = find_library()
    if library is None:
        raise UserError("no TensorRT here: pip install tensorrt-rtx, or on a Jetson use JetPack's tensorrt")
    for bundle in options.bundles:
        record, unfit = build_fitting(library, bundle, options.targets, options.batch)
        if unfit:
            print(f"{bundle}: not for {', '.join(unfit)}, which lacks FP8; use INT8 there")
        if record:
            print(f"{bundle}: {record.engine_bytes / 1e6:.1f} MB, {record.fused_attentions} fused attentions")


if __name__ == "__main__":
    run_command(BuildOptions, main)
