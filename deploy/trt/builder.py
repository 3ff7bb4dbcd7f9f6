"""Builds a serialized engine from an ONNX file."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from deploy.rewrites.lower_opset import lower_for
from deploy.trt.engine_options import EngineOptions
from deploy.trt.fusion import allow_decomposition, count_attentions, fused_kernels, quantize_softmax_outputs
from deploy.trt.library import Library, fits_this_gpu
from deploy.versions import find_runtime
from illama.atomic_write import read_pinned, write_pinned
from illama.errors import UserError
from illama.graph.reader import load_graph, read_softmax_scales, to_bytes

if TYPE_CHECKING:
    import tensorrt

_VERBOSITIES = {"none": "NONE", "layer-names": "LAYER_NAMES_ONLY", "detailed": "DETAILED"}


@dataclass(frozen=True)
class BuiltEngine:
    """A serialized engine.

    Attributes:
        data: the engine.
        attentions: result of :func:`deploy.trt.fusion.count_attentions`.
        fused: whether each attention is one operator in the scheme's precision; False if --allow-unfused was given.
        inputs: see :class:`deploy.trt.record.EngineRecord`.
        outputs: likewise.
    """

    data: bytes
    attentions: int
    fused: bool
    inputs: dict[str, Any]
    outputs: dict[str, Any]


def build_engine(library: Library, source: Path, options: EngineOptions | None = None) -> BuiltEngine:
    """Builds an engine from an ONNX file, with a dynamic batch.

    Raises:
        UserError: the library cannot parse or build the graph, has no fused kernel for an attention, or lacks an
            option; the message contains the library's reason.
    """
    options = options or EngineOptions()
    library.check_options(options)
    messages, logger = _collect_errors(library.trt)
    builder: tensorrt.Builder = library.trt.Builder(logger)
    network = library.create_network(builder)
    parser: tensorrt.OnnxParser = library.trt.OnnxParser(network, logger)
    if not parser.parse(to_bytes(prepare_graph(library, source, options)), str(source)):
        raise UserError(f"{library.name} cannot parse {source}: {_last(messages)}")
    attentions = count_attentions(library, network)
    if not attentions and not options.allow_unfused:
        raise UserError(
            f"{source} has an attention that is not an Attention operator, so it cannot be fused; to build it "
            "nevertheless, give --allow-unfused"
        )
    config = _configure(library, builder, network, options)
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise UserError(f"{library.name} {library.version} cannot build {source}: {_last(messages)}")
    if options.timing_cache is not None:
        write_pinned(options.timing_cache, bytes(config.get_timing_cache().serialize()))
    inputs = _tensors([network.get_input(index) for index in range(network.num_inputs)])
    outputs = _tensors([network.get_output(index) for index in range(network.num_outputs)])
    return BuiltEngine(bytes(data), attentions, not options.allow_unfused, inputs, outputs)


def prepare_graph(library: Library, source: Path, options: EngineOptions) -> ir.Model:
    """Returns the graph of the file as the parser takes it: without operators that it lacks, attentions prepared.

    Raises:
        UserError: the library has no form of an operator, or an option does not fit the graph.
    """
    model = load_graph(source)
    if library.name == "tensorrt":
        lower_for(model, find_runtime("tensorrt", library.release))
    if options.weight_stripped and read_softmax_scales(model):
        raise UserError(
            f"{source} quantizes the softmax output, whose scale a refit does not restore: omit --weight-stripped"
        )
    if options.allow_unfused:
        allow_decomposition(model)
    else:
        quantize_softmax_outputs(model)
    return model


def _configure(
    library: Library, builder: tensorrt.Builder, network: tensorrt.INetworkDefinition, options: EngineOptions
) -> tensorrt.IBuilderConfig:
    trt, config = library.trt, builder.create_builder_config()
    library.set_targets(config, options.targets)
    profile = builder.create_optimization_profile()
    images = network.get_input(0)
    profile.set_shape(images.name, *((size, *tuple(images.shape)[1:]) for size in options.batch))
    config.add_optimization_profile(profile)
    config.profiling_verbosity = getattr(trt.ProfilingVerbosity, _VERBOSITIES[options.verbosity])
    if options.workspace_gib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.workspace_gib * 2**30))
    for enabled, flag in (
        (options.refit, "REFIT"),
        (options.weight_stripped, "STRIP_PLAN"),
        (options.version_compatible, "VERSION_COMPATIBLE"),
    ):
        if enabled:
            config.set_flag(getattr(trt.BuilderFlag, flag))
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.timing_cache is not None:
        _read_timing_cache(config, options.timing_cache)
    return config


def _read_timing_cache(config: tensorrt.IBuilderConfig, path: Path) -> None:
    """Loads a timing cache if the file exists, after verifying it by the SHA-256 beside it."""
    data = read_pinned(path)
    if data is None and path.exists():
        raise UserError(f"{path} does not match the SHA-256 beside it: delete it to create it again")
    if not config.set_timing_cache(config.create_timing_cache(data or b""), ignore_mismatch=False):
        raise UserError(f"{path} belongs to another GPU or version: delete it to create it again")


def check_kernels(library: Library, built: BuiltEngine, options: EngineOptions) -> None:
    """Checks that an engine has a fused kernel for each attention, if it has detailed verbosity and runs on this GPU.

    Raises:
        UserError: the engine inspector reports fewer fused kernels than attentions.
    """
    if options.verbosity != "detailed" or not fits_this_gpu(options.targets, options.hardware_compatible):
        return
    inspector = library.deserialize(built.data, options.version_compatible).create_engine_inspector()
    kernels = fused_kernels(inspector.get_engine_information(library.trt.LayerInformationFormat.JSON))
    if len(kernels) < built.attentions:
        raise UserError(
            f"the engine has {len(kernels)} fused attention kernels for {built.attentions} attentions; "
            "give --allow-unfused to accept it"
        )


def trtexec_line(library: Library, source: Path, engine: Path, options: EngineOptions) -> str:
    """Returns the command of the library's own tool that builds an equivalent engine, run in the file's folder.

    The file does not say how the softmax output is quantized, so the tool leaves it in floating point.
    """
    shape = "x".join(str(size) for size in _image_shape(load_graph(source)))
    parts = [library.trtexec, f"--onnx={source.name}", f"--saveEngine={os.path.relpath(engine, source.parent)}"]
    parts += [
        f"--{name}Shapes=images:{size}x{shape}" for name, size in zip(("min", "opt", "max"), options.batch, strict=True)
    ]
    if library.name == "tensorrt":
        parts.append("--stronglyTyped")
    elif options.targets:
        parts.append(f"--computeCapabilities={','.join(f'{t[2:-1]}.{t[-1]}' for t in options.targets)}")
    if options.workspace_gib is not None:
        parts.append(f"--memPoolSize=workspace:{options.workspace_gib * 1024:g}")
    for enabled, flag in (
        (options.timing_cache, f"--timingCacheFile={options.timing_cache and options.timing_cache.resolve()}"),
        (options.refit, "--refit"),
        (options.weight_stripped, "--stripWeights"),
        (options.version_compatible, "--versionCompatible"),
        (options.hardware_compatible, "--hardwareCompatibilityLevel=ampere+"),
    ):
        if enabled:
            parts.append(flag)
    return shlex.join([*parts, f"--profilingVerbosity={_VERBOSITIES[options.verbosity].lower()}"])


def _image_shape(model: ir.Model) -> list[int]:
    shape = model.graph.inputs[0].shape
    return [size for size in shape[1:] if isinstance(size, int)] if shape is not None else []


def _tensors(tensors: list[tensorrt.ITensor]) -> dict[str, Any]:
    return {tensor.name: (str(tensor.dtype).rpartition(".")[2].lower(), tuple(tensor.shape)) for tensor in tensors}


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
    return messages[-1] if messages else "no reason given"
