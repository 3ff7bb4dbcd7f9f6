"""A training recipe: one flat set of options, read from YAML, any of them overridden on the command line."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from illama.cli import given_options
from illama.errors import UserError
from illama.options import ClassOrder, Exif
from illama.training.schedules import SoftMaskSchedule

RECIPES = Path(__file__).parents[1] / "recipes"
DEFAULT_RECIPE = "nano-fashion-mnist"
Autocast = Literal["float32", "bfloat16", "float16"]
_FRACTIONS = ("erasing", "mixup_probability", "label_smoothing", "ema_decay", "drop_path", "dropout", "layer_decay")
_AT_LEAST_ONE = ("epochs", "micro_batch", "checkpoint_steps")
_NOT_NEGATIVE = (
    "learning_rate",
    "weight_decay",
    "warmup_epochs",
    "soft_mask_epochs",
    "crop_padding",
    "mixup",
    "cutmix",
    "workers",
    "seed",
)


@dataclass(frozen=True)
class TrainingOptions:
    """What every training run is told, whatever it trains.

    Attributes:
        data: fashion-mnist:FOLDER, cifar10:FOLDER, cifar100:FOLDER, webdataset:FOLDER, parquet:FOLDER, or a folder
            with train/ and val/.
        exif: apply the orientation that image files declare, or ignore it; apply if not given, or what the bundle says
            that is trained further with quantization.
        class_order: of class folders, words (1 10 2) or natural (1 2 10); words if not given, or likewise.
        out: where the checkpoint, the log and at the end the bundle go; an unfinished run there goes on.
        epochs: passes over the training images.
        batch_size: images per optimiser step, over all processes and accumulated parts.
        micro_batch: images per forward pass. Mixup, dropout and stochastic depth are drawn per micro-batch, so
            that the number of processes changes nothing.
        optimizer: any of timm's that needs first derivatives only; adamw has betas (0.9, 0.999).
        learning_rate: peak of the cosine schedule, for the batch size given (not scaled).
        weight_decay: on matrices and kernels only: none on norms, biases, position embedding, class token.
        warmup_epochs: of linear warm-up.
        layer_decay: factor on the learning rate from each block to the one before it.
        soft_mask: schedule of the soft mask's alpha, by iteration.
        soft_mask_epochs: epochs until alpha is 0.
        drop_path: stochastic depth of the last block, rising linearly from 0 in the first.
        dropout: on the embedded tokens and every branch.
        crop_padding: random crops of the image padded by this many pixels (for small pictures); 0 takes random
            resized crops (for photographs).
        rand_augment: timm's RandAugment string, such as rand-m9-mstd0.5-inc1; empty for none.
        erasing: chance of random erasing, with random pixels.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of cutmix; 0 for none.
        mixup_probability: share of the batches that get mixup or cutmix.
        label_smoothing: share of the target that is spread evenly over all classes.
        ema_decay: of the exponential moving average of the weights, which is what is kept; 0 keeps the last.
        autocast: number format of the forward pass; float16 scales the loss.
        compile: torch.compile the network (needs a C++ compiler on a CPU).
        workers: processes per training process that read images.
        checkpoint_steps: steps between two checkpoints.
        seed: of everything random.
    """

    data: str = ""
    exif: Exif | None = None
    class_order: ClassOrder | None = None
    out: Path = Path("runs/train")
    epochs: int = 300
    batch_size: int = 4096
    micro_batch: int = 128
    optimizer: str = "adamw"
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    warmup_epochs: float = 5
    layer_decay: float = 1.0
    soft_mask: SoftMaskSchedule = "constant"
    soft_mask_epochs: float = 50
    drop_path: float = 0.0
    dropout: float = 0.0
    crop_padding: int = 0
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    erasing: float = 0.25
    mixup: float = 0.1
    cutmix: float = 0.1
    mixup_probability: float = 1.0
    label_smoothing: float = 0.1
    ema_decay: float = 0.0
    autocast: Autocast = "bfloat16"
    compile: bool = False
    workers: int = 8
    checkpoint_steps: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise UserError(f"{_option(name)} must be at least 1")
        for name in _NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{_option(name)} must be a number that is not negative")
        for name in _FRACTIONS:
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{_option(name)} must lie in 0..1")
        if self.batch_size < 2 or self.parts * self.images_per_part != self.batch_size or self.images_per_part % 2:
            raise UserError(
                f"--batch-size {self.batch_size} must be a multiple of --micro-batch {self.micro_batch}, and that "
                "even, since mixup pairs images"
            )

    @property
    def sharded(self) -> bool:
        """Whether the processes share out weights and optimiser state instead of copying them."""
        return False

    @property
    def images_per_part(self) -> int:
        """Images in a micro-batch."""
        return min(self.micro_batch, self.batch_size)

    @property
    def parts(self) -> int:
        """Micro-batches in an optimiser step, over all processes."""
        return self.batch_size // max(1, self.images_per_part)


@dataclass(frozen=True)
class Recipe(TrainingOptions):
    """Train an iLLaMA, from scratch or from given weights. Every option overrides the recipe's.

    Attributes:
        recipe: a name in illama/recipes (see there), or a YAML file of your own.
        model: nano, tiny, small, base or large.
        variant: the step between ViT and iLLaMA (illama/models/config.py lists them).
        image_size: side of the square input in pixels; the preset's if not given.
        patch_size: side of a patch in pixels; the preset's if not given.
        in_channels: colour channels of the input; the preset's if not given.
        width: embedding width; the preset's if not given.
        depth: number of blocks; the preset's if not given.
        heads: attention heads of each block; the preset's if not given.
        mask: post_softmax (the paper's equation 2), pre_softmax or bidirectional; the variant's if not given.
        init: start from the weights of a bundle, a .safetensors or a released .pth; its positions are
            resized to image_size.
        new_head: with init, start the classifier anew; needed where the classes differ.
        init_llama: start from a folder of LLaMA's Hugging Face safetensors, by weight selection.
        fsdp: under torchrun, shard weights and optimiser state over the processes (FSDP2) instead of copying them.
    """

    recipe: str = DEFAULT_RECIPE
    model: str = "tiny"
    variant: str = "illama"
    image_size: int | None = None
    patch_size: int | None = None
    in_channels: int | None = None
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mask: str | None = None
    init: Path | None = None
    new_head: bool = False
    init_llama: Path | None = None
    fsdp: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fsdp and self.autocast == "float16":
            raise UserError("--fsdp trains in bfloat16 or float32: choose --autocast bfloat16")
        if self.init and self.init_llama:
            raise UserError("--init and --init-llama exclude each other")

    @property
    def sharded(self) -> bool:
        return self.fsdp


Options = TypeVar("Options", bound=TrainingOptions)


def recipe_names(folder: Path = RECIPES) -> list[str]:
    """The recipes that come with the project."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """The recipe of that name, or in the YAML file at that path; UserError as :func:`read_recipe`."""
    return read_recipe(Recipe, RECIPES, name)


def read_recipe(kind: type[Options], folder: Path, name: str) -> Options:
    """Options of some kind from ``folder/name.yaml``, or from the YAML file at the path ``name``.

    Raises:
        UserError: no such recipe, not YAML, or an option that does not exist or has the wrong type.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        known = ", ".join(recipe_names(folder))
        raise UserError(f"no recipe {name!r}: choose one of {known}, or a .yaml file") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must map options to values")
    hints = get_type_hints(kind)
    return kind(**{"recipe": name, **{key: _checked(path, key, value, hints) for key, value in values.items()}})


def recipe_of_command_line(kind: type[Options], folder: Path, default: str) -> Options:
    """The recipe that ``--recipe`` names, with the other options of the command line in the place of its own.

    Args:
        default: the recipe where the command line names none.

    Raises:
        UserError: as :func:`read_recipe`.
    """
    given = given_options(kind, read_recipe(kind, folder, default))
    return replace(read_recipe(kind, folder, given.pop("recipe", default)), **given)


def _checked(path: Path, name: str, value: Any, hints: dict[str, Any]) -> Any:
    """A YAML value as its option's type."""
    hint = hints.get(name)
    if hint is None or name == "recipe":
        raise UserError(f"{path} has no such option: {name}; options are named as in --help")
    kinds = get_args(hint) or (hint,)
    choices = [choice for kind in (hint, *kinds) if get_origin(kind) is Literal for choice in get_args(kind)]
    if value in choices or type(value) in kinds:
        return value
    if float in kinds and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(value)  # YAML reads 4e-3, without a point, as text
    elif Path in kinds and isinstance(value, str):
        return Path(value)
    wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in choices or kinds)
    raise UserError(f"{path}: {name} must be {wanted}, not {value!r}")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
