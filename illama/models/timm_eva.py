"""timm's Eva (EVA, EVA-02, DINOv3, Perception Encoder, ROPE-ViT) as a timm VisionTransformer with rotary tables.

The two classes differ in how they write the same things: a layer scale as a parameter or as a module, three projections
or one, biases apart from their layer. So that the rest of this project knows one kind of network only,
:func:`eva_to_vit` moves an Eva's weights into a VisionTransformer. What a VisionTransformer cannot express are rotary
positions: they become a table of cosines and sines for each block.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope, PatchEmbed, SwiGLU
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Attention, Block, LayerScale, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from illama.errors import UserError


class GatedMLP(nn.Module):
    """timm's ``SwiGLU``, fc2(norm(act(fc1(x)) * fc3(x))), with the names of this project's."""

    def __init__(self, mlp: SwiGLU) -> None:
        super().__init__()
        self.fc1, self.fc3, self.act, self.drop1 = mlp.fc1_g, mlp.fc1_x, mlp.act, mlp.drop1
        self.norm, self.fc2, self.drop2 = mlp.norm, mlp.fc2, mlp.drop2

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, width) -> (B, N, width)."""
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x)) * self.fc3(x)))))


def eva_to_vit(eva: Eva) -> VisionTransformer:
    """Returns a VisionTransformer that takes over the modules of ``eva``; its attentions get a buffer ``rotation``.

    That is the rotary table: the cosines and sines of all tokens, (2, N, head_dim / 2) or (2, heads, N, head_dim / 2),
    for pairs (x0, x1), (x2, x3), ... of each head (:func:`illama.models.illama.rotate`); tokens before the patches are
    not rotated. It is None without rotary positions. timm's attention ignores it, and
    :class:`illama.models.timm_vit.CausalAttention` does not. Where timm pairs x[i] with x[i + head_dim / 2], the rows
    of q and k are reordered, which does not change their product.

    Raises:
        UserError: a part of the network is not among those that timm's own models have.
    """
    if getattr(eva, "patch_drop", None) is not None:
        raise UserError("an Eva that drops patches is not supported: create it without patch_drop_rate")
    patches = eva.patch_embed
    with torch.device("meta"):  # every parameter is replaced
        vit = VisionTransformer(
            patches.img_size,
            patches.patch_size,
            patches.proj.in_channels,
            eva.num_classes,
            global_pool="avg",
            embed_dim=eva.embed_dim,
            depth=0,
            num_heads=1,
            class_token=eva.cls_token is not None,
            reg_tokens=0 if eva.reg_token is None else eva.reg_token.shape[1],
            no_embed_class=eva.no_embed_class,
            pos_embed="none" if eva.pos_embed is None else "learn",
            embed_layer=PatchEmbed,
        )
    vit.patch_embed.proj = patches.proj
    for name in ("global_pool", "cls_token", "reg_token", "pos_embed", "pretrained_cfg"):
        if hasattr(eva, name):
            setattr(vit, name, getattr(eva, name))
    for name in ("pos_drop", "norm_pre", "norm", "attn_pool", "fc_norm", "head_drop", "head"):
        setattr(vit, name, getattr(eva, name))
    vit.pool_include_prefix = eva.attn_pool is not None  # Eva's attention pooling reads the class token too
    vit.blocks = nn.Sequential(*map(_block, eva.blocks))
    attentions = [block.attn for block in cast(Any, vit.blocks)]
    for attention, table in zip(attentions, _tables(eva), strict=True):
        attention.register_buffer("rotation", table, persistent=False)
    return vit.train(eva.training)


def _tables(eva: Any) -> list[Tensor | None]:
    """Returns the rotary table of each block."""
    if eva.rope is None:
        return [None] * len(eva.blocks)
    embedding = eva.rope.get_embed(eva.patch_embed.grid_size)  # (..., patches, 2 head_dim), sines first
    half, prefix = eva.blocks[0].attn.rotate_half, eva.num_prefix_tokens
    sin, cos = (part[..., : part.shape[-1] // 2] if half else part[..., ::2] for part in embedding.chunk(2, -1))
    cos, sin = F.pad(cos, (0, 0, prefix, 0), value=1.0), F.pad(sin, (0, 0, prefix, 0))
    table = torch.stack([cos, sin], -4 if eva.rope_mixed else 0).detach().clone()
    return list(table) if eva.rope_mixed else [table] * len(eva.blocks)


def _block(block: Any) -> nn.Module:
    """Returns a block of VisionTransformer with the modules of an Eva's."""
    if type(block) not in (EvaBlock, EvaBlockPostNorm):
        raise UserError(f"it has a {type(block).__name__}; give one with blocks of EvaBlock or EvaBlockPostNorm")
    kind = Block if isinstance(block, EvaBlock) else ResPostBlock
    with torch.device("meta"):
        new: Any = kind(8, 1)
    for name in ("norm1", "norm2", "drop_path1", "drop_path2"):
        setattr(new, name, getattr(block, name))
    new.attn = _attention(block.attn)
    new.mlp = GatedMLP(block.mlp) if type(block.mlp) is SwiGLU else block.mlp
    for name, gamma in (("ls1", getattr(block, "gamma_1", None)), ("ls2", getattr(block, "gamma_2", None))):
        if gamma is not None:
            scale = LayerScale(1)
            scale.gamma = gamma
            setattr(new, name, scale)
    return new


def _attention(attention: Any) -> Attention:
    """Returns timm's plain attention with the modules of an Eva's, q, k and v in one projection."""
    if type(attention) not in (EvaAttention, AttentionRope):
        raise UserError(f"it has a {type(attention).__name__}; give one with EvaAttention or AttentionRope")
    with torch.device("meta"):
        new: Any = Attention(8, 1)
    new.num_heads, new.head_dim, new.scale = attention.num_heads, attention.head_dim, attention.scale
    new.attn_dim = attention.num_heads * attention.head_dim
    for name in ("q_norm", "k_norm", "norm", "gate", "proj", "attn_drop", "proj_drop"):
        setattr(new, name, getattr(attention, name))
    weight, bias = _joint_projection(attention)
    if attention.rotate_half:
        order = torch.arange(new.head_dim, device=weight.device).reshape(2, -1).t().flatten()
        rows = torch.arange(3 * new.attn_dim, device=weight.device).reshape(3, -1, new.head_dim)
        rows = torch.cat([rows[:2, :, order].flatten(), rows[2].flatten()])
        weight, bias = weight[rows], None if bias is None else bias[rows]
        for norm in (new.q_norm, new.k_norm):
            for parameter in norm.parameters():
                parameter.data = parameter.data[order]
    new.qkv = nn.Linear(weight.shape[1], len(weight), bias is not None, device="meta")
    new.qkv.weight = nn.Parameter(weight)
    new.qkv.bias = None if bias is None else nn.Parameter(bias)
    return new


def _joint_projection(attention: Any) -> tuple[Tensor, Tensor | None]:
    """Returns the weight and bias of q, k and v, (3 * width, width) and (3 * width,), with a key for every query."""
    if attention.qkv is not None:
        weight, bias = attention.qkv.weight.detach(), attention.qkv.bias
        if getattr(attention, "q_bias", None) is not None:
            bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        return weight, None if bias is None else bias.detach()
    weights, biases = list[Tensor](), list[Tensor]()
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        heads = layer.weight.shape[0] // attention.head_dim
        bias = torch.zeros_like(layer.weight[:, 0]) if layer.bias is None else layer.bias
        for found, tensor in ((weights, layer.weight), (biases, bias)):
            rows = tensor.detach().unflatten(0, (heads, -1)).repeat_interleave(attention.num_heads // heads, 0)
            found.append(rows.flatten(0, 1))
    biased = any(layer.bias is not None for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
    return torch.cat(weights), torch.cat(biases) if biased else None
