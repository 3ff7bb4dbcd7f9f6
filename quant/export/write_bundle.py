"""Bundles of quantized networks: ONNX graphs, manifest and scheme."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from illama.bundle import CPU_ONNX, FUSED_ONNX, SCHEME, sha256
from illama.data.preprocessing import Preprocessing
from illama.manifest import Manifest, NoTensorRT, Provenance, Quantization
from illama.models.attention import MaskedNetwork
from illama.models.config import NetworkConfig
from quant.export.onnx_export import export_onnx
from quant.inputs import Inputs
from quant.quantizers.calibrate import calibrate
from quant.quantizers.torchao_backend import check, load_torchao, quantize_with_torchao, write_torchao
from quant.schemes.scheme import Scheme, describe, emulated_on_cpus, resolve, unfit_for_tensorrt, write_scheme


@dataclass(frozen=True)
class Origin:
    """The parts of the manifest that all bundles of one checkpoint share; see :class:`illama.manifest.Manifest`."""

    preprocessing: Preprocessing
    classes: tuple[str, ...]
    provenance: Provenance

    @classmethod
    def of(cls, inputs: Inputs, seed: int = 0, files: Mapping[str, str] | None = None) -> Origin:
        """Returns the origin of a checkpoint and its data; ``files``: SHA-256 of other input files, by path."""
        weights = inputs.checkpoint.weights
        hashes = {str(weights): sha256(weights), **(files or {})}
        provenance = Provenance(seed=seed, inputs=hashes, source=inputs.source)
        return cls(inputs.preprocessing, tuple(inputs.data.classes), provenance)

    def manifest(self, config: NetworkConfig, quantization: Quantization | None = None) -> Manifest:
        """Returns the manifest of a bundle of a network with that config."""
        facts = (self.preprocessing, self.classes, self.provenance, quantization)
        return Manifest(config.kind, config.to_dict(), *facts)


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
    folder: Path, model: MaskedNetwork, origin: Origin, files: tuple[str, ...], quantization: Quantization | None = None
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
    origin.manifest(model.config, quantization).write(folder)
    return folder


def write_quantized(
    folder: Path, model: MaskedNetwork, quantized: MaskedNetwork, scheme: Scheme, origin: Origin
) -> Path:
    """Writes the scheme of a quantized network, and its graphs for the runtimes that support the scheme.

    Args:
        model: the floating-point network that ``quantized`` was made from.
    """
    plan, in_pytorch = resolve(scheme, model), scheme.backend == "torchao"
    no_tensorrt: NoTensorRT | None = "pytorch" if in_pytorch else unfit_for_tensorrt(plan)
    emulated = None if in_pytorch else emulated_on_cpus(plan)
    files = () if in_pytorch else (CPU_ONNX,) if no_tensorrt else (CPU_ONNX, FUSED_ONNX)
    quantization = Quantization(scheme.name, describe(plan, model), no_tensorrt, emulated)
    write_graphs(folder, quantized, origin, files, quantization)
    if in_pytorch:
        write_torchao(quantized, folder)
    write_scheme(scheme, folder / SCHEME)
    return folder


def write_bundles(
    folder: Path,
    inputs: Inputs,
    schemes: Sequence[Scheme],
    origin: Origin,
    step: Callable[[str], AbstractContextManager[None]],
) -> tuple[list[Path], dict[str, MaskedNetwork]]:
    """Calibrates and exports every scheme, beside the FP32 and FP16 references.

    Args:
        folder: folder for the bundles, each in a folder with the scheme's name.
        step: called with the name of each step; the step runs inside the context manager that it returns.

    Returns:
        The bundles, and the networks that run inside PyTorch by the name of their bundle.
    """
    model, networks = inputs.model, {}
    with step("read calibration images"):
        batches = inputs.calibration
    with step("export fp32 and fp16"):
        bundles = [
            write_graphs(folder / "fp32", model, origin, (CPU_ONNX,)),
            write_graphs(folder / "fp16", model, origin, (FUSED_ONNX,)),
        ]
    for scheme in schemes:
        with step(f"quantize and export {scheme.name}"):
            quantized = quantize(model, scheme, batches)
            bundle = write_quantized(folder / scheme.name, model, quantized, scheme, origin)
            if scheme.backend == "torchao":
                networks[scheme.name] = load_torchao(bundle, copy.deepcopy(model))
        bundles.append(bundle)
        print_layers(bundle)
    return bundles, networks


def print_layers(bundle: Path) -> None:
    """Prints how a scheme quantized each layer."""
    quantization = Manifest.read(bundle).quantization
    for each in quantization.layers if quantization else ():
        weight = f"weight {each.weight}, input " if each.weight else ""
        print(f"  {each.layer:<26} {weight}{each.input}")
