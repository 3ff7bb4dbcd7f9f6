"""Tabulates the results of quantization-aware training: python benchmarks/qat.py runs/qat/*/*-qat

Only reads the bundles that quant/qat.py wrote. Rows of other commands that are in the results already stay there.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from illama.cli import run_command
from illama.errors import UserError
from illama.manifest import Manifest
from illama.structured_files import read_json

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


def earlier(path: Path, commands: set[str]) -> list[Manifest]:
    """Returns the manifests in ``qat.json`` of the commands whose bundles are not given again."""
    found = read_json(path, list[Manifest]) if path.exists() else []
    return [manifest for manifest in found if manifest.provenance.command not in commands]


def without_paths(manifest: Manifest) -> dict[str, Any]:
    """Returns the content of a manifest without paths of this machine."""
    entry = asdict(manifest)
    entry["provenance"].pop("source")
    inputs = entry["provenance"]["inputs"]
    entry["provenance"]["inputs"] = {"/".join(Path(path).parts[-2:]): digest for path, digest in inputs.items()}
    return entry


def commands_by_machine(manifests: list[Manifest]) -> str:
    """Returns the commands under the machine that ran them."""
    found: dict[str, list[str]] = {}
    for manifest in manifests:
        assert manifest.scores is not None and manifest.scores.machine is not None  # row checks it
        machine = manifest.scores.machine
        title = f"{machine['cpu']}, {machine['cores']} cores, GPU: {machine['gpu'] or 'none'}"
        found.setdefault(title, []).append(f"    {manifest.provenance.command}")
    return "\n\n".join(f"{title}:\n\n" + "\n".join(commands) for title, commands in found.items())


def main(options: Options) -> None:
    if not options.bundles:
        raise UserError("no bundle given: give folders that quant/qat.py wrote")
    given = [Manifest.read(folder) for folder in options.bundles]
    kept = earlier(options.out / "qat.json", {manifest.provenance.command for manifest in given})
    manifests = sorted([*given, *kept], key=lambda manifest: manifest.provenance.command)
    table = [HEADER, ("---",) * len(HEADER), *map(row, manifests)]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    scores = manifests[0].scores
    assert scores is not None  # row checks it
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "qat.md").write_text(
        f"{text}\n\nTop-1 of {scores.images:,} test images, of the network that rounds as the file does and of the "
        "files in ONNX Runtime,\nor PyTorch for torchao's; drops from FP32 in points, with a 95% interval from a "
        f"paired bootstrap. PTQ is the same scheme\nwithout training.\n\n{commands_by_machine(manifests)}\n"
    )
    content = list(map(without_paths, manifests))
    (options.out / "qat.json").write_text(json.dumps(content, indent=2, default=str) + "\n")
    print(text)


if __name__ == "__main__":
    run_command(Options, main)
