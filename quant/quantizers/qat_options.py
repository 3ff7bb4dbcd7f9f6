"""Options of quantization-aware training. Imports nothing slow, so that ``--help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from illama.bundle import GoldenImages
from illama.options import Fraction, NotNegative, Positive, SourceOptions
from illama.training.recipe import ClassifierOptions
from quant.schemes.shipped import SchemeName

RECIPES = Path(__file__).parents[1] / "recipes"
DEFAULT_RECIPE = "qat-nano-fashion-mnist"


@dataclass(frozen=True)
class QatOptions(ClassifierOptions, SourceOptions):
    """Fine-tune a trained network with fake quantization. Every option overrides the recipe's value.
    The defaults shown are those of the recipe qat-nano-fashion-mnist.

    Writes the quantized network as a bundle to OUT/SCHEME-qat/, a checkpoint to continue from, and logs.

    Attributes:
        recipe: name of a recipe in quant/recipes, or path to a YAML file.
        scheme: name of a shipped scheme (python quant/list_schemes.py), or path to a YAML file.
        golden: images of the golden answers in the bundle: calibration (8 of them, at most 32x32 pixels), noise, or
            none.
        distillation: weight, 0 to 1, of the distillation loss against the unquantized network; the weight of the label
            loss is 1 minus this.
        temperature: temperature of the distillation loss.
        scale_rate: learning rate of the scales, relative to their size and to --learning-rate.
    """

    recipe: str = DEFAULT_RECIPE
    out: Path = Path("runs/qat")
    scheme: SchemeName = "w4a4"
    golden: GoldenImages = "calibration"
    distillation: Fraction = 1.0
    temperature: Positive = 2.0
    scale_rate: NotNegative = 1.0

    @property
    def source(self) -> SourceOptions:
        """The options that open the checkpoint and the images."""
        return SourceOptions(**{each.name: getattr(self, each.name) for each in fields(SourceOptions)})
