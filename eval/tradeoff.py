"""Compare accuracy and latency of files and engines under the same conditions, and choose one to deploy:

python eval/tradeoff.py runs/ptq --max-drop 0.2
torchrun --nproc-per-node 8 eval/tradeoff.py runs/base --data /data/imagenet    # one process measures latency

The first float file that runs on a CPU is the reference. The output folder gets report.html for people, report.json for
programs, report.md for pull requests, and plots for slides.
"""

from __future__ import annotations

from illama.cli import run_command
from eval.measure.comparison import TradeoffOptions, compare


def main(options: TradeoffOptions) -> None:
    compare(options)


if __name__ == "__main__":
    run_command(TradeoffOptions, main)
