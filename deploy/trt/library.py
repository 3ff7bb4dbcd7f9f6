"""One interface to TensorRT and TensorRT-RTX (NVIDIA's TensorRT for RTX): all their differences are handled here.

Their Python modules have the same interface. A test checks this project's calls against the package tensorrt-stubs,
except for constants and for functions that are newer than the stubs.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deploy.trt.engine_options import EngineOptions, LibraryName
from deploy.versions import find_runtime
from illama.errors import UserError
from illama.hardware import cuda_gpu

if TYPE_CHECKING:
    import tensorrt


# Compute capabilities for which TensorRT-RTX builds ahead of time; tensorrt builds for the GPU it runs on.
RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
JETSONS = ("sm72", "sm87", "sm101", "sm110", "jetson", "xavier", "orin", "thor")


@dataclass(frozen=True)
class Library:
    """An installed TensorRT.

    Attributes:
        name: name of the Python module.
        trt: the Python module.
    """

    name: LibraryName
    trt: Any

    @property
    def version(self) -> str:
        return str(self.trt.__version__)

    @property
    def release(self) -> str:
        """Major and minor version, such as 10.14."""
        return ".".join(self.version.split(".")[:2])

    @property
    def trtexec(self) -> str:
        """Name of the command-line tool."""
        return "trtexec" if self.name == "tensorrt" else "tensorrt_rtx"

    def create_network(self, builder: tensorrt.Builder) -> tensorrt.INetworkDefinition:
        """Returns an empty, strongly typed network, whose precision is that of the graph."""
        flags = 0
        if self.name == "tensorrt" and hasattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
            flags = 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)  # always enabled from version 11
        return builder.create_network(flags)

    def resolve_targets(self, targets: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the compute capabilities to build for; empty for TensorRT-RTX's portable default.

        Args:
            targets: such as ("sm86", "sm89") or ("sm86,sm89",).

        Raises:
            UserError: the library cannot build for one of them.
        """
        targets = tuple(target for part in targets for target in part.split(",") if target)
        if self.name == "tensorrt":
            gpu = cuda_gpu()
            here = "sm{}{}".format(*gpu.get_device_capability()) if gpu else ""
            if any(target != here for target in targets):
                raise UserError(
                    f"tensorrt builds for the GPU it runs on, {here}: omit --targets, or use --library tensorrt_rtx"
                )
            return (here,)
        for target in targets:
            if target.lower() in JETSONS:
                raise UserError(
                    f"TensorRT-RTX builds no engine for a Jetson, such as {target}: build on the module itself, with "
                    "JetPack's TensorRT (docs/jetson.md)"
                )
            if target not in RTX_TARGETS:
                raise UserError(f"unknown target {target!r}: choose from {', '.join(RTX_TARGETS)}")
        return tuple(target for target in RTX_TARGETS if target in targets)

    def set_targets(self, config: tensorrt.IBuilderConfig, targets: tuple[str, ...]) -> None:
        """Sets the compute capabilities of the engine; if there are none, the library's default is kept."""
        if targets and self.name == "tensorrt_rtx":
            newer: Any = config  # these members are newer than the stubs
            newer.num_compute_capabilities = len(targets)
            for index, target in enumerate(targets):
                newer.set_compute_capability(getattr(self.trt.ComputeCapability, target.upper()), index)

    def check_options(self, options: EngineOptions) -> None:
        """Raises UserError for options that TensorRT-RTX does not support at all, or not without a GPU."""
        if self.name == "tensorrt":
            return
        no_gpu = (options.refit or options.weight_stripped) and not cuda_gpu()
        for given, reason in (
            (options.timing_cache, "has no --timing-cache: it does not time kernels during a build"),
            (options.hardware_compatible, "has no --hardware-compatible: give several --targets, or none for all GPUs"),
            (options.version_compatible, "has no --version-compatible: build with the version that runs the engine"),
            (no_gpu, "builds with --refit or --weight-stripped on a GPU only, and none is available"),
        ):
            if given:
                raise UserError(f"TensorRT-RTX {reason}")

    def deserialize(self, data: bytes, version_compatible: bool = False) -> tensorrt.ICudaEngine:
        """Loads a serialized engine on this machine's GPU. Engines may contain code, so check the record first.

        Args:
            version_compatible: whether the engine contains its own runtime.

        Raises:
            UserError: the library cannot load the engine here.
        """
        runtime: tensorrt.Runtime = self.trt.Runtime(self.trt.Logger(self.trt.Logger.ERROR))
        runtime.engine_host_code_allowed = version_compatible  # which the runtime in such an engine needs
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise UserError(f"{self.name} {self.version} cannot load the engine on this GPU: build it for this GPU")
        return engine

    def runtime_config(self, engine: tensorrt.ICudaEngine) -> tuple[Any, Any]:
        """Returns (configuration of execution contexts, its cache of compiled kernels); None for the full TensorRT.

        TensorRT-RTX compiles kernels for each shape at its first call, and captures a CUDA graph itself.
        """
        if self.name == "tensorrt":
            return None, None
        config: Any = engine.create_runtime_config()  # newer than the stubs
        cache = config.create_runtime_cache()
        config.set_runtime_cache(cache)
        config.dynamic_shapes_kernel_specialization_strategy = self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return config, cache


def fits_this_gpu(targets: tuple[str, ...], hardware_compatible: bool = False) -> bool:
    """Whether an engine for these compute capabilities runs on this machine's GPU; False if there is none."""
    if not (gpu := cuda_gpu()):
        return False
    here = "sm{}{}".format(*gpu.get_device_capability())
    return hardware_compatible or not targets or here in targets


def find_library(name: LibraryName | None = None) -> Library | None:
    """Returns the installed TensorRT that can build here, preferably the full library; None if there is none.

    The full library must run on the GPU that the engine is for; TensorRT-RTX needs no GPU.

    Raises:
        UserError: a ``name`` is given, and that library cannot build here.
    """
    both: tuple[LibraryName, ...] = ("tensorrt", "tensorrt_rtx") if cuda_gpu() else ("tensorrt_rtx",)
    for each in (name,) if name else both:
        library = _import(each)
        problem = _problem(library, each)
        if library and not problem:
            return library
        if name:
            raise UserError(problem)
    return None


def require_library(name: LibraryName | None = None) -> Library:
    """Returns :func:`find_library`'s; raises UserError if there is none."""
    library = find_library(name)
    if library is None:
        raise UserError("no TensorRT that can build here: pip install tensorrt-rtx, or see docs/jetson.md on a Jetson")
    return library


def _import(name: LibraryName) -> Library | None:
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError):  # OSError: NVIDIA's shared libraries are missing
        return None
    return Library(name, module) if hasattr(module, "Builder") else None


def _problem(library: Library | None, name: LibraryName) -> str:
    """Returns why a library cannot build here; empty if it can."""
    instead = "use --library tensorrt_rtx (pip install tensorrt-rtx)"
    if library is None:
        return f"{name} is not installed here: pip install {name.replace('_', '-')}"
    if name == "tensorrt" and find_runtime("tensorrt", library.release).lacks("Attention", 23):
        return (
            f"tensorrt {library.version} has no Attention operator: install 10.14 or newer, {instead}, or rewrite the "
            f"bundle with python deploy/downgrade.py --for tensorrt-{library.release}"
        )
    if name == "tensorrt" and not cuda_gpu():
        return f"tensorrt must run on the GPU that the engine is for, and none is available: {instead}"
    return ""
