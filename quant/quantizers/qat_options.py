"""Options of quantization-aware training. Imports nothing slow, so that ``--help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from illama.bundle import SHIPPED
from illama.errors import UserError
from illama.options import SourceOptions
from illama.training.recipe import TrainingOptions

RECIPES = Path(__file__).parents[1] / "recipes"
DEFAULT_RECIPE = "qat-nano-fashion-mnist"


@dataclass(frozen=True)
class QatOptions(TrainingOptions):
    """Fine-tune a trained iLLaMA with fake quantization. Every option overrides the recipe's value.
    The defaults shown are those of the recipe qat-nano-fashion-mnist.

    Attributes:
        recipe: name of a recipe in quant/recipes, or path to a YAML file.
        checkpoint: bundle folder, .safetensors file or released .pth file; defaults to the shipped nano.
        scheme: name of a shipped scheme (python quant/list_schemes.py), or path to a YAML file.
        image_size: image size in pixels; the position embedding is interpolated. Defaults to the checkpoint's.
        calibration_images: number of training images for calibration.
        distillation: weight, 0 to 1, of the distillation loss against the unquantized network; the weight of the label
            loss is 1 minus this.
        temperature: temperature of the distillation loss.
        scale_rate: learning rate of the scales, relative to their size and to --learning-rate.
    """

    recipe: str = DEFAULT_RECIPE
    out: Path = Path("runs/qat")
    checkpoint: Path = SHIPPED
    scheme: str = "w4a4"
    image_size: int | None = None
    calibration_images: int = 512
    distillation: float = 1.0
    temperature: float = 2.0
    scale_rate: float = 1.0

    @property
    def source(self) -> SourceOptions:
        """The options that open the checkpoint and the images."""
        return SourceOptions(
            self.checkpoint,
            data=self.data,
            calibration_images=self.calibration_images,
            image_size=self.image_size,
            exif=self.exif,
            class_order=self.class_order,
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.distillation <= 1:
            raise UserError(f"--distillation must be within 0 and 1, not {self.distillation}")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"--temperature must be a positive number, not {self.temperature}")
        if not 0 <= self.scale_rate < float("inf"):
            raise UserError(f"--scale-rate must be 0 or a positive number, not {self.scale_rate}")
        if self.calibration_images < 1:
            raise UserError(f"--calibration-images must be at least 1, not {self.calibration_images}")
