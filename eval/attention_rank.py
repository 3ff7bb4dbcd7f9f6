"""Rank of a checkpoint's attention maps, layer by layer:

python eval/attention_rank.py --checkpoint CHECKPOINT
python eval/attention_rank.py --checkpoint runs/in1k-tiny/bundle --data /data/imagenet

The rank is that of the mean map of some test images, as the released code of the iLLaMA paper (arXiv
2404.06773) takes it. eval/metrics/rank.py defines it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Interval

from illama.cli import run_command
from illama.bundle import SHIPPED
from illama.options import Count, Data, Existing


@dataclass(frozen=True)
class RankOptions:
    """Measure the rank of the attention maps of a checkpoint, layer by layer.

    Prints a table, and writes it to OUT as attention-rank.md, and with all figures as attention-rank.json.

    Attributes:
        checkpoint: bundle folder, .safetensors file or released .pth file; defaults to the shipped nano.
        data: data set whose test images are used.
        images: number of test images, evenly spaced, whose mean map is measured.
        threshold: share of the sum of the singular values that defines the rank, above 0 and at most 1.
        out: folder for the results.
    """

    checkpoint: Existing = SHIPPED
    data: Data = "fashion-mnist"
    images: Count = 30
    threshold: Annotated[float, Interval(gt=0, le=1)] = 0.8
    out: Path = Path("runs/attention-rank")


def main(options: RankOptions) -> None:
    # Imported here, so that --help does not wait for PyTorch.
    import torch

    from eval.metrics.rank import attention_rank, rank_table
    from eval.report.store import write_results
    from illama.checkpoints.load import load_checkpoint
    from illama.data.datasets import evenly_spaced, open_data
    from illama.inference import load_images

    loaded = load_checkpoint(options.checkpoint)
    data = open_data(options.data, loaded.preprocessing.exif if loaded.preprocessing else "apply")
    config = loaded.model.config
    preprocessing = loaded.preprocessing or data.preprocessing(config.image_size, config.in_channels)
    images, _ = load_images(evenly_spaced(data.test(), options.images), preprocessing.transform())
    ranks = attention_rank(loaded.model, torch.from_numpy(images), options.threshold)
    print(f"Number of tokens: {config.tokens}; rank at {options.threshold:.0%} of the sum of the singular values\n")
    facts = {"tokens": config.tokens, "images": options.images, "threshold": options.threshold, "ranks": ranks.tolist()}
    write_results(options.out, "attention-rank", facts, rank_table(ranks))


if __name__ == "__main__":
    run_command(RankOptions, main)
