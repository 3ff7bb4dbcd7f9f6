"""Tabulates the results of quantization-aware training: python benchmarks/qat.py runs/qat/*/*-qat

Only reads the bundles that quant/qat.py wrote.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from illama.cli import run_command
from illama.errors import UserError
from illama.manifest import Manifest

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


def row(manifest: Manifest) -> tuple[str, ...]:
    """Returns a bundle's row; accuracy drops are in points, with 95% confidence intervals.

    Raises:
        UserError: the bundle is not one of quant/qat.py.
    """
    scores, quantization = manifest.scores, manifest.quantization
    if quantization is None or scores is None or "qat" not in scores.drops:
        raise UserError("a folder is not a bundle of quant/qat.py: give only such folders")
    values, drops = scores.values, scores.drops
    lost, left = drops["ptq"].points, drops["qat"].points
    won = f"{100 * (lost - left) / lost:.0f}%" if lost > 0.2 else "-"  # a smaller drop is not significant
    return (
        quantization.scheme,
        str(scores.epochs),
        f"{values['fp32']:.2f}",
        f"{values['ptq']:.2f}",
        str(drops["ptq"]),
        f"{values['qat']:.2f}",
        str(drops["qat"]),
        won,
        f"{values.get('torchao', values.get('onnx')):.2f}",
        f"{values['fused_onnx']:.2f}" if "fused_onnx" in values else "-",
    )


def main(options: Options) -> None:
    if not options.bundles:
        raise UserError("no bundle given: give folders that quant/qat.py wrote")
    manifests = [Manifest.read(folder) for folder in options.bundles]
    table = [HEADER, ("---",) * len(HEADER), *map(row, manifests)]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    scores = manifests[0].scores
    assert scores is not None and scores.machine is not None  # row checks it
    machine, images = scores.machine, scores.images
    commands = "\n".join(f"    {manifest.provenance.command}" for manifest in manifests)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "qat.md").write_text(
        f"{text}\n\nTop-1 of {images:,} test images, of the network that rounds as the file does and of the files in "
        "ONNX Runtime,\nor PyTorch for torchao's; drops from FP32 in points, with a 95% interval from a paired "
        "bootstrap. PTQ is the same scheme\nwithout training. "
        f"{machine['cpu']}, {machine['cores']} cores, GPU: {machine['gpu'] or 'none'}.\n\n{commands}\n"
    )
    content = [asdict(each) for each in manifests]
    for entry in content:  # without paths of this machine
        entry["provenance"].pop("source")
        inputs = entry["provenance"]["inputs"]
        entry["provenance"]["inputs"] = {"/".join(Path(path).parts[-2:]): digest for path, digest in inputs.items()}
    (options.out / "qat.json").write_text(json.dumps(content, indent=2, default=str) + "\n")
    print(text)


if __name__ == "__main__":
    run_command(Options, main)
