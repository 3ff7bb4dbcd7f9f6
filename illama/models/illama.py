"""The network of "Adapting LLaMA Decoder to Vision Transformer" (arXiv 2404.06773), section 3.

Parameters have the same names as in the authors' released code, so that its checkpoints can be loaded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from illama.models.attention import AttentionMask, MaskedAttention, split_heads
from illama.models.config import ModelConfig, Pool
from illama.models.norms import make_norm
from illama.models.timm_methods import TimmMethods


class Linear(nn.Linear):
    """A Linear that can compute only a slice of its outputs."""

    def forward(self, x: Tensor, outputs: slice | None = None) -> Tensor:
        """(..., in) -> (..., out), or only the outputs in the slice."""
        if outputs is None:
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight[outputs], self.bias[outputs])


class PatchEmbed(nn.Module):
    """Non-overlapping patches: (B, C, H, W) -> (B, patches, width)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.img_size, self.patch_size = config.size, (config.patch_size, config.patch_size)  # timm's names
        self.grid_size, self.num_patches = (config.side, config.side), config.patches
        self.proj = nn.Conv2d(config.in_channels, config.width, config.patch_size, config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Rotary(nn.Module):
    """:func:`rotate` as a module, so that an exporter can replace it."""

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        return rotate(x, rotation)


class Attention(nn.Module):
    """Multi-head attention with rotary positions, computed by :class:`illama.models.attention.MaskedAttention`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.width = config.heads, config.width
        self.qkv = Linear(config.width, 3 * config.width)
        self.rotary = Rotary()
        self.core = MaskedAttention()
        self.proj = Linear(config.width, config.width)

    def forward(self, x: Tensor, mask: AttentionMask, rotation: Tensor | None, row: int | None = None) -> Tensor:
        """(B, N, width) -> (B, N, width).

        Args:
            rotation: cosines and sines, (2, N, head_dim / 2); None without RoPE.
            row: index of the only query to compute; the output is then (B, 1, width).
        """
        if row is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            row_rotation = rotation
        else:
            q = self.qkv(x[:, row : row + 1], outputs=slice(0, self.width))
            k, v = self.qkv(x, outputs=slice(self.width, None)).chunk(2, dim=-1)
            row_rotation = rotation[:, row : row + 1] if rotation is not None else None
        q, k, v = (split_heads(part, self.num_heads) for part in (q, k, v))
        if rotation is not None and row_rotation is not None:
            q, k = self.rotary(q, row_rotation), self.rotary(k, rotation)
        return self.proj(self.core(q, k, v, mask).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """fc2(silu(fc1(x)) * fc3(x)), without biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.width, config.hidden, bias=False)
        self.fc2 = Linear(config.hidden, config.width, bias=False)
        self.fc3 = Linear(config.width, config.hidden, bias=False)
        self.norm = nn.Identity()  # as in timm's MLPs: what comes before fc2

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(F.silu(self.fc1(x)) * self.fc3(x)))


class GELUMLP(nn.Module):
    """ViT's fc2(gelu(fc1(x))), with biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.width, config.hidden)
        self.fc2 = Linear(config.hidden, config.width)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(F.gelu(self.fc1(x))))


class Block(nn.Module):
    """A pre-norm block: x += attention(norm(x)); x += mlp(norm(x)).

    Args:
        drop_path: probability that a sample skips a branch in training (stochastic depth).
        dropout: dropout rate of the output of each branch.
    """

    def __init__(self, config: ModelConfig, drop_path: float, dropout: float) -> None:
        super().__init__()
        self.norm1 = make_norm(config)
        self.attn = Attention(config)
        self.norm2 = make_norm(config)
        self.mlp = SwiGLU(config) if config.mlp == "swiglu" else GELUMLP(config)
        self.drop = nn.Sequential(
            nn.Dropout(dropout) if dropout else nn.Identity(), DropPath(drop_path) if drop_path else nn.Identity()
        )

    def forward(self, x: Tensor, mask: AttentionMask, rotation: Tensor | None, row: int | None = None) -> Tensor:
        """(B, N, width) -> (B, N, width), or (B, 1, width) for one query ``row``."""
        residual = x if row is None else x[:, row : row + 1]
        x = residual + self.drop(self.attn(self.norm1(x), mask, rotation, row))
        return x + self.drop(self.mlp(self.norm2(x)))


class ILLaMA(TimmMethods):
    """The whole network. Maps float images (B, C, H, W) to logits (B, num_classes), or to ``config.features``.

    Attributes:
        config: the network's :class:`ModelConfig`.
        soft_mask: alpha of the soft mask, in 0..1 (else ValueError). Training changes it; inference uses 0.
        readout_only: whether the last block computes only the class token, if the head reads nothing else. This is
            exact, in training too. If False, it computes every token, as the released code does.

    Args:
        drop_path: stochastic depth rate of the last block; rates rise linearly from 0 in the first block.
        dropout: dropout rate after the position embedding and in every residual branch.
        head_dropout: dropout rate before the head.
    """

    def __init__(
        self, config: ModelConfig, drop_path: float = 0.0, dropout: float = 0.0, head_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.config = config
        self.readout_only = True
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        has_table = config.position != "rope"
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, config.width)) if has_table else None
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        rates = [drop_path * index / max(1, config.depth - 1) for index in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, rate, dropout) for rate in rates)
        self.norm = make_norm(config)
        self.head_drop = nn.Dropout(head_dropout) if head_dropout else nn.Identity()
        self.head = _make_head(config)
        rotation = rotary_table(config.tokens, config.head_dim) if config.position != "learnable" else None
        self.register_buffer("rotation", rotation, persistent=False)
        causal = torch.ones(config.tokens, config.tokens, dtype=torch.bool).tril()
        causal[config.class_index] |= config.class_sees_all
        self.register_buffer("causal", causal, persistent=False)
        self.apply(_initialize)
        for table in (self.cls_token, self.pos_embed):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)

    def reset_classifier(self, num_classes: int, global_pool: Pool | None = None) -> None:
        """Replaces the head by a new one, with the device and dtype of the other parameters.

        Args:
            num_classes: number of classes; 0 for no head.
            global_pool: see :class:`ModelConfig`; None keeps the current one.

        Raises:
            UserError: there are classes, but nothing is pooled.
        """
        pool = self.config.global_pool if global_pool is None else global_pool
        self.config, like = replace(self.config, num_classes=num_classes, global_pool=pool), self.cls_token
        self.head = _make_head(self.config).to(like.device, like.dtype).train(self.training).apply(_initialize)

    def no_weight_decay(self) -> set[str]:
        """Returns the parameters excluded from weight decay in addition to norms and biases (timm's convention)."""
        return {"cls_token", "pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns patterns that map parameters to layers, for layer-wise learning rate decay (timm's convention)."""
        return {
            "stem": r"^(?:cls_token|pos_embed|patch_embed)",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def embed(self, images: Tensor) -> Tensor:
        """Returns the input of the first block: patches and class token with position embeddings, (B, N, width)."""
        x = self.patch_embed(images)
        class_token = self.cls_token.expand(x.shape[0], -1, -1)
        x = torch.cat([x, class_token] if self.config.class_token == "last" else [class_token, x], dim=1)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        return self.drop(x)

    @property
    def reads_class_token(self) -> bool:
        """Whether the last block computes the class token alone."""
        return self.readout_only and self.config.global_pool == "token"

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_classes), or (B, *config.features) without a head."""
        config = self.config
        if not self.reads_class_token:
            return self.forward_head(self.forward_features(images))
        x, mask = self.embed(images), self.attention_mask(config.mask, self.causal)
        *blocks, last = self.blocks
        for block in blocks:
            x = self.run_block(block, x, mask)
        sees_all = config.class_token == "last" or config.class_sees_all
        x = self.run_block(last, x, mask.row(config.class_index, sees_all), config.class_index)
        return self.head(self.head_drop(self.norm(x[:, 0])))


def rotary_table(tokens: int, head_dim: int, theta: float = 10000.0) -> Tensor:
    """Returns RoPE's cosines and sines, (2, tokens, head_dim / 2) (Su et al., arXiv 2104.09864, equation 15)."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(tokens, dtype=torch.float64), frequencies)
    return torch.stack([angles.cos(), angles.sin()]).float()


@torch.fx.wrap  # symbolic tracing cannot follow what depends on the dtype
def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates the interleaved pairs (x0, x1), (x2, x3), ... of (B, H, N, d), as in the original LLaMA.

    Hugging Face's LLaMA pairs x[i] with x[i + d / 2] instead; its weights must be permuted first.
    """
    if torch.compiler.is_compiling():  # compilers and exporters do not support complex numbers, and are fast without
        cos, sin = rotation.to(x.dtype)
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = rotation.to(wide.dtype)
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)


def _make_head(config: ModelConfig) -> nn.Module:
    return Linear(config.width, config.num_classes) if config.num_classes else nn.Identity()


def _initialize(module: nn.Module) -> None:
    """Initializes weights from a truncated normal (std 0.02) and biases with zero.

    This is the released code's initialization of Linears (the paper's tables give 0.2). Here it also applies to the
    patch convolution, for which the released code keeps PyTorch's default.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
