"""A training recipe: a flat set of options in YAML, any of which the command line can override."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_type_hints

from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from illama.cli import given_options
from illama.errors import UserError
from illama.hardware import computes_bfloat16
from illama.options import (
    BatchSize,
    ClassOrder,
    Count,
    CountOrZero,
    Data,
    Exif,
    Existing,
    Fraction,
    ImageSize,
    NotNegative,
    Seed,
    Workers,
    check_bounds,
)
from illama.structured_files import read_yaml
from illama.training.schedules import SoftMaskSchedule

RECIPES = Path(__file__).parents[1] / "recipes"
DEFAULT_RECIPE = "nano-fashion-mnist"
Autocast = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class TrainingOptions:
    """Options of every training run.

    Attributes:
        data: the data set.
        exif: apply or ignore the orientation that image files declare. Defaults to apply; python quant/qat.py defaults
            to the setting in the checkpoint's bundle.
        out: folder of the checkpoint, the log and, at the end, the bundle; an unfinished run there is resumed.
        epochs: number of passes over the training images.
        batch_size: images per optimizer step, summed over processes and accumulated micro-batches.
        micro_batch: images per forward pass. Mixup, dropout and stochastic depth are drawn per micro-batch, so
            the result does not depend on the number of processes.
        optimizer: name of a timm optimizer that needs first derivatives only; adamw has betas (0.9, 0.999).
        learning_rate: peak learning rate of the cosine schedule; it is not scaled with the batch size.
        weight_decay: weight decay of matrices and kernels; norms, biases, position embedding and class token have none.
        warmup_epochs: number of epochs of linear warm-up.
        layer_decay: layer-wise learning rate decay: ratio of a block's learning rate to that of the next block.
        soft_mask: schedule of the soft mask's alpha. none: 0; constant: 1; linear: falls from 1 to 0.
        soft_mask_epochs: number of epochs after which alpha is 0; unused with none.
        drop_path: stochastic depth rate of the last block; rates rise linearly from 0 in the first block.
        dropout: dropout rate after the embedding and in every residual branch.
        label_smoothing: label smoothing factor.
        ema_decay: decay of the exponential moving average of the weights, which is written to the bundle; 0 for none.
        autocast: dtype of the forward pass; with float16, the loss is scaled. Defaults to bfloat16, or to float32 on a
            CPU that only emulates it.
        compile: compile the network with torch.compile (needs a C++ compiler on a CPU).
        workers: number of image-reading processes per training process.
        checkpoint_steps: number of steps between checkpoints.
        seed: random seed.
    """

    data: Data = ""
    exif: Exif | None = None
    out: Path = Path("runs/train")
    epochs: Count = 300
    batch_size: Count = 4096
    micro_batch: BatchSize = 128
    optimizer: str = "adamw"
    learning_rate: NotNegative = 4e-3
    weight_decay: NotNegative = 0.05
    warmup_epochs: NotNegative = 5
    layer_decay: Fraction = 1.0
    soft_mask: SoftMaskSchedule = "constant"
    soft_mask_epochs: NotNegative = 50
    drop_path: Fraction = 0.0
    dropout: Fraction = 0.0
    label_smoothing: Fraction = 0.1
    ema_decay: Fraction = 0.0
    autocast: Autocast | None = None
    compile: bool = False
    workers: Workers = 8
    checkpoint_steps: Count = 500
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.batch_size < 2 or self.parts * self.images_per_part != self.batch_size or self.images_per_part % 2:
            raise UserError(
                f"--batch-size {self.batch_size} must be a multiple of --micro-batch {self.micro_batch}, which must "
                "be even, since mixup pairs images"
            )

    @property
    def sharded(self) -> bool:
        """Whether weights and optimizer state are sharded over the processes instead of replicated."""
        return False

    def dtype_on(self, device: str) -> Autocast:
        """Returns the dtype of the forward pass on a type of device, such as "cpu"."""
        return self.autocast or ("bfloat16" if device != "cpu" or computes_bfloat16() else "float32")

    @property
    def images_per_part(self) -> int:
        """Number of images in a micro-batch."""
        return min(self.micro_batch, self.batch_size)

    @property
    def parts(self) -> int:
        """Number of micro-batches in an optimizer step, over all processes."""
        return self.batch_size // max(1, self.images_per_part)


@dataclass(frozen=True)
class ClassifierOptions(TrainingOptions):
    """Options of a training run of a classifier.

    Attributes:
        class_order: order of class folders; words: lexicographic (1 10 2); natural: numeric (1 2 10). Default: words;
            python quant/qat.py defaults to the setting in the checkpoint's bundle.
        crop_padding: padding of random crops in pixels, for small images. If 0, random resized crops are used instead,
            for photographs.
        rand_augment: timm's RandAugment setting, such as rand-m9-mstd0.5-inc1; empty for none.
        erasing: probability of random erasing; erased pixels get random values.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of cutmix; 0 for none.
        mixup_probability: probability that a batch gets mixup or cutmix.
    """

    class_order: ClassOrder | None = None
    crop_padding: CountOrZero = 0
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    erasing: Fraction = 0.25
    mixup: NotNegative = 0.1
    cutmix: NotNegative = 0.1
    mixup_probability: Fraction = 1.0


@dataclass(frozen=True)
class NetworkOptions:
    """The network to train, and its initial weights.

    Attributes:
        model: model size: nano, tiny, small, base or large.
        variant: a step on the way from ViT to iLLaMA (listed in illama/models/config.py).
        image_size: side length of the square input in pixels. If not given, the preset's.
        patch_size: side length of a patch in pixels. If not given, the preset's.
        in_channels: number of color channels of the input. If not given, the preset's.
        width: embedding dimension. If not given, the preset's.
        depth: number of blocks. If not given, the preset's.
        heads: number of attention heads per block. If not given, the preset's.
        mask: post_softmax (the paper's equation 2), pre_softmax or bidirectional. If not given, the variant's.
        init: path to initial weights: a bundle, a .safetensors file or a released .pth file; position embeddings are
            resized to --image-size.
        init_llama: path to a LLaMA's folder in Hugging Face's format; initial weights are selected from its weights.

    Raises:
        UserError: initial weights are given twice.
    """

    model: str = "tiny"
    variant: str = "illama"
    image_size: ImageSize | None = None
    patch_size: ImageSize | None = None
    in_channels: int | None = None
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mask: str | None = None
    init: Existing | None = None
    init_llama: Existing | None = None

    def __post_init__(self) -> None:
        if self.init and self.init_llama:
            raise UserError("--init and --init-llama exclude each other")
        super().__post_init__()  # type: ignore[misc]  # of TrainingOptions, with which it is combined


@dataclass(frozen=True)
class Recipe(NetworkOptions, ClassifierOptions):
    """Train an iLLaMA from scratch or from given weights. Every option overrides the recipe.
    The defaults shown are those of the recipe nano-fashion-mnist.

    Writes the network to OUT/bundle/, a checkpoint to continue from to OUT/checkpoint.pt, and logs.

    Attributes:
        recipe: name of a recipe in illama/recipes, or path to a YAML file.
        new_head: with --init, initialize the classifier randomly instead of loading it; needed if the classes differ.
        fsdp: under torchrun, shard weights and optimizer state over the processes (FSDP2).
    """

    recipe: str = DEFAULT_RECIPE
    new_head: bool = False
    fsdp: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fsdp and self.autocast == "float16":
            raise UserError("--fsdp trains in bfloat16 or float32: choose --autocast bfloat16")

    @property
    def sharded(self) -> bool:
        return self.fsdp


Options = TypeVar("Options", bound=TrainingOptions)


def recipe_names(folder: Path = RECIPES) -> list[str]:
    """Returns the names of the recipes in a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """Returns a training recipe by name or path, see :func:`read_recipe`."""
    return read_recipe(Recipe, RECIPES, name)


def read_recipe(kind: type[Options], folder: Path, name: str) -> Options:
    """Reads options from ``folder/name.yaml``, or from the file at the path ``name`` if it ends in .yaml or .yml.

    Raises:
        UserError: the file is missing or not YAML, or an option does not exist or has the wrong type.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(recipe_names(folder))
        raise UserError(f"no recipe {name!r}: choose one of {known}, or a .yaml file")
    hints = {option: hint for option, hint in get_type_hints(kind, include_extras=True).items() if option != "recipe"}
    values = read_yaml(path, cast("type[dict[str, Any]]", TypedDict(kind.__name__, hints, total=False)))  # type: ignore[operator, misc]
    return kind(**{"recipe": name, **values})


def recipe_of_command_line(kind: type[Options], folder: Path, default: str) -> Options:
    """Reads the recipe that ``--recipe`` names, and overrides it with the other options of the command line.

    Args:
        default: name of the recipe if the command line gives none.

    Raises:
        UserError: see :func:`read_recipe`.
    """
    given = given_options(kind, read_recipe(kind, folder, default))
    return replace(read_recipe(kind, folder, given.pop("recipe", default)), **given)
