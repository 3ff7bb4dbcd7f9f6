"""Rotations: orthogonal matrices that spread outliers over channels (QuaRot, arXiv 2404.00456; SpinQuant, 2405.16406).

An orthogonal matrix R and its transpose, which undoes it, can stand between two products without changing the result:
x W^T = (x R) (W R)^T. A tensor that has a few large channels has none after a rotation, and a narrower range.

    residual   one R for the residual stream: what writes to it is multiplied by R, what reads it by R^T. A norm
               commutes with R once its weight and bias are in the Linears after it: RMSNorm because R keeps lengths,
               LayerNorm if R also keeps the vector of ones, and with it means.
    values     one R for each head of v, undone in attn.proj: attention mixes tokens, not channels.
    hidden     blocks of a Hadamard matrix before mlp.fc2, undone in its weight. The product or the GELU before it does
               not commute with a rotation, so that this one is computed at run time, as a small matrix product. A
               scheme can limit it to the few blocks where it matters most.

The first two change weights only and cost nothing at run time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from scipy.linalg import hadamard
from timm.models.vision_transformer import ParallelThingsBlock, ResPostBlock
from torch import Tensor, nn

from illama.errors import UserError
from illama.models.attention import MaskedNetwork, attentions, part_before_proj
from illama.models.hooks import input_hooks
from illama.models.illama import ILLaMA
from illama.models.timm_vit import CausalVisionTransformer
from illama.models.upernet import Segmenter
from quant.quantizers.centering import center
from quant.quantizers.smoothquant import smooth
from quant.schemes.scheme import Rotations, Scheme

_SMALLEST = 16  # channels of a block before fc2; fewer spread too little
_PROBED = 4  # images that rounding effects are estimated on


class Rotate(nn.Module):
    """Multiplies consecutive blocks of channels by one matrix, and adds a bias: (..., C) -> (..., C).

    Args:
        matrix: (block, block); ``block`` divides C.
        bias: (C,).
    """

    matrix: Tensor
    bias: Tensor | None

    def __init__(self, matrix: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        blocks = x if x.shape[-1] == len(self.matrix) else x.unflatten(-1, (-1, len(self.matrix)))
        y = (blocks @ self.matrix).reshape(x.shape)
        return y if self.bias is None else y + self.bias


def prepare(model: MaskedNetwork, scheme: Scheme, batches: Sequence[Tensor]) -> None:
    """Rotates and smooths a float network in place, as the scheme says; its results stay the same.

    Keys and values that are quantized are centered, if that costs nothing (:mod:`quant.quantizers.centering`).

    Args:
        batches: calibration images (B, C, H, W), on the device where they are run. They are needed to smooth, to center
            keys and values, and to choose the blocks of ``rotate.hidden_blocks``.

    Raises:
        UserError: a part of the network does not commute with a rotation that the scheme requires.
    """
    rotate(model, scheme.rotate)
    if batches:
        model.to(batches[0].device)
    if scheme.smooth:
        smooth(model, scheme, batches)
    center(model, scheme, batches)
    names = choose_mlps(model, scheme, batches)
    model.cpu()
    rotate_hidden(model, scheme.rotate, names)  # last, since smoothing divides single channels


@torch.no_grad()
def rotate(model: MaskedNetwork, spec: Rotations) -> None:
    """Folds the rotations of the residual stream and of v into the weights, in place; see :func:`prepare`."""
    for obstacle in check_rotations(model, spec):
        print(f"note: {obstacle}", flush=True)
    generator = torch.Generator().manual_seed(spec.seed)
    if spec.residual and not _obstacle_of_residual(model):
        _rotate_residual(model, generator)
    if spec.values and not _obstacle_of_values(model):
        for attention in attentions(model).values():
            _rotate_values(attention, generator)


@torch.no_grad()
def rotate_hidden(model: MaskedNetwork, spec: Rotations, names: Iterable[str]) -> None:
    """Inserts the rotations before ``fc2`` of the MLPs named, in place, and undoes them in its weight."""
    for mlp in map(_mlps(model).__getitem__, names):
        size = _block_size(mlp, spec)
        signs = torch.randint(2, (size, 1), generator=torch.Generator().manual_seed(spec.seed)) * 2.0 - 1
        # Entries are powers of 2, which half precision represents; the weight takes the rest of the rows' length.
        matrix = signs.double() * torch.from_numpy(hadamard(size)) * 2.0 ** -(size.bit_length() // 2)
        blocks = mlp.fc2.weight.double().unflatten(1, (-1, size))
        _set(mlp.fc2.weight, blocks @ matrix / matrix[0].square().sum())
        mlp.norm = Rotate(matrix.to(mlp.fc2.weight.dtype))


def rotatable_mlps(model: MaskedNetwork, scheme: Scheme) -> list[str]:
    """Returns the names of the MLPs for :func:`rotate_hidden`: all that allow it and quantize the input of ``fc2``."""
    return [
        name
        for name, mlp in _mlps(model).items()
        if scheme.rotate.hidden
        and scheme.spec(f"{name}.fc2.input")
        and _block_size(mlp, scheme.rotate)
        and isinstance(mlp.norm, nn.Identity)
    ]


def rotated_mlps(model: nn.Module) -> list[str]:
    """Returns the names of the MLPs whose input of ``fc2`` is rotated at run time."""
    return [name for name, mlp in _mlps(model).items() if isinstance(mlp.norm, Rotate)]


def choose_mlps(model: MaskedNetwork, scheme: Scheme, batches: Sequence[Tensor]) -> list[str]:
    """Returns the names of the MLPs to rotate: where rounding the input of ``fc2`` has the largest effect.

    Args:
        batches: images (B, C, H, W); needed if ``scheme.rotate.hidden_blocks`` is not 0.
    """
    names, count = rotatable_mlps(model, scheme), scheme.rotate.hidden_blocks
    if not 0 < count < len(names):
        return names
    effects = _rounding_effects(model, [f"{name}.fc2" for name in names], batches)
    return sorted(names, key=lambda name: -effects[f"{name}.fc2"])[:count]


def _rounding_effects(model: nn.Module, layers: Sequence[str], batches: Sequence[Tensor]) -> dict[str, float]:
    """Estimates how much the network's output changes if the input of a layer is rounded, for each layer.

    The error of rounding is spread evenly over a step, which is proportional to the range. To first order, the squared
    change of the output is then the squared range times the squared gradient; the gradient is of a sum of the outputs
    with random signs, whose square is on average that of all outputs. Only ratios of the results have a meaning.
    """
    inputs: dict[str, Tensor] = {}

    def keep(name: str, arguments: Any) -> None:
        inputs[name] = arguments[0].requires_grad_()

    effects, generator = dict.fromkeys(layers, 0.0), torch.Generator().manual_seed(0)
    images = [image for batch in batches for image in batch.split(1)]
    for image in images[:: max(1, len(images) // _PROBED)][:_PROBED]:
        with torch.enable_grad(), input_hooks(model, layers, keep):
            y = model(image)
            signs = torch.randint(2, y.shape, generator=generator).to(y) * 2 - 1
            gradients = torch.autograd.grad((y * signs).sum(), [inputs[name] for name in layers])
        for name, gradient in zip(layers, gradients, strict=True):
            low, high = inputs[name].detach().aminmax()
            effects[name] += float((high - low).square() * gradient.square().sum())
    return effects


def _block_size(mlp: Any, spec: Rotations) -> int:
    """Returns the number of channels in a block before ``fc2``; 0 if no block of that size or smaller fits."""
    size: int = min(spec.hidden, mlp.fc2.in_features & -mlp.fc2.in_features)
    return size if size >= _SMALLEST else 0


def random_rotation(size: int, generator: torch.Generator, keeps_ones: bool = False) -> Tensor:
    """Returns a random orthogonal matrix, (size, size), float64, that spreads every channel over all others.

    It is the Kronecker product of a random rotation and the largest Hadamard matrix that divides ``size``, with random
    signs.

    Args:
        keeps_ones: a reflection maps the image of the vector of ones back to it.
    """
    power = size & -size
    signs = torch.randint(2, (size, 1), generator=generator) * 2.0 - 1
    rest = torch.linalg.qr(torch.randn(size // power, size // power, dtype=torch.float64, generator=generator)).Q
    blocks = torch.from_numpy(hadamard(power)).double() / power**0.5
    matrix = signs.double() * torch.kron(rest.contiguous(), blocks)
    ones = torch.full((size,), size**-0.5, dtype=torch.float64)
    normal = ones @ matrix - ones
    if keeps_ones and normal.norm() > 1e-9:
        matrix -= 2 * torch.outer(matrix @ normal, normal) / normal.square().sum()
    return matrix


def check_rotations(model: MaskedNetwork, spec: Rotations) -> list[str]:
    """Returns what stands in the way of rotations, in words; UserError if the scheme requires one of these."""
    found = []
    for asked, obstacle_of in ((spec.residual, _obstacle_of_residual), (spec.values, _obstacle_of_values)):
        if asked and (obstacle := obstacle_of(model)):
            if asked is True:
                raise UserError(f"{obstacle}: leave this rotation out, or set it to auto")
            found.append(obstacle)
    return found + _obstacles_of_hidden(model, spec)


def _network(model: MaskedNetwork) -> Any:
    return model.vit if isinstance(model, CausalVisionTransformer) else model


def _obstacle_of_residual(model: MaskedNetwork) -> str:
    """Returns why the residual stream cannot be rotated: something that is not linear writes to it; or nothing."""
    network = _network(model)
    if not hasattr(network, "blocks"):
        return "the residual stream cannot be rotated, because the network has no transformer blocks"
    modules = dict(network.named_modules())
    found = [name for name in ("patch_embed.norm", "norm_pre") if not isinstance(modules.get(name), nn.Identity | None)]
    found += [f"the norms of blocks.{i}" for i, block in enumerate(network.blocks) if isinstance(block, ResPostBlock)]
    return f"the residual stream cannot be rotated, because {found[0]} writes to it" if found else ""


def _obstacle_of_values(model: MaskedNetwork) -> str:
    """Returns why v cannot be rotated: something between v and proj that depends on channels; or nothing."""
    for name, attention in attentions(model).items():
        if part := part_before_proj(attention):
            return f"v cannot be rotated, because {name}.{part} is between it and proj"
    return ""


def _obstacles_of_hidden(model: MaskedNetwork, spec: Rotations) -> list[str]:
    """Returns why inputs of fc2 cannot be rotated: a norm before it, or channels that do not divide into blocks."""
    for name, mlp in _mlps(model).items() if spec.hidden else ():
        if not isinstance(mlp.norm, nn.Identity):
            return [f"the inputs of {name}.fc2 cannot be rotated, because {name}.norm is before it"]
        if not _block_size(mlp, spec):
            return [f"the inputs of {name}.fc2 are not rotated: {_SMALLEST} does not divide {mlp.fc2.in_features}"]
    return []


def _rotate_residual(model: MaskedNetwork, generator: torch.Generator) -> None:
    network = _network(model)
    layer_norms = any(isinstance(module, nn.LayerNorm) for module in model.modules())
    matrix = random_rotation(network.patch_embed.proj.out_channels, generator, keeps_ones=layer_norms)
    _rotate_outputs(network.patch_embed.proj, matrix)
    for name in ("cls_token", "reg_token", "dist_token", "pos_embed"):
        if (table := getattr(network, name, None)) is not None:
            _set(table, table.double() @ matrix)
    for norm, readers, writer, parent, scale in [branch for block in network.blocks for branch in _branches(block)]:
        _fold_norm(norm, readers)
        _fold_scale(writer, parent, scale)
        for reader in readers:
            _set(reader.weight, reader.weight.double() @ matrix)
        _rotate_outputs(writer, matrix)
    _rotate_back(model, matrix)


def _branches(block: Any) -> Iterator[tuple[Any, list[Any], Any, nn.Module, str]]:
    """Yields (norm, readers, writer, parent, scale) of the residual branches of a block of ours or of timm's.

    A branch is x + scale(writer(...(readers(norm(x))))); ``scale`` is the name of the module in ``parent`` that scales
    the output by channel (timm's LayerScale), if there is one.
    """
    parts: list[Any]
    if isinstance(block, ParallelThingsBlock):
        parts = [(each.norm, each.attn, each, "ls") for each in block.attns]
        parts += [(each.norm, each.mlp, each, "ls") for each in block.ffns]
    else:
        parts = [(block.norm1, block.attn, block, "ls1"), (block.norm2, block.mlp, block, "ls2")]
    for norm, body, parent, scale in parts:
        writer = body.proj if hasattr(body, "proj") else body.fc2
        readers = [child for child in body.children() if isinstance(child, nn.Linear) and child is not writer]
        yield norm, readers, writer, parent, scale


def _rotate_back(model: MaskedNetwork, matrix: Tensor) -> None:
    """Undoes the rotation of the stream after the last norm: in the head, or in front of anything else."""
    network, read = _network(model), not isinstance(model, Segmenter)  # a decoder does not read tokens alone
    norms, heads, linear = [network.norm], [network.head], read
    if not isinstance(network, ILLaMA):
        norms = [norm for norm in (network.norm, network.fc_norm) if not isinstance(norm, nn.Identity)]
        heads += [network.head_dist] if hasattr(network, "head_dist") else []
        linear = read and not network.attn_pool and network.global_pool in ("", "token", "avg") and len(norms) == 1
    if linear and all(isinstance(head, nn.Linear) for head in heads):
        _fold_norm(norms[0], heads)
        for head in heads:
            _set(head.weight, head.weight.double() @ matrix)
        return
    pooled = linear and all(isinstance(head, nn.Identity) for head in heads)
    norm = norms[0] if pooled else network.norm
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    back = matrix.t() if weight is None else matrix.t() * weight.double()
    back, bias = back.to(network.patch_embed.proj.weight.dtype), None if bias is None else bias.detach().clone()
    _fold_norm(norm, [])
    if not pooled:
        network.norm = nn.Sequential(network.norm, Rotate(back, bias))
        return
    network.head = Rotate(back, bias)  # less work than for all tokens
    if len(heads) > 1:
        network.head_dist = Rotate(back, bias)


def _fold_norm(norm: Any, readers: Sequence[Any]) -> None:
    """Moves the weight and the bias of a norm into the Linears after it."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    for reader in readers:
        if bias is not None:
            if reader.bias is None:
                reader.bias = nn.Parameter(torch.zeros_like(reader.weight[:, 0]))
            _set(reader.bias, reader.bias.double() + reader.weight.double() @ bias.double())
        if weight is not None:
            _set(reader.weight, reader.weight.double() * weight.double())
    if weight is not None:
        weight.fill_(1)
    if bias is not None:
        bias.zero_()


def _fold_scale(writer: Any, parent: nn.Module, name: str) -> None:
    """Moves a LayerScale into the Linear before it."""
    scale: Any = getattr(parent, name, None)
    if hasattr(scale, "gamma"):
        _set(writer.weight, scale.gamma.double()[:, None] * writer.weight.double())
        if writer.bias is not None:
            _set(writer.bias, scale.gamma.double() * writer.bias.double())
        setattr(parent, name, nn.Identity())


def _mlps(model: nn.Module) -> dict[str, Any]:
    return {
        name: module for name, module in model.named_modules() if hasattr(module, "fc2") and hasattr(module, "norm")
    }


def _rotate_values(attention: Any, generator: torch.Generator) -> None:
    """Rotates each head of v, and undoes it in ``proj``."""
    width = attention.proj.in_features
    heads = attention.num_heads
    matrix = torch.block_diag(*(random_rotation(width // heads, generator) for _ in range(heads)))
    _rotate_outputs(attention.qkv, matrix, slice(2 * width, None))
    _set(attention.proj.weight, attention.proj.weight.double() @ matrix)


def _rotate_outputs(layer: Any, matrix: Tensor, rows: slice = slice(None)) -> None:
    """Rotates the outputs of a Linear or a convolution, or those in a slice."""
    _set(layer.weight[rows], matrix.t() @ layer.weight[rows].double().flatten(1))
    if layer.bias is not None:
        _set(layer.bias[rows], layer.bias[rows].double() @ matrix)


def _set(tensor: Tensor, value: Tensor) -> None:
    tensor.copy_(value.reshape(tensor.shape))
