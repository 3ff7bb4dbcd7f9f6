"""Initializes an iLLaMA from a LLaMA's weights, by weight selection.

"Initializing Models with Larger Ones" (arXiv 2311.18823) initializes a small network from evenly spaced elements of a
larger one; arXiv 2404.06773 uses LLaMA2-7B. Its released script selects from whole matrices of the first layers,
without regard to their structure. Here the layers are evenly spaced, too, and the structure is kept:

- The same channels of the residual stream are selected wherever it is read or written.
- Whole heads are selected, and inside a head whole RoPE pairs, the same ones for q, k, v and the output projection.
  Pair j of a head of size D rotates at theta^(-2j/D). Every second pair of D = 128 therefore rotates at
  theta^(-4j/128) = theta^(-2j/64), which are the frequencies of a head of size 64, so each pair keeps its frequency.
  (This holds for theta = 10000, as in LLaMA 1 and 2; another theta is not refused.)
- Hugging Face stores pair j of a head in rows j and j + D/2, and this project in rows 2j and 2j + 1.

A LLaMA has no biases, patch embedding, position embedding, class token or head, so the model's are not changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Interval
from pydantic import Field
from torch import Tensor

from illama.checkpoints.tensor_files import read_tensor, shard_files
from illama.errors import UserError
from illama.models.config import ModelConfig
from illama.models.illama import ILLaMA
from illama.structured_files import read_json


def initialize_from_llama(model: ILLaMA, folder: Path) -> None:
    """Initializes the blocks and the final norm of ``model`` in place from a LLaMA in Hugging Face's format.

    One tensor is open at a time, and only its selected elements are converted to float32, so that memory does not grow
    with the LLaMA.

    Args:
        model: network with RMSNorm and SwiGLU; none of its dimensions may exceed the LLaMA's.
        folder: folder with ``config.json`` and ``model.safetensors``, or shards and ``model.safetensors.index.json``.
            With grouped-query attention, each selected query head uses the keys and values of its group.

    Raises:
        UserError: a file is missing or damaged, names or shapes are not a LLaMA's, the LLaMA is smaller than the
            model, or a selected value is NaN or infinite. ``model`` may then be partly initialized.
    """
    if model.config.norm != "rms" or model.config.mlp != "swiglu":
        raise UserError(
            f"a LLaMA has RMSNorm and SwiGLU, and the model has norm {model.config.norm} and mlp {model.config.mlp}: "
            "choose another --variant"
        )
    folder = Path(folder)
    llama = read_json(folder / "config.json", LlamaConfig, "ignore")
    if llama.model_type != "llama":
        raise UserError(f"{folder} contains a model of type {llama.model_type!r}, not 'llama'")
    _check_sizes(llama, model.config)
    files = shard_files(folder)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, pieces in _mapping(llama, model.config):
            parts = [_select(folder, files, piece) for piece in pieces]
            parameters[name].copy_(torch.cat(parts))


_Size = Annotated[int, Interval(ge=1, le=1 << 24)]


@dataclass(frozen=True)
class LlamaConfig:
    """The keys of ``config.json`` that are used; older files lack the last two."""

    width: Annotated[_Size, Field(alias="hidden_size")]
    depth: Annotated[_Size, Field(alias="num_hidden_layers")]
    hidden: Annotated[_Size, Field(alias="intermediate_size")]
    heads: Annotated[_Size, Field(alias="num_attention_heads")]
    model_type: str = ""
    num_key_value_heads: _Size | None = None
    size_of_head: Annotated[_Size | None, Field(alias="head_dim")] = None

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.heads

    @property
    def head_dim(self) -> int:
        return self.size_of_head or self.width // self.heads


@dataclass(frozen=True)
class _Piece:
    """The rows and columns to select from one tensor of shape ``shape``; a vector has no columns."""

    name: str
    shape: tuple[int, ...]
    rows: Tensor
    columns: Tensor | None = None


def evenly_spaced(count: int, of: int) -> Tensor:
    """Returns the ``count`` indices out of 0..of - 1 that weight selection takes, int64.

    If ``count`` divides ``of``, they have a constant step from 0 on; otherwise they are rounded from 0 to of - 1.
    """
    if of % count == 0:
        return torch.arange(count) * (of // count)
    return torch.linspace(0, of - 1, count, dtype=torch.float64).round().long()


def _check_sizes(llama: LlamaConfig, model: ModelConfig) -> None:
    for size in ("width", "depth", "heads", "head_dim", "hidden"):
        given, needed = getattr(llama, size), getattr(model, size)
        if given < needed:
            raise UserError(f"the LLaMA is smaller than the model: its {size} is {given}, and {needed} is needed")
    if llama.heads % llama.key_value_heads or llama.head_dim % 2:
        raise UserError(
            f"a LLaMA with {llama.heads} heads of size {llama.head_dim} cannot have "
            f"{llama.key_value_heads} key-value heads: its config.json is damaged"
        )


def _mapping(llama: LlamaConfig, model: ModelConfig) -> Iterator[tuple[str, list[_Piece]]]:
    """Yields each parameter's name, and the selections whose concatenation along the rows is its value."""
    residual = evenly_spaced(model.width, llama.width)
    hidden = evenly_spaced(model.hidden, llama.hidden)
    query, key = _head_rows(llama, model)
    vector, query_shape = (llama.width,), (llama.heads * llama.head_dim, llama.width)
    key_shape, up_shape = (llama.key_value_heads * llama.head_dim, llama.width), (llama.hidden, llama.width)
    for block, layer in enumerate(evenly_spaced(model.depth, llama.depth).tolist()):
        target, source = f"blocks.{block}", f"model.layers.{layer}"
        attention, mlp = f"{source}.self_attn", f"{source}.mlp"
        yield f"{target}.norm1.weight", [_Piece(f"{source}.input_layernorm.weight", vector, residual)]
        keys_and_values = [_Piece(f"{attention}.{name}_proj.weight", key_shape, key, residual) for name in "kv"]
        queries = _Piece(f"{attention}.q_proj.weight", query_shape, query, residual)
        yield f"{target}.attn.qkv.weight", [queries, *keys_and_values]
        yield f"{target}.attn.proj.weight", [_Piece(f"{attention}.o_proj.weight", query_shape[::-1], residual, query)]
        yield f"{target}.norm2.weight", [_Piece(f"{source}.post_attention_layernorm.weight", vector, residual)]
        yield f"{target}.mlp.fc1.weight", [_Piece(f"{mlp}.gate_proj.weight", up_shape, hidden, residual)]
        yield f"{target}.mlp.fc3.weight", [_Piece(f"{mlp}.up_proj.weight", up_shape, hidden, residual)]
        yield f"{target}.mlp.fc2.weight", [_Piece(f"{mlp}.down_proj.weight", up_shape[::-1], residual, hidden)]
    yield "norm.weight", [_Piece("model.norm.weight", vector, residual)]


def _head_rows(llama: LlamaConfig, model: ModelConfig) -> tuple[Tensor, Tensor]:
    """Returns the rows of q_proj, and of k_proj and v_proj, in the order of the model's rows: (model.width,) each."""
    heads = evenly_spaced(model.heads, llama.heads)
    pairs = evenly_spaced(model.head_dim // 2, llama.head_dim // 2)
    within = torch.stack([pairs, pairs + llama.head_dim // 2], dim=1).flatten()  # from half-split to interleaved rows
    shared = heads // (llama.heads // llama.key_value_heads)
    query, key = ((which[:, None] * llama.head_dim + within).flatten() for which in (heads, shared))
    return query, key


def _select(folder: Path, files: dict[str, str], piece: _Piece) -> Tensor:
    """Returns the selected rows and columns in float32."""
    if piece.name not in files:
        raise UserError(f"{folder} has no tensor {piece.name}: it is not a LLaMA in Hugging Face's format")
    path = folder / files[piece.name]
    whole = read_tensor(path, piece.name)
    if tuple(whole.shape) != piece.shape or not whole.is_floating_point():
        raise UserError(
            f"{path}: {piece.name} is {whole.dtype} of shape {tuple(whole.shape)}, but config.json requires "
            f"float of shape {piece.shape}"
        )
    selected = whole[piece.rows]
    selected = (selected if piece.columns is None else selected[:, piece.columns]).float()
    if not torch.isfinite(selected).all():
        raise UserError(f"{path} has NaN or infinite values in {piece.name}: download it again")
    return selected
