"""TensorRT and TensorRT for RTX behind one door: everything in which they differ is here.

Their Python modules have one interface, and a test holds this project's calls to it by the signatures of the package
tensorrt-stubs; of what is newer than those stubs, and of constants, it knows nothing.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from deploy.runtimes.names import TITLES
from deploy.trt.engine_options import LibraryName
from illama.errors import UserError

if TYPE_CHECKING:
    import tensorrt


# Compute capabilities that TensorRT for RTX builds for ahead of time; tensorrt builds for the GPU it runs on.
RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
FUSED_ATTENTION_SINCE = (10, 14)  # TensorRT's version that has the Attention operator


@dataclass(frozen=True)
class Library:
    """An installed TensorRT.

    Attributes:
        name: the Python module's name.
        trt: the module.
    """

    name: LibraryName
    trt: Any

    @property
    def version(self) -> str:
        return str(self.trt.__version__)

    @property
    def title(self) -> str:
        """Its name as a person writes it."""
        return TITLES[self.name]

    @property
    def trtexec(self) -> str:
        """The name of its command-line tool."""
        return "trtexec" if self.name == "tensorrt" else "tensorrt_rtx"

    def create_network(self, builder: tensorrt.Builder) -> tensorrt.INetworkDefinition:
        """An empty, strongly typed network: its precision is the graph's, and nothing else decides it."""
        flags = 0
        if self.name == "tensorrt" and hasattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
            flags = 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)  # always so from version 11
        return builder.create_network(flags)

    def resolve_targets(self, targets: tuple[str, ...]) -> tuple[str, ...]:
        """The compute capabilities to build for; empty for TensorRT-RTX's portable default.

        Args:
            targets: such as ("sm86", "sm89"), or several in one with commas.

        Raises:
            UserError: for one that the library cannot build for.
        """
        targets = tuple(target for part in targets for target in part.split(",") if target)
        if self.name == "tensorrt":
            here = "sm{}{}".format(*torch.cuda.get_device_capability())
            if any(target != here for target in targets):
                raise UserError(
                    f"tensorrt builds for the GPU it runs on, {here}: leave --targets out, or build "
                    "with --library tensorrt_rtx"
                )
            return (here,)
        for target in targets:
            if target not in RTX_TARGETS:
                raise UserError(f"unknown target {target!r}: choose from {', '.join(RTX_TARGETS)}")
        return tuple(target for target in RTX_TARGETS if target in targets)

    def set_targets(self, config: tensorrt.IBuilderConfig, targets: tuple[str, ...]) -> None:
        """Choose the compute capabilities the engine is for; none leaves the library's default."""
        if targets and self.name == "tensorrt_rtx":
            newer: Any = config  # than the stubs
            newer.num_compute_capabilities = len(targets)
            for index, target in enumerate(targets):
                newer.set_compute_capability(getattr(self.trt.ComputeCapability, target.upper()), index)

    def check_options(
        self, *, timing_cache: bool, hardware_compatible: bool, version_compatible: bool, refittable: bool
    ) -> None:
        """UserError for options that TensorRT-RTX does not have, or not on a machine without a GPU."""
        if self.name == "tensorrt":
            return
        no_gpu = refittable and not torch.cuda.is_available()
        for wanted, reason in (
            (timing_cache, "has no use for --timing-cache: it times nothing when it builds"),
            (hardware_compatible, "has no --hardware-compatible: give --targets several GPUs, or none for all"),
            (version_compatible, "has no --version-compatible: build with the version that will run the engine"),
            (no_gpu, "builds with --refit or --weight-stripped on a GPU only, and there is none here"),
        ):
            if wanted:
                raise UserError(f"TensorRT-RTX {reason}")

    def deserialize(self, data: bytes, version_compatible: bool = False) -> tensorrt.ICudaEngine:
        """A serialized engine on this machine's GPU; check its record first, for it brings code along.

        Raises:
            UserError: if the library will not load it here.
        """
        runtime: tensorrt.Runtime = self.trt.Runtime(self.trt.Logger(self.trt.Logger.ERROR))
        runtime.engine_host_code_allowed = version_compatible  # such an engine carries its own small runtime
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise UserError(f"{self.name} {self.version} will not load the engine on this GPU: build it for this one")
        return engine

    def runtime_config(self, engine: tensorrt.ICudaEngine) -> tuple[Any, Any]:
        """(an execution context's configuration, its cache of compiled kernels); (None, None) with the full library.

        TensorRT for RTX compiles kernels for the very shapes that come, at the first call, and captures a CUDA graph.
        """
        if self.name == "tensorrt":
            return None, None
        config: Any = engine.create_runtime_config()  # newer than the stubs, as are a cache's methods
        cache = config.create_runtime_cache()
        config.set_runtime_cache(cache)
        config.dynamic_shapes_kernel_specialization_strategy = self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return config, cache


def fits_this_gpu(targets: tuple[str, ...], hardware_compatible: bool = False) -> bool:
    """Whether an engine for these compute capabilities is for the GPU here; False without one."""
    if not torch.cuda.is_available():
        return False
    here = "sm{}{}".format(*torch.cuda.get_device_capability())
    return hardware_compatible or not targets or here in targets


def find_library(name: LibraryName | None = None) -> Library | None:
    """The installed TensorRT that can build here, the full library first; None if there is none.

    The full library builds on the GPU it builds for; TensorRT for RTX needs none.

    Raises:
        UserError: if ``name`` is asked for and cannot build here.
    """
    both: tuple[LibraryName, ...] = ("tensorrt", "tensorrt_rtx") if torch.cuda.is_available() else ("tensorrt_rtx",)
    for candidate in (name,) if name else both:
        library = _import(candidate)
        trouble = _trouble(library, candidate)
        if library and not trouble:
            return library
        if name:
            raise UserError(trouble)
    return None


def _import(name: LibraryName) -> Library | None:
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError):  # OSError: the bindings are there, NVIDIA's shared libraries are not
        return None
    return Library(name, module) if hasattr(module, "Builder") else None


def _trouble(library: Library | None, name: LibraryName) -> str:
    """Why a library cannot build here; empty if it can."""
    instead = "use --library tensorrt_rtx (pip install tensorrt-rtx)"
    if library is None:
        return f"{name} is not installed here"
    if name == "tensorrt" and tuple(int(part) for part in library.version.split(".")[:2]) < FUSED_ATTENTION_SINCE:
        return f"tensorrt {library.version} has no fused Attention operator: install 10.14 or newer, or {instead}"
    if name == "tensorrt" and not torch.cuda.is_available():
        return f"tensorrt builds on the GPU it builds for, and there is none here: {instead}"
    return ""
