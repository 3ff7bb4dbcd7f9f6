"""TensorRT and TensorRT for RTX behind one door: everything in which they differ is here."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal

import torch

from illama.errors import UserError

LibraryName = Literal["tensorrt", "tensorrt_rtx"]

# Compute capabilities that TensorRT for RTX builds for ahead of time; tensorrt builds for the GPU it runs on.
RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")


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

    def create_network(self, builder: Any) -> Any:
        """An empty, strongly typed network: its precision is the graph's, and nothing else decides it."""
        flags = 0
        if self.name == "tensorrt" and hasattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
            flags = 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)  # always so from version 11
        return builder.create_network(flags)

    def resolve_targets(self, targets: tuple[str, ...]) -> tuple[str, ...]:
        """The compute capabilities to build for; empty for TensorRT-RTX's portable default.

        Raises:
            UserError: for one that the library cannot build for.
        """
        if self.name == "tensorrt":
            if targets:
                raise UserError("tensorrt builds for the GPU it runs on: leave --targets out, or install tensorrt-rtx")
            return ("sm{}{}".format(*torch.cuda.get_device_capability()),)
        for target in targets:
            if target not in RTX_TARGETS:
                raise UserError(f"unknown target {target!r}: choose from {', '.join(RTX_TARGETS)}")
        return targets

    def set_targets(self, config: Any, targets: tuple[str, ...]) -> None:
        """Choose the compute capabilities the engine is for; none leaves the library's default."""
        if targets and self.name == "tensorrt_rtx":
            config.num_compute_capabilities = len(targets)
            for index, target in enumerate(targets):
                config.set_compute_capability(getattr(self.trt.ComputeCapability, target.upper()), index)


def find_library() -> Library | None:
    """The installed TensorRT that can build here, the full library first; None if there is none.

    The full library builds on the GPU it builds for; TensorRT for RTX needs none.
    """
    names: tuple[LibraryName, ...] = ("tensorrt", "tensorrt_rtx") if torch.cuda.is_available() else ("tensorrt_rtx",)
    for name in names:
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError):  # OSError: the bindings are there, NVIDIA's shared libraries are not
            continue
        if hasattr(module, "Builder"):
            return Library(name, module)
    return None
