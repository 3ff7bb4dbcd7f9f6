"""Configurations of networks, and iLLaMA's published sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Interval

from illama.bundle import NetworkKind
from illama.errors import UserError
from illama.structured_files import check_fields

MaskKind = Literal["post_softmax", "pre_softmax", "bidirectional"]
ClassToken = Literal["last", "first"]
Position = Literal["learnable", "rope", "both"]
Norm = Literal["rms", "layer"]
Mlp = Literal["swiglu", "gelu"]
Pool = Literal["token", "avg", ""]

_FASHION_MNIST = {"image_size": 28, "patch_size": 4, "in_channels": 1, "num_classes": 10}
# width, depth and heads of arXiv 2404.06773, Table 13; "nano" is this project's, for 28- to 32-pixel images on a CPU.
_PRESETS: dict[str, dict[str, int]] = {
    "nano": {**_FASHION_MNIST, "width": 128, "depth": 6, "heads": 2},
    "tiny": {"width": 192, "depth": 12, "heads": 3},
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
    "large": {"width": 1024, "depth": 24, "heads": 16},
}

SIZES = tuple(_PRESETS)

# Largest sizes, far above those of any network; a damaged file or a slip of the keyboard must not fill the memory.
Size = Annotated[int, Interval(ge=1, le=1 << 16)]
Blocks = Annotated[int, Interval(ge=1, le=1024)]
Classes = Annotated[int, Interval(ge=1, le=1 << 20)]
ClassesOrNone = Annotated[int, Interval(ge=0, le=1 << 20)]
MOST_PATCHES = 1 << 14  # the mask has a value for each pair of tokens

# The steps from a ViT to iLLaMA, arXiv 2404.06773, section 3 and Table 17. Each changes the previous one in one
# respect, except that "causal" moves the class token to the end, where it attends to every token without
# class_sees_all. With the paper's mask, later tokens still enter the softmax denominators, so a first class token gets
# a little information from them. "causal-collapse" has the usual causal mask, so it gets none (docs/reproduction.md).
_VIT: dict[str, Any] = {
    "norm": "layer",
    "mlp": "gelu",
    "mask": "bidirectional",
    "class_token": "first",
    "position": "learnable",
}
_VIT_RMSNORM = {**_VIT, "mlp": "swiglu", "norm": "rms"}
VARIANTS: dict[str, dict[str, Any]] = {
    "vit": _VIT,
    "vit-swiglu": {**_VIT, "mlp": "swiglu"},
    "vit-rmsnorm": _VIT_RMSNORM,
    "causal-collapse": {**_VIT_RMSNORM, "mask": "pre_softmax"},
    "causal-collapse-post-softmax": {**_VIT_RMSNORM, "mask": "post_softmax"},
    "causal-modified": {**_VIT_RMSNORM, "mask": "post_softmax", "class_sees_all": True},
    "causal": {**_VIT_RMSNORM, "mask": "post_softmax", "class_token": "last"},
    "causal-rope": {**_VIT_RMSNORM, "mask": "post_softmax", "class_token": "last", "position": "rope"},
    "illama": {},
}


@dataclass(frozen=True)
class TimmConfig:
    """Configuration of a timm ViT with one of this project's masks.

    Attributes:
        name: model name for ``timm.create_model``; the class name if the network was created without it.
        image_size: side length of the input in pixels, or its height and width.
        in_channels: number of color channels of the input.
        num_classes: number of classes; 0 if the network has no classifier.
        mask: see :class:`ModelConfig`; ``bidirectional`` is timm's network unchanged.
        features: shape of the output for an image if the network has no classifier, else empty: (width,), or
            (tokens, width) in timm's order.
    """

    kind: ClassVar[NetworkKind] = "timm"
    name: str
    image_size: int | tuple[int, int]
    in_channels: int
    num_classes: int
    mask: MaskKind = "bidirectional"
    features: tuple[int, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as JSON has them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of an iLLaMA; the defaults are iLLaMA-Tiny at 224 pixels (arXiv 2404.06773, section 4).

    Attributes:
        image_size: side length of the square input in pixels.
        patch_size: side length of a patch in pixels.
        in_channels: number of color channels of the input.
        width: embedding dimension.
        depth: number of blocks.
        heads: number of attention heads per block.
        num_classes: number of outputs of the head; 0 for no head, so that the class token is the output.
        class_token: position of the class token, ``last`` (the paper's "PS [cls]") or ``first`` (as in ViT).
        mask: ``post_softmax`` (equation 2: multiplied after the softmax, not renormalized; used by all released
            weights), ``pre_softmax`` (equation 1) or ``bidirectional`` (as in ViT).
        position: position embedding, ``learnable``, ``rope`` (rotary) or ``both`` (as in the paper).
        norm: ``rms`` (RMSNorm) or ``layer`` (LayerNorm, as in ViT).
        mlp: ``swiglu``, or ``gelu`` (two Linears with biases and a hidden width of 4 x width, as in ViT).
        class_sees_all: whether the class token attends to every token in any position; in the last position it always
            does.
        global_pool: what the head reads after the final norm, the class token (``token``, the paper's) or the mean of
            the patches (``avg``). Empty: all tokens are the output, the class token first; only without a head.

    Raises:
        UserError: a value has the wrong type, or the values do not fit together.
    """

    kind: ClassVar[NetworkKind] = "illama"
    image_size: Size = 224
    patch_size: Size = 16
    in_channels: Size = 3
    width: Size = 192
    depth: Blocks = 12
    heads: Blocks = 3
    num_classes: ClassesOrNone = 1000
    class_token: ClassToken = "last"
    mask: MaskKind = "post_softmax"
    position: Position = "both"
    norm: Norm = "rms"
    mlp: Mlp = "swiglu"
    class_sees_all: bool = False
    global_pool: Pool = "token"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_classes and not self.global_pool:
            raise UserError(f"{self.num_classes} classes need a global_pool, token or avg; num_classes 0 does not")
        if self.image_size % self.patch_size:
            raise UserError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.patches > MOST_PATCHES:
            raise UserError(f"image_size {self.image_size} gives {self.patches} patches, more than {MOST_PATCHES}")
        if self.width % self.heads or self.head_dim % 2:
            raise UserError(f"width {self.width} must be divisible into {self.heads} heads of an even size")

    @classmethod
    def preset(cls, name: str, variant: str = "illama", **overrides: Any) -> Self:
        """Returns the config of a size (``nano``, ``tiny``, ``small``, ``base``, ``large``), with fields overridden.

        Args:
            variant: a step on the way from ViT to iLLaMA, one of :data:`VARIANTS`.
        """
        if name not in _PRESETS:
            raise UserError(f"unknown model size {name!r}; choose one of {', '.join(_PRESETS)}")
        if variant not in VARIANTS:
            raise UserError(f"unknown variant {variant!r}; choose one of {', '.join(VARIANTS)}")
        return cls(**{**_PRESETS[name], **VARIANTS[variant], **overrides})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input in pixels."""
        return self.image_size, self.image_size

    @property
    def features(self) -> tuple[int, ...]:
        """Shape of the output for an image without a head, (width,) or (tokens, width); empty with one."""
        if self.num_classes:
            return ()
        return (self.width,) if self.global_pool else (self.tokens, self.width)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def side(self) -> int:
        """Number of patches along a side of the image."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        return self.side**2

    @property
    def tokens(self) -> int:
        """Number of tokens N: the patches and the class token."""
        return self.patches + 1

    @property
    def class_index(self) -> int:
        return self.patches if self.class_token == "last" else 0

    @property
    def least_parameters(self) -> int:
        """Number of parameters of the kernels and matrices, without norms, biases and position embedding."""
        block = self.width * (4 * self.width + (2 if self.mlp == "gelu" else 3) * self.hidden)
        return self.width * (self.in_channels * self.patch_size**2 + self.num_classes) + self.depth * block

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP; for SwiGLU, two thirds of 4 x width, rounded up to a multiple of 256."""
        if self.mlp == "gelu":
            return 4 * self.width
        return 256 * -(-int(8 * self.width / 3) // 256)


NetworkConfig = TimmConfig | ModelConfig  # of every network
