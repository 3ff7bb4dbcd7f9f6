"""Fine-tune the shipped nano on another data set, with and without the soft mask: python benchmarks/transfer.py

The data are the emoji of ``python benchmarks/fetch_emoji.py runs/emoji``, split by concepts, in gray at 28 pixels; the
recipe is nano-emoji (arXiv 2404.06773, Table 16, at nano scale). Training from scratch is the comparison. The same
command resumes an interrupted one. It writes ``transfer.json`` and ``transfer.md`` to ``results/transfer``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from many_runs import compare, final_top1, train_all

from illama.cli import run_command
from eval.report.store import write_results
from illama.bundle import SHIPPED
from illama.errors import UserError

ARMS: dict[str, dict[str, Any]] = {
    "fine-tuned, no soft mask": {"init": SHIPPED, "new_head": True, "soft_mask": "none"},
    "fine-tuned, soft mask linear": {"init": SHIPPED, "new_head": True, "soft_mask": "linear"},
    "from scratch, soft mask linear": {"new_head": False, "soft_mask": "linear"},
}


@dataclass(frozen=True)
class TransferOptions:
    """Fine-tune the shipped nano on emoji in several ways, and compare.

    Attributes:
        emoji: folder of benchmarks/fetch_emoji.py.
        seeds: number of runs of each way, at least 2, for confidence intervals.
        out: folder of the runs.
        results: folder of the table.
    """

    emoji: Path = Path("runs/emoji")
    seeds: int = 3
    out: Path = Path("runs/transfer")
    results: Path = Path("results/transfer")


def main(options: TransferOptions) -> None:
    if options.seeds < 2:
        raise UserError("--seeds must be at least 2 for confidence intervals")
    if not (options.emoji / "train").is_dir():
        raise UserError(f"no emoji in {options.emoji}: run 'python benchmarks/fetch_emoji.py {options.emoji}' first")
    folders = {
        arm: [options.out / f"{index}-seed{seed}" for seed in range(options.seeds)] for index, arm in enumerate(ARMS)
    }
    train_all(
        {
            folder: {"recipe": "nano-emoji", "data": options.emoji, "compile": True, "seed": seed, **ARMS[arm]}
            for arm in ARMS
            for seed, folder in enumerate(folders[arm])
        }
    )
    top1 = {arm: np.array([final_top1(folder) for folder in folders[arm]]) for arm in ARMS}
    reference = top1["fine-tuned, no soft mask"]
    lines = ["| run | top-1 %, mean (seeds) | change (95% interval) |", "|---|---|---|"]
    arms = {}
    for arm, values in top1.items():
        change, interval = compare(values, reference)
        arms[arm] = {"top1": values.tolist(), "change": change, "interval": interval}
        seeds = ", ".join(f"{value:.1f}" for value in values)
        against = "reference" if values is reference else f"{change:+.2f} ({interval[0]:+.2f} to {interval[1]:+.2f})"
        lines.append(f"| {arm} | {values.mean():.2f} ({seeds}) | {against} |")
    write_results(options.results, "transfer", {"arms": arms}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    run_command(TransferOptions, main)
