"""Attention with iLLaMA's causal mask, which is easily confused with a language model's.

The paper's equation 2 multiplies the mask AFTER the softmax and does not renormalize:

    O = (softmax(q k^T / sqrt(d)) * S) v        S = alpha * ones + (1 - alpha) * tril

So the denominator of every row still sums over future tokens. The causal mask of a language model (equation 1,
``is_causal=True``) gives other results on every row but the last. A checkpoint that was trained with one mask gives
wrong results with the other, without an error. ``docs/attention-mask.md`` has a figure.

A fused kernel can compute the same function as a single scaled-dot-product attention over 2N keys with a boolean
pre-softmax mask:

    K' = [K ; K]        V' = [V ; alpha V]        allowed = [ tril | not tril ]      (N x 2N)

Each row attends to every key exactly once, so the denominator is the full sum. Future keys are attended to in the
second half, where their values are scaled by alpha. This is exact for every alpha.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from illama.models.config import MaskKind, NetworkConfig

Form = Literal["plain", "fused"]


class QuantizerPoint(nn.Identity):
    """A quantizer insertion point: an input of a matrix product of attention."""


@dataclass(frozen=True)
class AttentionMask:
    """The mask of one forward pass, for M query rows and N keys.

    Attributes:
        kind: one of the three masks; ``bidirectional`` masks nothing.
        causal: (M, N) boolean, true where the query may attend to the key.
        alpha: weight of future keys in the soft mask, a scalar tensor; None means 0 (hard mask).
    """

    kind: MaskKind
    causal: Tensor
    alpha: Tensor | None = None

    def row(self, index: int, sees_all: bool) -> AttentionMask:
        """Returns the mask of a single query row.

        Args:
            sees_all: whether this query attends to every key, as the last row of a causal mask does.
        """
        kind: MaskKind = "bidirectional" if sees_all else self.kind
        return AttentionMask(kind, self.causal[index : index + 1], self.alpha)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Returns S of equation 2, (M, N)."""
        causal = self.causal.to(dtype)
        return causal if self.alpha is None else torch.where(self.causal, causal, self.alpha.to(dtype))


class MaskedAttention(nn.Module):
    """Attention of q, k and v with any of the masks. Has no parameters.

    Attributes:
        form: ``plain`` (MatMul, softmax, mask, MatMul) is for quantizers, which need the softmax output, and for ONNX
            Runtime on CPUs. ``fused`` (one scaled-dot-product attention) is for GPUs and TensorRT. None selects
            :func:`fastest_form`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.form: Form | None = None
        self.q, self.k, self.v, self.p = QuantizerPoint(), QuantizerPoint(), QuantizerPoint(), QuantizerPoint()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout: float = 0.0) -> Tensor:
        """Computes attention: q (B, H, M, d), k and v (B, H, N, d) -> (B, H, M, d).

        Args:
            dropout: dropout rate of the attention weights, applied in evaluation mode too.
        """
        form = self.form or fastest_form(q, mask)
        return (self._fused if form == "fused" else self._plain)(q, k, v, mask, dropout)

    def _plain(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout: float) -> Tensor:
        q = self.q(q * q.shape[-1] ** -0.5)
        scores = q @ self.k(k.transpose(-2, -1))
        if mask.kind == "pre_softmax":
            scores = scores + mask.weight(scores.dtype).log()
        probabilities = scores.softmax(dim=-1)
        if mask.kind == "post_softmax":
            probabilities = probabilities * mask.weight(probabilities.dtype)
        if dropout:
            probabilities = F.dropout(probabilities, dropout)
        return self.p(probabilities).to(v.dtype) @ self.v(v)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout: float) -> Tensor:
        allowed: Tensor | None = None
        # q is scaled here, since TensorRT's fused attention operator has no scale, and a quantizer of q must get the
        # same tensor in both forms.
        q = q * q.shape[-1] ** -0.5
        if mask.kind == "pre_softmax":
            allowed = mask.causal if mask.alpha is None else mask.weight(q.dtype).log()
        elif mask.kind == "post_softmax":
            k = torch.cat([k, k], dim=-2)
            future = torch.zeros_like(v) if mask.alpha is None else v * mask.alpha.to(v.dtype)
            v = torch.cat([v, future], dim=-2)
            allowed = torch.cat([mask.causal, ~mask.causal], dim=-1)
        rows = q.shape[-2]
        if rows == 1:
            q = q.expand(-1, -1, 2, -1)  # TensorRT has no fused kernel for a single query row
        fused = F.scaled_dot_product_attention(
            self.q(q), self.k(k), self.v(v), attn_mask=allowed, dropout_p=dropout, scale=1.0
        )
        return fused[..., :rows, :]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H * d) -> (B, H, N, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attentions(model: nn.Module) -> dict[str, Any]:
    """Returns the self-attentions of a network by name: modules with ``qkv``, a ``core`` and ``proj``."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "core", None), MaskedAttention) and hasattr(module, "qkv")
    }


def part_before_proj(attention: Any) -> str:
    """Returns the name of a module between v and ``proj`` that depends on channels; nothing if there is none."""
    for part in ("norm", "gate"):
        module = getattr(attention, part, None)
        if module is not None and not isinstance(module, nn.Identity):
            return part
    return ""


class MaskedNetwork(nn.Module):
    """Base class of every network. All of its attentions share one soft mask.

    Attributes:
        config: the network's configuration.
        soft_mask: alpha of the soft mask, in 0..1 (else ValueError). Training changes it; inference uses 0.
    """

    config: NetworkConfig
    alpha: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("alpha", torch.zeros(()), persistent=False)
        self.soft_mask = 0.0

    @property
    def soft_mask(self) -> float:
        return self._soft_mask

    @soft_mask.setter
    def soft_mask(self, alpha: float) -> None:
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"the soft mask's alpha must lie in 0..1, not {alpha}")
        # attention_mask() reads the buffer and these two booleans, but never the float, so that a compiled model is
        # not recompiled for every value of the schedule.
        self._soft_mask = alpha
        self._masks_nothing = alpha == 1.0
        self._masks_softly = 0.0 < alpha < 1.0
        self.alpha.fill_(alpha)

    def no_weight_decay(self) -> set[str]:
        """Returns the parameters excluded from weight decay in addition to norms and biases (timm's convention)."""
        return set()

    def attention_mask(self, kind: MaskKind, causal: Tensor) -> AttentionMask:
        """Returns the mask of this forward pass; ``causal`` is (N, N), true where the query may attend to the key."""
        return AttentionMask(
            "bidirectional" if self._masks_nothing else kind, causal, self.alpha if self._masks_softly else None
        )

    def set_attention_form(self, form: Form | None) -> None:
        """Sets the form of every attention (see :class:`MaskedAttention`); None is the fastest."""
        for module in self.modules():
            if isinstance(module, MaskedAttention):
                module.form = form


def fastest_form(q: Tensor, mask: AttentionMask) -> Form:
    """Returns the faster form for these queries: measured on CPUs (``docs/attention-mask.md``), assumed for GPUs.

    Symbolic tracing, which knows neither device nor dtype, gets ``plain``.
    """
    if isinstance(q, torch.fx.Proxy):
        return "plain"
    if q.device.type != "cpu":
        return "fused"
    # On a CPU, the fused kernel does not skip masked keys, so twice the keys are twice the work. In 16 bits, its
    # backward pass is slower than the plain form's, by up to 20 times for a single query.
    slow_backward = q.requires_grad and q.dtype in (torch.bfloat16, torch.float16)
    return "plain" if mask.kind != "bidirectional" or slow_backward else "fused"
