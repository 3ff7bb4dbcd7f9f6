"""Draw docs/attention-mask.png: python docs/draw_attention_mask.py"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

TOKENS = 6


def main() -> None:
    scores = np.random.default_rng(3).normal(size=(TOKENS, TOKENS))
    causal = np.tril(np.ones((TOKENS, TOKENS), bool))
    weights = np.exp(scores)
    full = weights / weights.sum(1, keepdims=True)
    before = np.where(causal, weights, 0)
    before = before / before.sum(1, keepdims=True)
    doubled = np.concatenate([np.where(causal, full, np.nan), np.where(causal, np.nan, full)], axis=1)
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=[1, 1, 2])
    panels = [
        (before, "mask, then softmax (equation 1)\nrows sum to 1"),
        (full * causal, "softmax, then mask (equation 2)\nrows sum to less"),
        (doubled, "equation 2 as one attention over doubled keys:\neach key is met once, rows sum to 1"),
    ]
    for axis, (values, title) in zip(axes, panels, strict=True):
        axis.imshow(np.where(values == 0, np.nan, values), cmap="Blues", vmin=0, vmax=0.8)
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="key", ylabel="query", yticks=range(TOKENS))
        for row, total in enumerate(np.nansum(values, 1)):
            axis.text(values.shape[1] - 0.3, row, f"{total:.2f}", va="center", fontsize=8)
        axis.set_xticks(range(values.shape[1]), [str(i % TOKENS) for i in range(values.shape[1])])
        axis.spines[["top", "right"]].set_visible(False)
    axes[2].axvline(TOKENS - 0.5, color="black", lw=1)
    axes[2].text(4, 0.6, "values V", ha="center", fontsize=10)
    axes[2].text(7.6, 4.5, "values alpha V\n(0 at inference)", ha="center", fontsize=10)
    figure.savefig(Path(__file__).parent / "attention-mask.png", dpi=110)


if __name__ == "__main__":
    main()
