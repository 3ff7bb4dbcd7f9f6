"""A timm VisionTransformer made causal: from a bidirectional checkpoint to the paper's mask, by way of alpha.

At alpha = 1 nothing is masked, so the causal network computes what the original did, up to the order of sums:
self-attention does not care where the class token stands once positions have been added. Fine-tuning then
lowers alpha to 0, as training from scratch does (arXiv 2404.06773, section 3).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import PatchDropout
from timm.models.vision_transformer import (
    Attention,
    Block,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from illama.config import MaskKind
from illama.errors import UserError
from illama.masks import AttentionMask, MaskedAttention, SoftMasked

_BLOCKS = (Block, ResPostBlock, ParallelThingsBlock)


def to_causal(vit: VisionTransformer, mask: MaskKind = "post_softmax") -> CausalVisionTransformer:
    """A causal copy of ``vit`` with its weights; ``vit`` itself stays as it is and shares nothing with the copy.

    The copy starts with the hard mask, as it is to be deployed. To fine-tune, lower its ``soft_mask`` from 1.

    Args:
        vit: any timm ``VisionTransformer`` or its distilled DeiT variant, with every pooling, with or without
            class token and registers; blocks may be timm's ``Block``, ``ResPostBlock`` or ``ParallelThingsBlock``.
        mask: ``post_softmax`` (the paper's equation 2) or ``pre_softmax``.

    Raises:
        UserError: when ``mask`` is neither, or when the network has a part that cannot be made causal exactly:
            another class (EVA, BEiT, relative or rotary positions), other blocks or another attention.
    """
    if mask not in ("post_softmax", "pre_softmax"):
        raise UserError(f"mask must be post_softmax or pre_softmax, not {mask!r}")
    _check(vit)
    return CausalVisionTransformer(copy.deepcopy(vit), mask)


class CausalVisionTransformer(SoftMasked):
    """What :func:`to_causal` makes: images (B, C, H, W), float, to what the head of the original gives.

    The blocks see the patches in raster order, then the registers (or the distillation token), then the class
    token. Outside of them the order is timm's, so pooling, final norm and head are the original's; an attention
    pooling (``map``, ``prr``) is a read-out and not masked.

    Names in the state dict are timm's behind ``vit.``, and ``model.vit.state_dict()`` loads into the original
    class. Use ``model.vit`` where timm wants its own: for ``reset_classifier``, ``set_input_size``,
    ``set_grad_checkpointing``, or an optimizer's parameter groups. It is not to be called itself.

    Attributes:
        vit: timm's network, with each attention replaced by a :class:`CausalAttention`.
        mask: ``post_softmax`` or ``pre_softmax``.
        soft_mask: alpha, see :class:`illama.masks.SoftMasked`. Not saved: a network made anew is at 0.
    """

    def __init__(self, vit: VisionTransformer, mask: MaskKind) -> None:
        super().__init__()
        self.vit = vit
        self.mask = mask
        self.training = vit.training
        for parent, attention in _attentions(vit.blocks):
            parent.attn = CausalAttention(attention)
        if isinstance(vit.patch_drop, PatchDropout):
            vit.patch_drop.ordered = True  # timm's default shuffles the patches it keeps: no order to be causal in
        self.to(next(vit.parameters()).device)  # alpha, that is; its precision is float32 whatever the weights'

    def no_weight_decay(self) -> set[str]:
        """The original's, under their names here."""
        return {f"vit.{name}" for name in self.vit.no_weight_decay()}

    def forward_features(self, images: Tensor) -> Tensor:
        """All tokens after the final norm, in timm's order (class token first): (B, N, width)."""
        vit = self.vit
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        tokens, class_tokens = x.shape[1], int(vit.cls_token is not None)
        parts = [class_tokens, vit.num_prefix_tokens - class_tokens, tokens - vit.num_prefix_tokens]
        x = _reverse_parts(x, parts)
        # Made here and not kept: dropped patches and dynamic image sizes change the number of tokens.
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
        mask = self.attention_mask(self.mask, causal)
        for block in vit.blocks:
            if vit.grad_checkpointing:
                x = checkpoint(block, x, attn_mask=mask, use_reentrant=False)
            else:
                x = block(x, attn_mask=mask)
        return vit.norm(_reverse_parts(x, parts[::-1]))

    def forward(self, images: Tensor) -> Any:
        """(B, C, H, W) -> (B, num_classes); a pair of them from a DeiT in distilled training."""
        return self.vit.forward_head(self.forward_features(images))


class CausalAttention(nn.Module):
    """timm's ``Attention`` with its own parts, under their own names, around a :class:`MaskedAttention`."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.num_heads: int = attention.num_heads
        self.qkv: nn.Module = attention.qkv
        self.q_norm: nn.Module = attention.q_norm
        self.k_norm: nn.Module = attention.k_norm
        self.attn_drop: nn.Dropout = attention.attn_drop
        self.core = MaskedAttention()
        self.norm: nn.Module = attention.norm
        self.gate: nn.Module | None = getattr(attention, "gate", None)  # timm 1.0.20 has none
        self.proj: nn.Module = attention.proj
        self.proj_drop: nn.Module = attention.proj_drop
        self.train(attention.training)

    def forward(self, x: Tensor, attn_mask: AttentionMask, is_causal: bool = False) -> Tensor:
        """(B, N, width) -> (B, N, width); ``attn_mask`` as timm's blocks name it, ``is_causal`` is not for us.

        Raises:
            UserError: without an :class:`AttentionMask`, as when the ``vit`` is called by itself.
        """
        if not isinstance(attn_mask, AttentionMask):
            raise UserError("the blocks of a CausalVisionTransformer need its mask: call the model, not its .vit")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.attn_drop.p if self.attn_drop.training else 0.0
        y = self.core(self.q_norm(q), self.k_norm(k), v, attn_mask, dropout)
        y = self.norm(y.transpose(1, 2).flatten(2))
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(y))


def _reverse_parts(x: Tensor, sizes: list[int]) -> Tensor:
    """Cut (B, N, width) into consecutive parts of these sizes and put the last first; order within a part stays."""
    return torch.cat(x.split(sizes, dim=1)[::-1], dim=1)


def _attentions(blocks: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Every module with a child named ``attn``, which is what timm calls it in all of its blocks, and that child."""
    return [(parent, parent.attn) for parent in blocks.modules() if hasattr(parent, "attn")]


def _check(vit: nn.Module) -> None:
    """Refuse what would be computed wrongly."""
    kind = type(vit)
    refusal = f"cannot make a {kind.__name__} causal"
    if not isinstance(vit, VisionTransformer):
        raise UserError(f"{refusal}: give a timm VisionTransformer, such as vit_tiny_patch16_224 or a deit_*")
    for method in ("forward", "forward_features"):
        if getattr(kind, method) is not getattr(VisionTransformer, method):
            raise UserError(f"{refusal}: its class has a {method} of its own; give a plain VisionTransformer")
    for block in vit.blocks:
        if type(block) not in _BLOCKS:
            known = ", ".join(each.__name__ for each in _BLOCKS)
            raise UserError(f"{refusal}: it has a {type(block).__name__}; give one whose blocks are {known}")
    for _, attention in _attentions(vit.blocks):
        if type(attention) is not Attention:
            raise UserError(f"{refusal}: it has a {type(attention).__name__}; give one with timm's plain Attention")
        if attention.scale != attention.head_dim**-0.5:
            raise UserError(f"{refusal}: an attention scales by {attention.scale}; it must be head_dim ** -0.5")
