"""A timm VisionTransformer or Eva with this project's attention: unchanged for quantization, or made causal.

:func:`to_quantizable` does not change what the network computes. It adds quantizer insertion points, the two forms of
attention and float32 normalization. :func:`to_causal` gives the network of a bidirectional checkpoint the paper's mask.
At alpha = 1 nothing is masked, so the causal network gives the original's results, up to the order of sums:
self-attention does not depend on the order of tokens once position embeddings have been added. Fine-tuning then lowers
alpha to 0, as training from scratch does (arXiv 2404.06773, section 3).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.layers import AttentionPoolLatent, HybridEmbed, PatchDropout, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import Attention, Block, ParallelThingsBlock, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from illama.errors import UserError
from illama.models.attention import AttentionMask, MaskedAttention, MaskedNetwork, split_heads
from illama.models.config import MaskKind, TimmConfig
from illama.models.illama import Rotary
from illama.models.norms import widened
from illama.models.timm_eva import eva_to_vit
from illama.models.timm_hybrid import fold_hybrid

_BLOCKS = (Block, ResPostBlock, ParallelThingsBlock)
_OTHERS = {  # part of the name of a class -> why it is refused
    "Swin": "its attention has windows",
    "MultiScale": "its blocks have several resolutions",
    "Beit": "its attention has a position bias",
    "RelPos": "its attention has relative positions",
    "NaFlex": "its image size is not fixed",
}


def to_causal(vit: VisionTransformer | Eva, mask: MaskKind = "post_softmax") -> CausalVisionTransformer:
    """Returns a causal copy of ``vit``, with parameters of its own; ``vit`` is not changed.

    The copy starts with the hard mask, as in deployment. To fine-tune it, lower its ``soft_mask`` from 1 to 0.

    Args:
        vit: any timm ``VisionTransformer`` or its distilled DeiT variant, with any pooling, with or without class token
            and registers; blocks may be timm's ``Block``, ``ResPostBlock`` or ``ParallelThingsBlock``. Or any ``Eva``.
        mask: ``post_softmax`` (the paper's equation 2) or ``pre_softmax``.

    Raises:
        UserError: ``mask`` is neither of these, or a part of the network cannot be made causal exactly: another class
            (BEiT, Swin, relative positions), other blocks, another attention, or no fixed image size.
    """
    if mask not in ("post_softmax", "pre_softmax"):
        raise UserError(f"mask must be post_softmax or pre_softmax, not {mask!r}")
    return CausalVisionTransformer(_copy(vit, f"cannot make this {type(vit).__name__} causal"), mask)


def to_quantizable(vit: VisionTransformer | Eva) -> CausalVisionTransformer:
    """Returns a copy of ``vit`` with the same results, for quantization and export; nothing is masked or reordered.

    Accepts the networks that :func:`to_causal` accepts, but of hybrids, whose patches come from a convolutional
    network, only those with a ResNet. The copy has the attention, normalization and code path of the causal networks.
    """
    return CausalVisionTransformer(plain_vit(vit), "bidirectional")


def plain_vit(vit: VisionTransformer | Eva) -> VisionTransformer:
    """Returns a copy of ``vit`` that :func:`to_quantizable` wraps."""
    refusal = f"cannot quantize this {type(vit).__name__}"
    plain = _copy(vit, refusal)
    if type(plain.patch_embed) not in (PatchEmbed, HybridEmbed):
        kind = type(plain.patch_embed).__name__
        raise UserError(f"{refusal}: it has a {kind}; give one with timm's plain PatchEmbed")
    try:
        fold_hybrid(plain)
    except UserError as error:
        raise UserError(f"{refusal}: {error}") from error
    return plain


class CausalVisionTransformer(MaskedNetwork):
    """A timm ViT with this project's attention. Maps float images (B, C, H, W) to the output of timm's head.

    Under a causal mask, the blocks get the patches in raster order, then the registers (or the distillation token),
    then the class token. Outside the blocks, and without a mask, the order is timm's, so pooling, final norm and head
    are unchanged. An attention pooling (``map``, ``prr``) reads all tokens and is not masked.

    The state dict has timm's names with the prefix ``vit.``, and ``model.vit.state_dict()`` can be loaded into timm's
    class; an ``Eva`` becomes a ``VisionTransformer`` (:mod:`illama.models.timm_eva`). Pass ``model.vit`` to timm for
    ``reset_classifier``, ``set_input_size``, ``set_grad_checkpointing``, or an optimizer's parameter groups, but do not
    call it.

    Attributes:
        vit: timm's network, with each attention replaced by :class:`CausalAttention`, each normalization by a float32
            version, and a latent attention pooling by :class:`LatentPool`.
        config: configuration at the time of conversion; timm's methods on ``vit`` do not change it.
        mask: ``post_softmax``, ``pre_softmax``, or ``bidirectional`` for timm's network unchanged.
        soft_mask: alpha, see :class:`illama.models.attention.MaskedNetwork`. It is not saved; a new network has 0.
    """

    config: TimmConfig

    def __init__(self, vit: VisionTransformer, mask: MaskKind) -> None:
        super().__init__()
        self.vit = vit
        self.mask = mask
        self.config = _config(vit, mask)
        self.training = vit.training
        for parent, attention in _attentions(vit.blocks):
            parent.attn = CausalAttention(attention)
            if mask != "bidirectional" and parent.attn.rotation is not None:
                parent.attn.rotation = self._in_mask_order(parent.attn.rotation, -2)
        if type(vit.attn_pool) is AttentionPoolLatent:
            vit.set_submodule("attn_pool", LatentPool(vit.attn_pool))
        for name, module in list(vit.named_modules()):
            if (norm := widened(module)) is not None:
                vit.set_submodule(name, norm)
        if mask != "bidirectional" and isinstance(vit.patch_drop, PatchDropout):
            vit.patch_drop.ordered = True  # by default, timm shuffles the patches that it keeps
        self.to(next(vit.parameters()).device)  # moves alpha, which stays in float32

    def no_weight_decay(self) -> set[str]:
        """Returns timm's parameters excluded from weight decay, with the prefix ``vit.``."""
        return {f"vit.{name}" for name in self.vit.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns patterns that map parameters to layers, for layer-wise learning rate decay (timm's convention)."""
        return {
            "stem": r"^vit\.(?:cls_token|reg_token|dist_token|pos_embed|patch_embed|norm_pre)",
            "blocks": [(r"^vit\.blocks\.(\d+)", None), (r"^vit\.(?:fc_)?norm", (99999,))],
        }

    def forward_features(self, images: Tensor) -> Tensor:
        """Returns all tokens after the final norm, in timm's order (class token first): (B, N, width)."""
        return self.vit.norm(self._run_blocks(images, [len(self.vit.blocks) - 1])[0])

    def block_patches(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """Returns the patches after some of the blocks and ``vit.norm``: (B, patches, width)."""
        return [self.vit.norm(x)[:, self.vit.num_prefix_tokens :] for x in self._run_blocks(images, indices)]

    def _in_mask_order(self, x: Tensor, dim: int = 1) -> Tensor:
        return _reverse_parts(x, self._parts(x.shape[dim]), dim)

    def _in_timm_order(self, x: Tensor) -> Tensor:
        return _reverse_parts(x, self._parts(x.shape[1])[::-1])

    def _parts(self, tokens: int) -> list[int]:
        """Returns the number of class tokens, of registers and of patches among ``tokens``."""
        class_tokens, prefix = int(self.vit.cls_token is not None), self.vit.num_prefix_tokens
        return [class_tokens, prefix - class_tokens, tokens - prefix]

    def _run_blocks(self, images: Tensor, taken: Sequence[int]) -> list[Tensor]:
        """Runs the blocks; returns the outputs of those taken, with all tokens in timm's order, (B, N, width)."""
        vit, found, masked = self.vit, list[Tensor](), self.mask != "bidirectional"
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        x = self._in_mask_order(x) if masked else x
        # The mask is not stored, since dropped patches and dynamic image sizes change the number of tokens.
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        mask = self.attention_mask(self.mask, causal)
        for index, block in enumerate(vit.blocks):
            if vit.grad_checkpointing:
                x = checkpoint(block, x, attn_mask=mask, use_reentrant=False)
            else:
                x = block(x, attn_mask=mask)
            if index in taken:
                found.append(self._in_timm_order(x) if masked else x)
        return found

    def forward(self, images: Tensor) -> Any:
        """(B, C, H, W) -> (B, num_classes), or two of these from a DeiT in distilled training.

        A network without classes returns (B, *config.features).
        """
        return self.vit.forward_head(self.forward_features(images))


class CausalAttention(nn.Module):
    """timm's ``Attention`` with the same submodules under the same names, around a :class:`MaskedAttention`.

    Attributes:
        rotation: rotary table of the tokens in the mask's order (:func:`illama.models.timm_eva.eva_to_vit`), or None.
    """

    rotation: Tensor | None

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.register_buffer("rotation", getattr(attention, "rotation", None), persistent=False)
        self.rotary = Rotary()
        self.num_heads, self.qkv = attention.num_heads, attention.qkv
        self.q_norm, self.k_norm, self.attn_drop = attention.q_norm, attention.k_norm, attention.attn_drop
        self.core, self.norm = MaskedAttention(), attention.norm
        self.gate: nn.Module | None = getattr(attention, "gate", None)  # timm 1.0.20 has none
        self.proj, self.proj_drop = attention.proj, attention.proj_drop
        self.train(attention.training)

    def forward(self, x: Tensor, attn_mask: AttentionMask, is_causal: bool = False) -> Tensor:
        """(B, N, width) -> (B, N, width); ``is_causal``, which timm's blocks pass, is ignored.

        Raises:
            UserError: ``attn_mask`` is no :class:`AttentionMask`, as when ``vit`` itself is called.
        """
        if not isinstance(attn_mask, AttentionMask):
            raise UserError("the blocks of a CausalVisionTransformer need a mask: call the model, not its .vit")
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotation is not None:
            q, k = self.rotary(q, self.rotation), self.rotary(k, self.rotation)
        dropout = self.attn_drop.p if self.attn_drop.training else 0.0
        y = self.core(q, k, v, attn_mask, dropout)
        y = self.norm(y.transpose(1, 2).flatten(2))
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(y))


class LatentPool(nn.Module):
    """timm's ``AttentionPoolLatent`` (as in SigLIP) with the same submodules, around a :class:`MaskedAttention`."""

    def __init__(self, pool: AttentionPoolLatent) -> None:
        super().__init__()
        self.num_heads, self.pool = pool.num_heads, pool.pool
        self.pos_embed, self.latent = pool.pos_embed, pool.latent
        self.q, self.kv, self.q_norm, self.k_norm = pool.q, pool.kv, pool.q_norm, pool.k_norm
        self.core, self.proj, self.proj_drop = MaskedAttention(), pool.proj, pool.proj_drop
        self.norm, self.mlp = pool.norm, pool.mlp
        self.train(pool.training)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, width) -> (B, out), or (B, latents, out) if the latents are not pooled."""
        if self.pos_embed is not None:
            x = x + self.pos_embed
        latent = self.latent.expand(x.shape[0], -1, -1)
        q, k, v = (split_heads(part, self.num_heads) for part in (self.q(latent), *self.kv(x).chunk(2, dim=-1)))
        everything = torch.ones(latent.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        y = self.core(self.q_norm(q), self.k_norm(k), v, AttentionMask("bidirectional", everything))
        y = self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))
        if self.mlp is not None:
            y = y + self.mlp(self.norm(y))
        if self.pool == "token":
            return y[:, 0]
        return y.mean(1) if self.pool == "avg" else y


def _config(vit: VisionTransformer, mask: MaskKind) -> TimmConfig:
    """Returns the configuration of timm's network."""
    name = (getattr(vit, "pretrained_cfg", None) or {}).get("architecture") or type(vit).__name__
    channels: int = vit.in_chans if hasattr(vit, "in_chans") else vit.patch_embed.proj.in_channels  # timm 1.0.20
    height, width = vit.patch_embed.img_size
    size = height if height == width else (height, width)
    return TimmConfig(name, size, channels, vit.num_classes, mask, _features(vit))


def _features(vit: VisionTransformer) -> tuple[int, ...]:
    """Returns the shape of the output for an image of a network without classes; an empty one with classes."""
    if vit.num_classes:
        return ()
    width = vit.head.out_features if isinstance(vit.head, nn.Linear) else vit.embed_dim
    pooled = vit.global_pool or isinstance(vit, VisionTransformerDistilled)
    return (width,) if pooled else (vit.patch_embed.num_patches + vit.num_prefix_tokens, width)


def _reverse_parts(x: Tensor, sizes: list[int], dim: int = 1) -> Tensor:
    """Splits (B, N, width), or another dimension, into consecutive parts of these sizes and reverses their order."""
    return torch.cat(x.split(sizes, dim)[::-1], dim)


def _attentions(blocks: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Returns every module with a child ``attn`` (as timm's blocks name their attention), and that child."""
    return [(parent, parent.attn) for parent in blocks.modules() if hasattr(parent, "attn")]


def _copy(vit: nn.Module, refusal: str) -> VisionTransformer:
    """Returns a copy, as a VisionTransformer; UserError for a network that this module would compute wrongly."""
    kind = next((each for each in (VisionTransformer, Eva) if isinstance(vit, each)), None)
    if kind is None:
        why = next((reason for name, reason in _OTHERS.items() if name in type(vit).__name__), "it is not a plain ViT")
        raise UserError(
            f"{refusal}: {why}; give a timm VisionTransformer or Eva, such as vit_tiny_patch16_224, a deit_* or "
            "vit_small_patch16_dinov3"
        )
    for method in ("forward", "forward_features"):
        if getattr(type(vit), method) is not getattr(kind, method):
            raise UserError(f"{refusal}: its class overrides {method}; give a plain {kind.__name__}")
    try:
        own = copy.deepcopy(vit)
        plain = eva_to_vit(own) if isinstance(own, Eva) else cast(VisionTransformer, own)
    except UserError as error:
        raise UserError(f"{refusal}: {error}") from error
    _check(plain, refusal)
    return plain


def _check(vit: VisionTransformer, refusal: str) -> None:
    """Raises UserError for a part of the network that this module would compute wrongly."""
    if vit.patch_embed.img_size is None:
        raise UserError(f"{refusal}: it has no fixed image size; give one that has")
    for block in vit.blocks:
        if type(block) not in _BLOCKS:
            known = ", ".join(each.__name__ for each in _BLOCKS)
            raise UserError(f"{refusal}: it has a {type(block).__name__}; give one with blocks of {known}")
    for _, attention in _attentions(vit.blocks):
        if type(attention) is not Attention:
            raise UserError(f"{refusal}: it has a {type(attention).__name__}; give one with timm's plain Attention")
        if attention.scale != attention.head_dim**-0.5:
            raise UserError(f"{refusal}: an attention has scale {attention.scale}; give one with head_dim ** -0.5")
