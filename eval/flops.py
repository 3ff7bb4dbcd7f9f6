"""Multiply-accumulates (MACs) of the published sizes:

python eval/flops.py
python eval/flops.py --out results/flops

Counts from the config alone, under every attention mask and for every form of attention. eval/cost_model/macs.py
defines the forms, what is counted, and the formulas.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from illama.cli import run_command


@dataclass(frozen=True)
class FlopsOptions:
    """Print the MACs of model sizes, for every mask and every form of attention.

    Writes the table to OUT as flops.md, and with all figures as flops.json.

    Attributes:
        sizes: presets, such as tiny; NAME@PIXELS for another resolution.
        out: folder for the results.
    """

    sizes: tuple[str, ...] = ("nano", "tiny", "small", "base", "base@384", "large", "large@384")
    out: Path = Path("runs/flops")


def main(options: FlopsOptions) -> None:
    # Imported here, so that --help does not wait for PyTorch.
    from eval.cost_model.macs import COLUMNS, count_macs, macs_table, preset_named, readout_saving
    from eval.report.store import write_results

    counts = {
        size: {title: count_macs(preset_named(size, mask), form) for title, (mask, form) in COLUMNS.items()}
        for size in options.sizes
    }
    facts = {
        "macs": {size: {title: asdict(macs) for title, macs in each.items()} for size, each in counts.items()},
        "saved_by_the_last_block_percent": {size: readout_saving(size) for size in counts},
    }
    print("Giga-MACs for one image: the whole network, and in brackets its attention (qkv, products, proj)\n")
    write_results(options.out, "flops", facts, macs_table(counts))


if __name__ == "__main__":
    run_command(FlopsOptions, main)
