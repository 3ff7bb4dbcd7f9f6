"""Bundles of quantized networks: ONNX graphs, manifest and scheme."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from illama.bundle import CPU_ONNX, FUSED_ONNX, SCHEME, TORCHAO, GoldenImages, size_of
from illama.data.preprocessing import Preprocessing
from illama.manifest import Manifest, Provenance, Quantization
from illama.memory import release_memory
from illama.models.attention import MaskedNetwork
from illama.models.config import NetworkConfig
from illama.partial_work import PartialWork
from quant.export.golden import golden_answers
from quant.export.half_precision import export_half
from quant.export.onnx_export import export_onnx
from quant.inputs import Inputs
from quant.quantizers.calibrate import calibrate
from quant.quantizers.rotation import check_rotations, rotated_mlps
from quant.quantizers.torchao_backend import check, load_torchao, quantize_with_torchao, write_torchao
from quant.schemes.scheme import QuantizationPlan, Scheme, resolve, write_scheme

_REFERENCES = {"fp32": CPU_ONNX, "fp16": FUSED_ONNX}  # bundle -> its graph


@dataclass(frozen=True)
class InMemory:
    """A network and batches of calibration images (B, C, H, W), both on the CPU, and where to calibrate."""

    model: MaskedNetwork
    calibration: list[Tensor]
    device: str


@dataclass(frozen=True)
class Origin:
    """The parts of the manifest that all bundles of one checkpoint share; see :class:`illama.manifest.Manifest`.

    ``golden`` is where the images of their golden answers come from; ``rewrite`` is called with each new bundle, and
    may rewrite its graphs.
    """

    preprocessing: Preprocessing
    classes: tuple[str, ...]
    provenance: Provenance
    golden: GoldenImages = "calibration"
    rewrite: Callable[[Path], None] | None = None

    @classmethod
    def of(cls, inputs: Inputs, seed: int = 0, files: Mapping[str, str] | None = None) -> Origin:
        """Returns the origin of a checkpoint and its data; ``files``: SHA-256 of other input files, by path."""
        hashes = {**inputs.checkpoint.digests(), **(files or {})}
        provenance = Provenance(seed=seed, inputs=hashes, source=inputs.source)
        return cls(inputs.preprocessing, inputs.classes, provenance)

    def manifest(self, config: NetworkConfig, quantization: Quantization | None = None) -> Manifest:
        """Returns the manifest of a bundle of a network with that config."""
        facts = (self.preprocessing, self.classes, self.provenance, quantization)
        return Manifest(config.kind, config.to_dict(), *facts, features=config.features or None)


def plan_quantization(model: MaskedNetwork, scheme: Scheme) -> QuantizationPlan:
    """Returns the plan to quantize ``model``; raises UserError if the scheme does not fit it, or not its backend."""
    plan = resolve(scheme, model)
    check_rotations(model, scheme.rotate)
    if scheme.backend == "torchao":
        check(model, plan)
    return plan


def quantize(
    model: MaskedNetwork, plan: QuantizationPlan, batches: Sequence[Tensor], device: str = "cpu"
) -> MaskedNetwork:
    """Returns a copy of ``model`` quantized by the scheme's backend.

    Args:
        batches: calibration images (B, C, H, W); torchao uses none.
        device: where to calibrate, "cpu" or "cuda".
    """
    in_pytorch = plan.scheme.backend == "torchao"
    return quantize_with_torchao(model, plan) if in_pytorch else calibrate(model, plan, batches, device)


def write_graphs(
    folder: Path,
    model: MaskedNetwork,
    origin: Origin,
    files: tuple[str, ...],
    batches: Sequence[Tensor],
    quantization: Quantization | None = None,
) -> Path:
    """Exports ``model`` to the ONNX files named in a new folder, with a manifest, and returns the folder.

    Args:
        files: CPU_ONNX, FUSED_ONNX, both or none; the fused graph is in half precision.
        batches: calibration images (B, C, H, W), on which the range of half precision is checked, and of which golden
            answers are made.
    """
    folder.mkdir(exist_ok=True)
    manifest = origin.manifest(model.config, quantization)
    if CPU_ONNX in files:
        export_onnx(model, folder / CPU_ONNX, "plain")
        release_memory()
    if FUSED_ONNX in files:
        manifest = replace(manifest, numeric_range=export_half(model, folder / FUSED_ONNX, batches))
    if origin.golden != "none":
        images = batches if origin.golden == "calibration" else []
        golden = golden_answers(model, origin.preprocessing, images, quantization is not None)
        golden.write(folder)
    replace(manifest, golden_answers=golden.facts.source if origin.golden != "none" else "none").write(folder)
    if origin.rewrite:
        origin.rewrite(folder)
    return folder


def write_quantized(
    folder: Path, quantized: MaskedNetwork, plan: QuantizationPlan, origin: Origin, batches: Sequence[Tensor]
) -> Path:
    """Writes the scheme of a quantized network, and its graphs for the runtimes that support the scheme.

    Prints which layers have rotated inputs.

    Args:
        batches: see :func:`write_graphs`.
    """
    if rotated := rotated_mlps(quantized):
        print(f"  rotated at run time: inputs of {', '.join(f'{name}.fc2' for name in rotated)}", flush=True)
    quantization, in_pytorch = plan.quantization, plan.scheme.backend == "torchao"
    files = () if in_pytorch else (CPU_ONNX,) if quantization.no_tensorrt else (CPU_ONNX, FUSED_ONNX)
    write_graphs(folder, quantized, origin, files, batches, quantization)
    if in_pytorch:
        write_torchao(quantized, folder)
    write_scheme(plan.scheme, folder / SCHEME)
    return folder


def write_bundles(
    work: PartialWork,
    inputs: Inputs | InMemory,
    plans: Sequence[QuantizationPlan],
    origin: Origin,
    step: Callable[[str], AbstractContextManager[None]],
    references: bool = True,
) -> tuple[list[Path], dict[str, MaskedNetwork]]:
    """Calibrates and exports by every plan, beside the FP32 and FP16 references, unless an earlier run did.

    Args:
        work: its result gets the bundles, each in a folder with the scheme's name.
        step: called with the name of each step; the step runs inside the context manager that it returns.
        references: whether to write the FP32 and FP16 bundles too.

    Returns:
        The bundles, and the networks that run inside PyTorch by the name of their bundle.
    """
    model, networks, batches = inputs.model, {}, list[Tensor]()
    floats = _REFERENCES if references else {}
    if not work.finished.issuperset([*floats, *(plan.scheme.name for plan in plans)]):
        with step("read calibration images"):
            batches = inputs.calibration
    if not work.finished.issuperset(floats):
        with step("export fp32 and fp16"):
            for name, file in floats.items():
                work.part(name, partial(write_graphs, model=model, origin=origin, files=(file,), batches=batches))
    for plan in plans:
        scheme = plan.scheme
        if scheme.name not in work.finished:
            with step(f"quantize and export {scheme.name}"):
                quantized = quantize(model, plan, batches, inputs.device)
                write = partial(write_quantized, quantized=quantized, plan=plan, origin=origin, batches=batches)
                work.part(scheme.name, write)
            print_layers(plan)
        if scheme.backend == "torchao":
            networks[scheme.name] = load_torchao(work.result / scheme.name, copy.deepcopy(model))
    return [work.result / name for name in (*floats, *(plan.scheme.name for plan in plans))], networks


def describe_bundle(shown_as: Path, bundle: Path) -> str:
    """Returns the files of a bundle with their sizes in 10^6 bytes, as text; ``shown_as`` is where it will be."""
    files = [bundle / name for name in (CPU_ONNX, FUSED_ONNX, TORCHAO) if (bundle / name).exists()]
    return f"{shown_as}: {', '.join(f'{file.name} {size_of(file) / 1e6:.2f} MB' for file in files)}"


def print_layers(plan: QuantizationPlan) -> None:
    """Prints how a scheme quantizes each layer."""
    for each in plan.layers:
        weight = f"weight {each.weight}, input " if each.weight else ""
        print(f"  {each.layer:<26} {weight}{each.input}")
