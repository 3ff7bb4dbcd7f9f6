"""Which runtime loads which ONNX file: the facts in versions.yaml, with their sources.

Imports nothing slow, so that ``--help`` answers at once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from illama.bundle import CPU_ONNX, FUSED_ONNX
from illama.errors import UserError
from illama.structured_files import read_yaml

Runtime = Literal["tensorrt", "onnxruntime", "openvino"]
_GRAPHS: dict[Runtime, str] = {"tensorrt": FUSED_ONNX, "onnxruntime": CPU_ONNX, "openvino": CPU_ONNX}  # which it loads

_TITLES: dict[Runtime, str] = {"tensorrt": "TensorRT", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


@dataclass(frozen=True)
class Release:
    """What a release of a runtime, and later ones up to the next release in the table, loads.

    Attributes:
        opset: newest opset.
        source: where this is stated, or the command that tried it.
        ir: newest IR version; None if newer ones are not refused.
    """

    opset: int
    source: str
    ir: int | None = None


@dataclass(frozen=True)
class Feature:
    """An operator or number format in the form of ``opset``, and the first release that has it; None if none has."""

    name: str
    opset: int
    source: str
    since: str | None = None


@dataclass(frozen=True)
class RuntimeTable:
    """The releases of a runtime, oldest first; the operators that some lack; the number formats that some have."""

    releases: Mapping[str, Release]
    operators: tuple[Feature, ...] = ()
    formats: tuple[Feature, ...] = ()


@dataclass(frozen=True)
class Platform:
    """What is installed on a board.

    Attributes:
        title: name with all versions that are meant.
        boards: the boards that it runs on.
        python: version of its Python.
        tensorrt: version of its TensorRT.
        onnxruntime: newest version of ONNX Runtime that we found for it as a wheel.
        gpu_lacks: number formats that none of its GPUs multiplies.
    """

    title: str
    boards: str
    python: str
    tensorrt: str
    onnxruntime: str
    source: str
    gpu_lacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Versions:
    """The content of versions.yaml."""

    runtimes: Mapping[Runtime, RuntimeTable]
    platforms: Mapping[str, Platform]


@dataclass(frozen=True)
class LoadedBy:
    """A runtime in one version.

    Attributes:
        runtime: None if only an opset is given.
        version: such as 10.3.
        opset: newest opset that it loads.
        ir: newest IR version; None if newer ones are not refused.
        gpu_lacks: number formats that the board's GPU does not multiply.
    """

    runtime: Runtime | None
    version: str
    opset: int
    ir: int | None = None
    gpu_lacks: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{_TITLES[self.runtime]} {self.version}" if self.runtime else f"opset {self.opset}"

    def lacks(self, operator: str, since_opset: int) -> bool:
        """Whether it lacks an operator in the form of ``since_opset``, although it loads that opset."""
        known = read_versions().runtimes[self.runtime].operators if self.runtime else ()
        return any(each.name == operator and each.opset <= since_opset and not self._has(each) for each in known)

    def has_format(self, name: str) -> bool:
        """Whether it has a number format, such as INT8 or FLOAT8E4M3FN, in QuantizeLinear and DequantizeLinear."""
        known = read_versions().runtimes[self.runtime or "onnxruntime"].formats
        return name not in self.gpu_lacks and any(
            each.name == name and each.opset <= self.opset and (not self.runtime or self._has(each)) for each in known
        )

    def _has(self, feature: Feature) -> bool:
        return feature.since is not None and self.at_least(feature.since)

    @property
    def weakly_typed(self) -> bool:
        """Whether it chooses the precision of float32 operators itself and takes Q/DQ of float32 only: TensorRT 8."""
        return self.runtime == "tensorrt" and not self.at_least("10.0")

    def at_least(self, version: str) -> bool:
        """Whether it is that version or a newer one."""
        return _number(self.version) >= _number(version)


@dataclass(frozen=True)
class Target:
    """What graphs must load in.

    Attributes:
        name: as given, such as jetpack-6, or opset-17.
        graphs: file name in a bundle -> the runtime that loads it; other files stay as they are.
    """

    name: str
    graphs: Mapping[str, LoadedBy]

    def loads(self, formats: Collection[str]) -> bool:
        """Whether one of its runtimes has all these number formats."""
        return any(all(map(runtime.has_format, formats)) for runtime in self.graphs.values())


@cache
def read_versions() -> Versions:
    """Returns the content of versions.yaml."""
    return read_yaml(Path(__file__).with_name("versions.yaml"), Versions)


def opset_target(opset: int) -> Target:
    """Returns the target of graphs in an opset, for the oldest TensorRT and any other runtime that load it."""
    releases = read_versions().runtimes["tensorrt"].releases
    oldest = next(version for version, release in releases.items() if release.opset >= opset)
    graphs = {FUSED_ONNX: LoadedBy("tensorrt", oldest, opset), CPU_ONNX: LoadedBy(None, "", opset)}
    return Target(f"opset-{opset}", graphs)


def find_target(name: str) -> Target:
    """Returns the target of that name: a platform, or RUNTIME-VERSION.

    Raises:
        UserError: there is no such target.
    """
    versions, (runtime, _, version) = read_versions(), name.partition("-")
    if platform := versions.platforms.get(name):
        tensorrt = replace(find_runtime("tensorrt", platform.tensorrt), gpu_lacks=platform.gpu_lacks)
        return Target(name, {FUSED_ONNX: tensorrt, CPU_ONNX: find_runtime("onnxruntime", platform.onnxruntime)})
    for known in versions.runtimes:
        if runtime == known:
            return Target(name, {_GRAPHS[known]: find_runtime(known, version)})
    raise UserError(
        f"unknown target {name!r}: give one of {', '.join(versions.platforms)}, or a runtime and its version, such as "
        "tensorrt-8.6, onnxruntime-1.20 or openvino-2025.4"
    )


def find_runtime(runtime: Runtime, version: str) -> LoadedBy:
    """Returns a runtime in a version; raises UserError if it is no version, or older than all that are known."""
    releases = read_versions().runtimes[runtime].releases
    known = [each for each in releases if _number(each) <= _number(version)]
    if not known:
        raise UserError(f"{runtime} {version} is not known here: give {next(iter(releases))} or newer")
    return LoadedBy(runtime, version, releases[known[-1]].opset, releases[known[-1]].ir)


def newest_runtimes() -> Mapping[str, LoadedBy]:
    """Returns file name in a bundle -> the newest known release of the runtime that it is for."""
    tables = read_versions().runtimes
    both: tuple[Runtime, ...] = ("tensorrt", "onnxruntime")
    return {_GRAPHS[name]: find_runtime(name, list(tables[name].releases)[-1]) for name in both}


def _number(version: str) -> tuple[int, ...]:
    """10.3 -> (10, 3, 0), and 10 -> (10, 0, 0)"""
    try:
        return (*map(int, version.split(".")), 0, 0)[: max(3, version.count(".") + 1)]
    except ValueError as error:
        raise UserError(f"{version!r} is not a version, such as 10.3") from error
