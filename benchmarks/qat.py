"""Tabulates the results of quantization-aware training: python benchmarks/qat.py runs/qat/*/*-qat

Only reads the bundles that quant/qat.py wrote.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from illama.bundle import Manifest
from illama.cli import run_command
from illama.errors import UserError
from quant.export.write_bundle import SOURCE

HEADER = (
    "scheme",
    "epochs",
    "FP32 %",
    "PTQ %",
    "PTQ's drop",
    "QAT %",
    "QAT's drop",
    "won back",
    "its file %",
    "model.fused.onnx %",
)


@dataclass(frozen=True)
class Options:
    """Tabulate the results of quantization-aware training.

    Attributes:
        bundles: bundles of quant/qat.py.
        out: folder of qat.json and qat.md.
    """

    bundles: tyro.conf.Positional[tuple[Path, ...]]
    out: Path = Path("results/qat")


def row(metrics: dict[str, Any]) -> tuple[str, ...]:
    """Returns a bundle's row; accuracy drops are in points, with 95% confidence intervals."""
    lost, left = (metrics[f"{name}_drop"]["points"] for name in ("ptq", "qat"))
    won = f"{100 * (lost - left) / lost:.0f}%" if lost > 0.2 else "-"  # a smaller drop is not significant
    return (
        metrics["scheme"],
        str(metrics["epochs"]),
        f"{metrics['fp32_top1']:.2f}",
        f"{metrics['ptq_top1']:.2f}",
        _drop(metrics["ptq_drop"]),
        f"{metrics['qat_top1']:.2f}",
        _drop(metrics["qat_drop"]),
        won,
        f"{metrics['torchao_top1' if 'torchao_top1' in metrics else 'onnx_top1']:.2f}",
        f"{metrics['fused_onnx_top1']:.2f}" if "fused_onnx_top1" in metrics else "-",
    )


def _drop(drop: dict[str, float]) -> str:
    return f"{drop['points']:+.2f} ({drop['low']:+.2f} to {drop['high']:+.2f})"


def main(options: Options) -> None:
    if not options.bundles:
        raise UserError("no bundle given: give folders that quant/qat.py wrote")
    manifests = [Manifest.read(folder) for folder in options.bundles]
    if any("qat_drop" not in manifest.metrics for manifest in manifests):
        raise UserError("a folder is not a bundle of quant/qat.py: give only such folders")
    table = [HEADER, ("---",) * len(HEADER), *(row(manifest.metrics) for manifest in manifests)]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    machine = manifests[0].metrics["machine"]
    commands = "\n".join(f"    {manifest.made_by}" for manifest in manifests)
    images = manifests[0].metrics["test_images"]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "qat.md").write_text(
        f"{text}\n\nTop-1 of {images:,} test images, of the network that rounds as the file does and of the files in "
        "ONNX Runtime,\nor PyTorch for torchao's; drops from FP32 in points, with a 95% interval from a paired "
        "bootstrap. PTQ is the same scheme\nwithout training. "
        f"{machine['cpu']}, {machine['cores']} cores, GPU: {machine['gpu'] or 'none'}.\n\n{commands}\n"
    )
    content = [{"made_by": each.made_by, **each.metrics, "versions": each.versions} for each in manifests]
    for entry in content:  # a path on this machine
        entry.pop(SOURCE, None)
    (options.out / "qat.json").write_text(json.dumps(content, indent=2) + "\n")
    print(text)


if __name__ == "__main__":
    run_command(Options, main)
