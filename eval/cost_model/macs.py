"""What a network multiplies: python eval/flops.py

Multiply-accumulates (MACs) of the matrix products and the patch convolution, layer by layer, from a config alone.
A MAC is two floating-point operations (FLOPs). Norms, softmax, rotation and other element-wise work are left out,
as the usual counters leave them out. The network of this project computes the last block for the class token alone,
which the published counts do not: what that saves has a column of its own.

The mask decides what attention needs. With N tokens of width D, one block takes 4 N D^2 for qkv and proj, and

    bidirectional   2 N^2 D                  every query meets every key, twice
    post_softmax    N^2 D + T D              every score is in some denominator; values only up to the diagonal
    pre_softmax     2 T D                    scores and values up to the diagonal

where T = N (N + 1) / 2. The iLLaMA paper (arXiv 2404.06773, its complexity of causal attention) writes
floor(N^2 / 2) + 1 for T, which for N > 2 is a little less than the triangle has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from eval.report.store import write_results
from illama import ModelConfig
from illama.cli import run_command
from illama.errors import UserError
from illama.markdown_table import markdown
from illama.models.config import MaskKind

Form = Literal["needed", "plain", "fused"]
RESULTS = "flops"
COLUMNS: dict[str, tuple[MaskKind, Form]] = {
    "bidirectional": ("bidirectional", "plain"),
    "post, needed": ("post_softmax", "needed"),
    "post, plain": ("post_softmax", "plain"),
    "post, fused": ("post_softmax", "fused"),
    "pre, needed": ("pre_softmax", "needed"),
}


@dataclass(frozen=True)
class FlopsOptions:
    """Print the MACs of the published sizes, under every mask and in every form of computing it.

    Attributes:
        sizes: presets, such as tiny; NAME@PIXELS for another resolution.
        out: folder for the results.
    """

    sizes: tuple[str, ...] = ("nano", "tiny", "small", "base", "base@384", "large", "large@384")
    out: Path = Path("runs/flops")


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates for one image.

    Attributes:
        patches: the patch convolution.
        projections: qkv and proj of every block.
        products: q k and p v of every block.
        mlp: of every block.
    """

    patches: int
    projections: int
    products: int
    mlp: int
    head: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    @property
    def flops(self) -> int:
        return 2 * self.total


def count_macs(config: ModelConfig, form: Form = "needed", readout_only: bool = False) -> Macs:
    """What a network multiplies for one image.

    Args:
        form: ``needed`` counts what the mask lets through; ``plain`` and ``fused`` count what the two forms of
            :class:`illama.models.attention.MaskedAttention` compute, masked or not.
        readout_only: the last block for the class token alone (:class:`illama.ILLaMA`).
    """
    tokens, width, depth = config.tokens, config.width, config.depth
    mlp_matrices = 3 if config.mlp == "swiglu" else 2
    full = depth - readout_only
    one = int(readout_only)
    return Macs(
        patches=config.patches * config.in_channels * config.patch_size**2 * width,
        projections=full * 4 * tokens * width**2 + one * (2 * tokens + 2) * width**2,
        products=full * products_macs(config, form) + one * readout_macs(config, form),
        mlp=(full * tokens + one) * mlp_matrices * width * config.hidden,
        head=width * config.num_classes,
    )


def products_macs(config: ModelConfig, form: Form = "needed") -> int:
    """Both attention products of one block, for all queries and heads."""
    pairs = config.tokens**2
    if form == "needed":
        triangle = visible_pairs(config)
        scores, values = {
            "bidirectional": (pairs, pairs),
            "post_softmax": (pairs, triangle),
            "pre_softmax": (triangle, triangle),
        }[config.mask]
        return (scores + values) * config.width
    doubled = form == "fused" and config.mask == "post_softmax"  # the fused form meets [K ; K] and [V ; 0]
    return (4 if doubled else 2) * pairs * config.width


def readout_macs(config: ModelConfig, form: Form = "needed") -> int:
    """Both attention products of the class token's query alone."""
    tokens, width = config.tokens, config.width
    sees_all = config.class_token == "last" or config.class_sees_all or config.mask == "bidirectional"
    if form == "needed" and not sees_all:  # a class token at the front that sees itself alone
        return (tokens if config.mask == "post_softmax" else 1) * width + width
    rows = 2 if form == "fused" else 1  # a single query is fused as two equal ones
    doubled = form == "fused" and config.mask == "post_softmax" and not sees_all
    return rows * (4 if doubled else 2) * tokens * width


def visible_pairs(config: ModelConfig) -> int:
    """T: how many (query, key) pairs a causal mask lets through."""
    opened = config.tokens - 1 - config.class_index if config.class_sees_all else 0
    return config.tokens * (config.tokens + 1) // 2 + opened


def paper_attention_macs(tokens: int, width: int, causal: bool) -> int:
    """Attention of one block by the paper's formulas: 4ND^2 + 2N^2 D, and 4ND^2 + N^2 D + (floor(N^2/2) + 1) D."""
    values = tokens**2 // 2 + 1 if causal else tokens**2
    return 4 * tokens * width**2 + (tokens**2 + values) * width


def preset_named(name: str, mask: MaskKind = "post_softmax") -> ModelConfig:
    """The config of a preset's name, or of NAME@PIXELS; UserError for another name."""
    size, at, pixels = name.partition("@")
    if at and not pixels.isdigit():
        raise UserError(f"{name!r} is not a size: give a preset such as tiny, or tiny@384 for another resolution")
    config = ModelConfig.preset(size, mask=mask)
    return replace(config, image_size=int(pixels)) if at else config


def readout_saving(size: str) -> float:
    """Percent of the plain form's MACs that computing the last block for the class token alone saves."""
    whole, readout = (count_macs(preset_named(size), "plain", readout_only) for readout_only in (False, True))
    return 100 * (1 - readout.total / whole.total)


def table(counts: Mapping[str, Mapping[str, Macs]]) -> str:
    """A line for each size: the whole network, and in brackets its attention (qkv, products, proj)."""
    rows = []
    for size, macs in counts.items():
        config = preset_named(size)
        paper = config.depth * paper_attention_macs(config.tokens, config.width, causal=True)
        cells = [f"{each.total / 1e9:.3f} ({(each.projections + each.products) / 1e9:.3f})" for each in macs.values()]
        rows.append((size, str(config.tokens), *cells, f"{readout_saving(size):.1f}%", f"{paper / 1e9:.3f}"))
    return markdown(("size", "tokens", *COLUMNS, "saved by the last block", "causal attention by the paper"), rows)


def main(options: FlopsOptions) -> None:
    counts = {
        size: {title: count_macs(preset_named(size, mask), form) for title, (mask, form) in COLUMNS.items()}
        for size in options.sizes
    }
    facts = {size: {title: asdict(macs) for title, macs in each.items()} for size, each in counts.items()}
    print("Giga-MACs of one image: the whole network, and in brackets its attention (qkv, products, proj)\n")
    saved = {size: readout_saving(size) for size in counts}
    write_results(options.out, RESULTS, {"macs": facts, "saved_by_the_last_block_percent": saved}, table(counts))


if __name__ == "__main__":
    run_command(FlopsOptions, main)
