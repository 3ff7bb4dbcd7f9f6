"""Multiply-accumulates (MACs) of a network, from its config.

Counts the matrix products and the patch convolution. A MAC is two floating-point operations (FLOPs). Norms, softmax,
rotary embeddings and other element-wise operations are not counted, as in the usual counters. :class:`illama.ILLaMA`
computes its last block for the class token alone if its head reads nothing else, which published counts do not;
:func:`readout_saving` is that difference.

The cost of attention depends on the mask. With N tokens of width D, one block takes 4 N D^2 MACs for qkv and proj, and

    bidirectional   2 N^2 D                  every query with every key, for the scores and for the values
    post_softmax    N^2 D + T D              scores of all pairs for the denominators; values up to the diagonal
    pre_softmax     2 T D                    scores and values up to the diagonal

where T = N (N + 1) / 2. The iLLaMA paper (arXiv 2404.06773, complexity of causal attention) writes floor(N^2 / 2) + 1
for T, which for N > 2 is less than the number of elements of the triangle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal

from illama.errors import UserError
from illama.markdown_table import markdown
from illama.models.config import MaskKind, ModelConfig

Form = Literal["needed", "plain", "fused"]
COLUMNS: dict[str, tuple[MaskKind, Form]] = {
    "bidirectional": ("bidirectional", "plain"),
    "post, needed": ("post_softmax", "needed"),
    "post, plain": ("post_softmax", "plain"),
    "post, fused": ("post_softmax", "fused"),
    "pre, needed": ("pre_softmax", "needed"),
}


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates for one image.

    Attributes:
        patches: the patch convolution.
        projections: qkv and proj of all blocks.
        products: q k^T and p v of all blocks.
        mlp: the MLPs of all blocks.
        head: the classifier.
    """

    patches: int
    projections: int
    products: int
    mlp: int
    head: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def count_macs(config: ModelConfig, form: Form = "needed", readout_only: bool = False) -> Macs:
    """Returns the MACs of a network for one image.

    Args:
        form: ``needed`` is the lower bound for any form: the products that the mask does not zero. ``plain`` and
            ``fused`` count what these forms of :class:`illama.models.attention.MaskedAttention` compute.
        readout_only: whether the last block is computed for the class token alone, as in :class:`illama.ILLaMA`.
    """
    tokens, width, depth = config.tokens, config.width, config.depth
    mlp_matrices = 3 if config.mlp == "swiglu" else 2
    full = depth - readout_only
    one = int(readout_only)
    return Macs(
        patches=config.patches * config.in_channels * config.patch_size**2 * width,
        projections=full * 4 * tokens * width**2 + one * (2 * tokens + 2) * width**2,
        products=full * attention_macs(config, form) + one * readout_macs(config, form),
        mlp=(full * tokens + one) * mlp_matrices * width * config.hidden,
        head=width * config.num_classes,
    )


def attention_macs(config: ModelConfig, form: Form = "needed") -> int:
    """Returns the MACs of q k^T and p v of one block, over all queries and heads."""
    pairs = config.tokens**2
    if form == "needed":
        triangle = visible_pairs(config)
        scores = triangle if config.mask == "pre_softmax" else pairs
        values = pairs if config.mask == "bidirectional" else triangle
        return (scores + values) * config.width
    doubled = form == "fused" and config.mask == "post_softmax"  # the fused form multiplies by [K ; K] and [V ; 0]
    return (4 if doubled else 2) * pairs * config.width


def readout_macs(config: ModelConfig, form: Form = "needed") -> int:
    """Returns the MACs of q k^T and p v of one block for the class token's query alone."""
    tokens, width = config.tokens, config.width
    sees_all = config.class_token == "last" or config.class_sees_all or config.mask == "bidirectional"
    if form == "needed" and not sees_all:  # a class token at the front attends to itself alone
        return (tokens if config.mask == "post_softmax" else 1) * width + width
    rows = 2 if form == "fused" else 1  # the fused form computes a single query as two equal ones
    doubled = form == "fused" and config.mask == "post_softmax" and not sees_all
    return rows * (4 if doubled else 2) * tokens * width


def visible_pairs(config: ModelConfig) -> int:
    """Returns T, the number of (query, key) pairs that a causal mask keeps."""
    opened = config.tokens - 1 - config.class_index if config.class_sees_all else 0
    return config.tokens * (config.tokens + 1) // 2 + opened


def paper_attention_macs(tokens: int, width: int, causal: bool) -> int:
    """Returns one block's attention MACs by the paper: 4ND^2 + 2N^2 D, or 4ND^2 + N^2 D + (floor(N^2/2) + 1) D."""
    values = tokens**2 // 2 + 1 if causal else tokens**2
    return 4 * tokens * width**2 + (tokens**2 + values) * width


def preset_named(name: str, mask: MaskKind = "post_softmax") -> ModelConfig:
    """Returns the config of a preset, given as NAME or NAME@PIXELS.

    Raises:
        UserError: there is no such preset.
    """
    size, at, pixels = name.partition("@")
    if at and not pixels.isdigit():
        raise UserError(f"{name!r} is not a size: give a preset such as tiny, or tiny@384 for another resolution")
    config = ModelConfig.preset(size, mask=mask)
    return replace(config, image_size=int(pixels)) if at else config


def readout_saving(size: str) -> float:
    """Returns the percentage of the plain form's MACs saved by computing the last block for the class token alone."""
    whole, readout = (count_macs(preset_named(size), "plain", readout_only) for readout_only in (False, True))
    return 100 * (1 - readout.total / whole.total)


def macs_table(counts: Mapping[str, Mapping[str, Macs]]) -> str:
    """Returns a row for each size, in giga-MACs: the whole network, and in brackets attention (qkv, products, proj)."""
    rows = []
    for size, macs in counts.items():
        config = preset_named(size)
        paper = config.depth * paper_attention_macs(config.tokens, config.width, causal=True)
        cells = [f"{each.total / 1e9:.3f} ({(each.projections + each.products) / 1e9:.3f})" for each in macs.values()]
        rows.append((size, str(config.tokens), *cells, f"{readout_saving(size):.1f}%", f"{paper / 1e9:.3f}"))
    return markdown(("size", "tokens", *COLUMNS, "saved by the last block", "causal attention by the paper"), rows)
