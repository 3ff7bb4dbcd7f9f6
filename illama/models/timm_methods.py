"""The methods and attributes of timm's VisionTransformer, so that programs written for timm's models take an iLLaMA."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from timm.layers import global_pool_nlc
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from illama.models.attention import AttentionMask, MaskedNetwork
from illama.models.config import ModelConfig, Pool


class TimmMethods(MaskedNetwork):
    """Base class of networks with one class token among the tokens of :meth:`embed`, and a mask.

    Outputs are in timm's order: the class token first, then the patches.

    Attributes:
        grad_checkpointing: whether training computes the activations of the blocks again instead of storing them.
    """

    config: ModelConfig
    causal: Tensor
    rotation: Tensor | None
    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Module
    head_drop: nn.Module
    grad_checkpointing = False
    num_prefix_tokens = 1  # the class token

    def embed(self, images: Tensor) -> Tensor:
        """Returns the input of the first block, (B, N, width)."""
        raise NotImplementedError

    def run_block(self, block: nn.Module, x: Tensor, mask: AttentionMask, row: int | None = None) -> Tensor:
        """Runs a block on tokens (B, N, width), which are in the network's own order."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, mask, self.rotation, row, use_reentrant=False)
        return block(x, mask, self.rotation, row)

    @property
    def embed_dim(self) -> int:
        return self.config.width

    num_features = head_hidden_size = embed_dim

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    def in_chans(self) -> int:
        return self.config.in_channels

    @property
    def global_pool(self) -> Pool:
        return self.config.global_pool

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Returns module, channels and reduction of the feature map of each block."""
        width, reduction = self.config.width, self.config.patch_size
        names = (f"blocks.{index}" for index in range(len(self.blocks)))
        return [{"module": name, "num_chs": width, "reduction": reduction} for name in names]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Pool | None = None) -> None:
        """Replaces the head by a new one; UserError if a config cannot have both."""
        raise NotImplementedError

    def forward_features(self, images: Tensor) -> Tensor:
        """Returns all tokens after the final norm: (B, C, H, W) -> (B, N, width)."""
        return self.forward_intermediates(images, 1, output_fmt="NLC")[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Maps tokens of :meth:`forward_features` to what ``forward`` returns, or to the input of the head."""
        x = self.head_drop(global_pool_nlc(x, self.config.global_pool, num_prefix_tokens=self.num_prefix_tokens))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Returns the tokens of :meth:`forward_features`, and the feature maps of the blocks; see timm's method.

        Args:
            x: images (B, C, H, W).
            indices: of the blocks; a number is that of the last blocks; None is all.
            return_prefix_tokens: return pairs of a feature map and the class token (B, 1, width).
            norm: apply the final norm to the feature maps.
            stop_early: leave out the blocks after the last index.
            output_fmt: ``NCHW``, (B, width, h, w), or ``NLC``, (B, patches, width).
            intermediates_only: return the feature maps alone.

        Raises:
            ValueError: ``output_fmt`` is neither of the two.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, not {output_fmt!r}")
        taken, last = feature_take_indices(len(self.blocks), indices)
        side, found = self.config.side, list[Any]()
        mask, tokens = self.attention_mask(self.config.mask, self.causal), self.embed(x)
        for index, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            tokens = self.run_block(block, tokens, mask)
            if index in taken:
                token, patches = self._split(tokens)
                if norm:
                    token, patches = self.norm(token), self.norm(patches)
                if output_fmt == "NCHW":
                    patches = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2).contiguous()
                found.append((patches, token) if return_prefix_tokens else patches)
        return found if intermediates_only else (self.norm(torch.cat(self._split(tokens), dim=1)), found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the blocks after the last index, and the final norm and the head; returns the indices."""
        taken, last = feature_take_indices(len(self.blocks), indices)
        if prune_head:
            self.reset_classifier(0, "")
        self.blocks, self.config = self.blocks[: last + 1], replace(self.config, depth=last + 1)
        if prune_norm:
            self.norm = nn.Identity()
        return taken

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | list[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> Any:
        """Returns :meth:`forward_intermediates` of the last ``n`` blocks, or of those listed, as tokens or maps."""
        output_fmt = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(
            x, n, return_prefix_tokens, norm, output_fmt=output_fmt, intermediates_only=True
        )

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the class token, (B, 1, width), and the patches, (B, patches, width), of all tokens."""
        place, first = self.config.class_index, int(self.config.class_token == "first")
        return x[:, place : place + 1], x[:, first : first + self.config.patches]
