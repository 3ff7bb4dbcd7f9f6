"""Options of quantization-aware training. Imports nothing slow, so that ``--help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from illama.bundle import SHIPPED, GoldenImages
from illama.options import Count, Existing, Fraction, ImageSize, NotNegative, Positive, SourceOptions
from illama.training.recipe import ClassifierOptions
from quant.schemes.shipped import SchemeName

RECIPES = Path(__file__).parents[1] / "recipes"
DEFAULT_RECIPE = "qat-nano-fashion-mnist"


@dataclass(frozen=True)
class QatOptions(ClassifierOptions):
    """Fine-tune a trained iLLaMA with fake quantization. Every option overrides the recipe's value.
    The defaults shown are those of the recipe qat-nano-fashion-mnist.

    Writes the quantized network as a bundle to OUT/SCHEME-qat/, a checkpoint to continue from, and logs.

    Attributes:
        recipe: name of a recipe in quant/recipes, or path to a YAML file.
        checkpoint: bundle folder, .safetensors file or released .pth file; defaults to the shipped nano.
        scheme: name of a shipped scheme (python quant/list_schemes.py), or path to a YAML file.
        image_size: image size in pixels; the position embedding is interpolated. Defaults to the checkpoint's.
        calibration_images: number of training images for calibration. Defaults to 512, or to all if there are fewer.
        golden: images of the golden answers in the bundle: calibration (8 of them, at most 32x32 pixels), noise, or
            none.
        distillation: weight, 0 to 1, of the distillation loss against the unquantized network; the weight of the label
            loss is 1 minus this.
        temperature: temperature of the distillation loss.
        scale_rate: learning rate of the scales, relative to their size and to --learning-rate.
    """

    recipe: str = DEFAULT_RECIPE
    out: Path = Path("runs/qat")
    checkpoint: Existing = SHIPPED
    scheme: SchemeName = "w4a4"
    image_size: ImageSize | None = None
    calibration_images: Count | None = None
    golden: GoldenImages = "calibration"
    distillation: Fraction = 1.0
    temperature: Positive = 2.0
    scale_rate: NotNegative = 1.0

    @property
    def source(self) -> SourceOptions:
        """The options that open the checkpoint and the images."""
        names = [each.name for each in fields(SourceOptions) if hasattr(self, each.name)]
        return SourceOptions(**{name: getattr(self, name) for name in names})
