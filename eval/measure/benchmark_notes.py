"""What a report says of its bundles and engines as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deploy.findings.lint_graph import lint_graph
from deploy.findings.show import describe
from deploy.versions import newest_runtimes
from eval.measure.targets import BenchmarkTarget
from illama.errors import UserError
from illama.manifest import NO_TENSORRT, Manifest


def notes_on(targets: Sequence[BenchmarkTarget], manifests: Mapping[str, Manifest]) -> list[str]:
    """Returns notes on what was not measured, over all targets."""
    notes = []
    for scheme, manifest in manifests.items():
        quantization = manifest.quantization
        if quantization and quantization.no_tensorrt:
            notes.append(f"{scheme} has no graph for TensorRT: {NO_TENSORRT[quantization.no_tensorrt]}.")
    notes += dict.fromkeys(line for each in targets for line in each.left_out)
    engines = [each.built[1] for each in targets if each.built]
    cannot_run = [each for each in targets if each.not_timed and each.not_timed.reason == "cannot run"]
    idle = [each.built[1] for each in cannot_run if each.built]
    if idle:
        proven = " with every attention proven fused" if all(record.fused for record in idle) else ""
        notes.append(
            f"{len(idle)} of {len(engines)} engines were built{proven} but not run or timed, because this machine "
            "has no NVIDIA GPU that they were built for."
        )
    if any(record.library == "tensorrt_rtx" for record in engines):
        notes.append("TensorRT-RTX multiplies INT8 weights in FP16; INT8 tensor cores need the full TensorRT.")
    return notes


def lint_targets(targets: Sequence[BenchmarkTarget]) -> dict[str, list[str]]:
    """Returns scheme/file -> what the linter finds in each ONNX file for the newest release of its runtime."""
    found, runtimes = {}, newest_runtimes()
    for target in targets:
        name = f"{target.scheme}/{target.path.name}"
        if target.path.suffix == ".onnx" and name not in found:
            try:
                found[name] = describe(lint_graph(target.path, runtimes.get(target.path.name)))
            except UserError as error:  # a file that a runtime opens, but the linter does not
                found[name] = [str(error)]
    return found


def layers_of(manifests: Mapping[str, Manifest]) -> dict[str, list[list[str]]]:
    """Returns scheme -> rows of (layer, format of its weight, format of its input), for quantized bundles."""
    return {
        scheme: [[layer.layer, layer.weight, layer.input] for layer in manifest.quantization.layers]
        for scheme, manifest in manifests.items()
        if manifest.quantization
    }
