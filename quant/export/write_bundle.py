"""Bundles of quantized networks: ONNX graphs, manifest and scheme."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from illama.bundle import CPU_ONNX, FUSED_ONNX, SCHEME, Manifest, command_line, sha256
from illama.data.datasets import Preprocessing
from illama.models.attention import MaskedNetwork
from illama.partial_work import PartialWork
from quant.export.onnx_export import export_onnx
from quant.inputs import Inputs
from quant.quantizers.calibrate import calibrate
from quant.quantizers.torchao_backend import check, load_torchao, quantize_with_torchao, write_torchao
from quant.schemes.scheme import Scheme, describe, emulated_on_cpus, resolve, unfit_for_tensorrt, write_scheme

_REFERENCES = {"fp32": CPU_ONNX, "fp16": FUSED_ONNX}  # bundle -> its graph
SOURCE = "source"  # key in a manifest's metrics: what the bundle was made from


@dataclass(frozen=True)
class Origin:
    """The parts of the manifest that all bundles of one checkpoint share; see :class:`illama.bundle.Manifest`.

    Attributes:
        source: arguments of :func:`quant.inputs.open_inputs` that open the same inputs again.
    """

    preprocessing: Preprocessing
    classes: tuple[str, ...]
    inputs: Mapping[str, str]
    source: Mapping[str, Any]
    seed: int = 0

    @classmethod
    def of(cls, inputs: Inputs, seed: int = 0, files: Mapping[str, str] | None = None) -> Origin:
        """Returns the origin of a checkpoint and its data; ``files``: SHA-256 of other input files, by path."""
        weights = inputs.checkpoint.weights
        hashes = {str(weights): sha256(weights), **(files or {})}
        return cls(inputs.preprocessing, tuple(inputs.data.classes), hashes, inputs.source, seed)

    def manifest(self, config: Mapping[str, Any], metrics: Mapping[str, Any]) -> Manifest:
        """Returns the manifest of a bundle of a network with that config."""
        return Manifest(
            command_line(),
            dict(config),
            asdict(self.preprocessing),
            list(self.classes),
            self.seed,
            dict(self.inputs),
            {SOURCE: dict(self.source), **metrics},
        )


def check_scheme(model: MaskedNetwork, scheme: Scheme) -> None:
    """Raises UserError if ``scheme`` does not fit ``model``, or its backend does not support it."""
    if scheme.backend == "torchao":
        check(model, scheme)
    else:
        resolve(scheme, model)


def quantize(model: MaskedNetwork, scheme: Scheme, batches: Sequence[Tensor]) -> MaskedNetwork:
    """Returns a copy of ``model`` quantized by the scheme's backend.

    Args:
        batches: calibration images (B, C, H, W); torchao uses none.
    """
    return quantize_with_torchao(model, scheme) if scheme.backend == "torchao" else calibrate(model, scheme, batches)


def write_graphs(
    folder: Path, model: MaskedNetwork, origin: Origin, files: tuple[str, ...], metrics: Mapping[str, Any]
) -> Path:
    """Exports ``model`` to the ONNX files named in a new folder, with a manifest, and returns the folder.

    Args:
        files: CPU_ONNX, FUSED_ONNX or both; the fused graph is in half precision.
    """
    folder.mkdir(exist_ok=True)
    if CPU_ONNX in files:
        export_onnx(model, folder / CPU_ONNX, "plain")
    if FUSED_ONNX in files:
        export_onnx(model, folder / FUSED_ONNX, "fused", torch.float16)
    origin.manifest(model.config.to_dict(), metrics).write(folder)
    return folder


def write_quantized(
    folder: Path,
    model: MaskedNetwork,
    quantized: MaskedNetwork,
    scheme: Scheme,
    origin: Origin,
    metrics: Mapping[str, Any],
) -> Path:
    """Writes the scheme of a quantized network, and its graphs for the runtimes that support the scheme.

    The manifest's metrics describe the scheme: ``layers`` (:func:`quant.schemes.scheme.describe`), ``no_tensorrt``, the
    reason why there is no fused graph, and ``not_timed``, the reason why a CPU's latency is meaningless. Reasons that
    do not apply are empty.

    Args:
        model: the floating-point network that ``quantized`` was made from.
    """
    plan = resolve(scheme, model)
    no_tensorrt = unfit_for_tensorrt(plan) if scheme.backend == "onnx" else "it runs inside PyTorch"
    files: tuple[str, ...] = (CPU_ONNX,) if no_tensorrt else (CPU_ONNX, FUSED_ONNX)
    facts = {"layers": describe(plan, model), "no_tensorrt": no_tensorrt, "not_timed": emulated_on_cpus(plan)}
    if scheme.backend == "torchao":
        files, facts["not_timed"] = (), ""
    write_graphs(folder, quantized, origin, files, {"scheme": scheme.name, **facts, **metrics})
    if scheme.backend == "torchao":
        write_torchao(quantized, folder)
    write_scheme(scheme, folder / SCHEME)
    return folder


def write_bundles(
    work: PartialWork,
    inputs: Inputs,
    schemes: Sequence[Scheme],
    origin: Origin,
    step: Callable[[str], AbstractContextManager[None]],
) -> tuple[list[Path], dict[str, MaskedNetwork]]:
    """Calibrates and exports every scheme, beside the FP32 and FP16 references, unless an earlier run did.

    Args:
        work: its result gets the bundles, each in a folder with the scheme's name.
        step: called with the name of each step; the step runs inside the context manager that it returns.

    Returns:
        The bundles, and the networks that run inside PyTorch by the name of their bundle.
    """
    model, networks, batches = inputs.model, {}, list[Tensor]()
    if not work.finished.issuperset(scheme.name for scheme in schemes):
        with step("read calibration images"):
            batches = inputs.calibration
    if not work.finished.issuperset(_REFERENCES):
        with step("export fp32 and fp16"):
            for name, file in _REFERENCES.items():
                work.part(name, partial(write_graphs, model=model, origin=origin, files=(file,), metrics={}))
    for scheme in schemes:
        if scheme.name not in work.finished:
            with step(f"quantize and export {scheme.name}"):
                quantized = quantize(model, scheme, batches)
                write = partial(
                    write_quantized, model=model, quantized=quantized, scheme=scheme, origin=origin, metrics={}
                )
                bundle = work.part(scheme.name, write)
            print_layers(bundle)
        if scheme.backend == "torchao":
            networks[scheme.name] = load_torchao(work.result / scheme.name, copy.deepcopy(model))
    return [work.result / name for name in (*_REFERENCES, *(scheme.name for scheme in schemes))], networks


def print_layers(bundle: Path) -> None:
    """Prints how a scheme quantized each layer."""
    for layer, weight, activation in Manifest.read(bundle).metrics["layers"]:
        print(f"  {layer:<26} {f'weight {weight}, ' if weight else ''}{'input ' if weight else ''}{activation}")
