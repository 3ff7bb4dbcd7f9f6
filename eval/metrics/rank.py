"""Rank of the attention maps, among how many directions a head spreads its mixing of the tokens:

python eval/attention_rank.py --checkpoint illama-tiny-in1k-75.0.pth --data /data/imagenet

The measure of the iLLaMA paper (arXiv 2404.06773, its analysis of attention maps): a map's singular values,
normalised to sum to one, largest first, and the index at which their running sum reaches 0.8. The paper's curves
give about 129 of 197 for iLLaMA-T and about 81 for a bidirectional ViT-T (first layer, first head); its released
analysis takes them of the MEAN map of 30 images, which is another number than the mean of 30 ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eval.report.store import write_results
from illama import ILLaMA
from illama.bundle import SHIPPED
from illama.checkpoints.load import load_checkpoint
from illama.cli import run_command
from illama.data.datasets import evenly_spaced, open_data
from illama.errors import UserError
from illama.inference import load_images
from illama.markdown_table import markdown
from illama.models.attention import MaskedAttention

RESULTS = "attention-rank"
_IMAGES_AT_ONCE = 8  # the maps of one layer of Base at 384 then take a quarter of a gigabyte in float64


@dataclass(frozen=True)
class RankOptions:
    """Rank of the attention maps of a checkpoint, layer by layer.

    Attributes:
        checkpoint, data: as ``quant/ptq.py`` takes them.
        images: of the test split, evenly spaced, whose mean map has the rank.
        threshold: share of the sum of the singular values, above 0 and at most 1.
        out: folder for the results.
    """

    checkpoint: Path = SHIPPED
    data: str = "fashion-mnist"
    images: int = 30
    threshold: float = 0.8
    out: Path = Path("runs/attention-rank")

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise UserError(f"--threshold must be above 0 and at most 1, not {self.threshold}")


def attention_rank(model: ILLaMA, images: Tensor, threshold: float = 0.8, of_mean_map: bool = False) -> np.ndarray:
    """The rank of every head's map (the probabilities after the mask), as a mean over ``images``.

    The maps are those of evaluation, under the soft mask that the model has; the model is left as it was.

    Args:
        images: (B, C, H, W), at least one, on the model's device.
        threshold: share of the sum of the singular values, in (0, 1].
        of_mean_map: the rank of the mean of the images' maps, as in the paper, and not the mean of their ranks.

    Returns:
        (layers, heads), float64, from 1 to N, the number of tokens.

    Raises:
        ValueError: for no images, or a threshold outside (0, 1].
    """
    if not len(images):
        raise ValueError("attention_rank needs at least one image")
    attentions = [module for module in model.modules() if isinstance(module, MaskedAttention)]
    sums: list[Tensor | float] = [0.0] * len(attentions)

    def add(layer: int, maps: Tensor) -> None:
        sums[layer] += (maps if of_mean_map else map_rank(maps, threshold)).double().sum(0)

    with _whole_maps(model, attentions), ExitStack() as hooks, torch.no_grad():
        for layer, attention in enumerate(attentions):
            hook = attention.p.register_forward_hook(lambda _, __, maps, layer=layer: add(layer, maps))
            hooks.callback(hook.remove)
        for batch in images.split(_IMAGES_AT_ONCE):
            model(batch)
    means = torch.stack([torch.as_tensor(total) for total in sums]) / len(images)
    return (map_rank(means, threshold).double() if of_mean_map else means).cpu().numpy()


def map_rank(maps: Tensor, threshold: float = 0.8) -> Tensor:
    """How many of its largest singular values make up ``threshold`` of their sum: (..., M, N) -> (...), int64.

    Raises:
        ValueError: for a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1], not {threshold}")
    sums = torch.linalg.svdvals(maps.double()).cumsum(-1)
    # The margin is for rounding alone: four of five equal values are 0.8 of their sum, whatever float64 makes of it.
    return (sums < (threshold - 1e-9) * sums[..., -1:]).sum(-1) + 1


@contextmanager
def _whole_maps(model: ILLaMA, attentions: list[MaskedAttention]) -> Iterator[None]:
    """Evaluation with every row of every map, and the maps in sight; puts everything back."""
    training, readout_only = model.training, model.readout_only
    forms = [attention.form for attention in attentions]
    try:
        model.eval()
        model.readout_only = False
        model.set_attention_form("plain")
        yield
    finally:
        model.train(training)
        model.readout_only = readout_only
        for attention, form in zip(attentions, forms, strict=True):
            attention.form = form


def table(ranks: np.ndarray) -> str:
    """A line for each layer of ``ranks`` (layers, heads), and one for all."""
    lines = [(str(layer), *_summary(heads)) for layer, heads in enumerate(ranks, 1)]
    return markdown(("layer", "rank, mean of the heads", "smallest", "largest"), [*lines, ("all", *_summary(ranks))])


def _summary(ranks: np.ndarray) -> tuple[str, str, str]:
    return f"{ranks.mean():.1f}", f"{ranks.min():.0f}", f"{ranks.max():.0f}"


def main(options: RankOptions) -> None:
    loaded = load_checkpoint(options.checkpoint)
    data = open_data(options.data, loaded.preprocessing.exif if loaded.preprocessing else "apply")
    config = loaded.model.config
    preprocessing = loaded.preprocessing or data.preprocessing(config.image_size, config.in_channels)
    images, _ = load_images(evenly_spaced(data.test(), options.images), preprocessing.transform())
    ranks = attention_rank(loaded.model, torch.from_numpy(images), options.threshold, of_mean_map=True)
    print(f"Of {config.tokens} tokens, at {options.threshold:.0%} of the singular values' sum\n")
    facts = {"tokens": config.tokens, "images": options.images, "threshold": options.threshold, "ranks": ranks.tolist()}
    write_results(options.out, RESULTS, facts, table(ranks))


if __name__ == "__main__":
    run_command(RankOptions, main)
