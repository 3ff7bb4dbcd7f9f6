"""Block reconstruction: optimizes the rounding and the scales of each block against its floating-point output.

Every weight gets an offset of up to half a step before rounding, and every scale a factor. Both follow the sign of the
gradient of the block's squared error (SignRound: Cheng et al., arXiv 2309.05516), which converges in a few hundred
iterations; AdaRound (arXiv 2004.10568) needs tens of thousands. As in BRECQ (arXiv 2102.05426), blocks are optimized
one after another, with the outputs of the quantized blocks before them as inputs. Only images are needed, no labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from illama.progress import track
from quant.quantizers.blocks import BlockCall, block_inputs, blocks
from quant.quantizers.layers import QuantizedLinear, WeightQuantizer, quantizers

_TOKENS = 800  # of an iteration, in at least 4 images
_SCALE_RATE = 0.5  # learning rate of a scale's logarithm, relative to an offset's


@torch.no_grad()
def reconstruct(reference: nn.Module, quantized: nn.Module, batches: list[Tensor], iterations: int) -> None:
    """Optimizes the rounding and the scales of ``quantized`` in place. Blocks without quantizers are not changed.

    Args:
        reference: the floating-point network.
        batches: images (B, C, H, W); a few hundred in all.
        iterations: number of iterations for each block.
    """
    first, calls = block_inputs(reference, batches)
    exact = torch.cat(first)
    inputs = torch.cat(block_inputs(quantized, batches)[0])
    pairs = list(zip(blocks(reference), blocks(quantized), calls, strict=True))
    for (_, float_block), (_, block), call in track(pairs, "reconstruct blocks", "block"):
        targets = torch.cat([call(float_block, part) for part in exact.split(64)])
        _reconstruct_block(block, call, inputs, targets, iterations)
        inputs = torch.cat([call(block, part) for part in inputs.split(64)])
        exact = targets


def _reconstruct_block(block: nn.Module, call: BlockCall, inputs: Tensor, targets: Tensor, iterations: int) -> None:
    """Runs sign gradient descent with a linearly falling rate. The start is restored if the end has a larger error."""
    acting = [quantizer for _, quantizer in quantizers(block)]
    weights = _weights(block)
    if not acting:
        return
    scales = [quantizer.scale.clone() for quantizer in acting]
    factors = [torch.zeros_like(scale).requires_grad_() for scale in scales]
    offsets = [torch.zeros_like(weight).requires_grad_() for _, weight in weights]
    before = _error(block, call, inputs, targets)

    def set_parameters(with_gradient: bool) -> None:
        for quantizer, scale, factor in zip(acting, scales, factors, strict=True):
            quantizer.differentiable = with_gradient
            if with_gradient:
                quantizer.scale = scale * factor.exp()
            else:
                quantizer.set_scale(scale * factor.detach().exp())
        for (quantizer, _), offset in zip(weights, offsets, strict=True):
            quantizer.offset = offset if with_gradient else offset.detach()

    generator, batch = torch.Generator().manual_seed(0), max(4, _TOKENS // inputs.shape[1])
    parameters = [*factors, *offsets]
    # The scales of blocks stay: training those of NVFP4 was measured to be worse, and those of MXFP8 can only double.
    rates = [_SCALE_RATE * (not quantizer.dtype.block) for quantizer in acting] + [1.0] * len(offsets)
    for iteration in range(iterations):
        chosen = torch.randint(len(inputs), (batch,), generator=generator)
        with torch.enable_grad():
            set_parameters(with_gradient=True)
            loss = F.mse_loss(call(block, inputs[chosen]), targets[chosen])
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        rate = (1 - iteration / iterations) / iterations
        for parameter, gradient, share in zip(parameters, gradients, rates, strict=True):
            if gradient is not None:
                parameter.data.add_(gradient.sign(), alpha=-rate * share).clamp_(-0.5, 0.5)
    set_parameters(with_gradient=False)
    if _error(block, call, inputs, targets) > before:
        for quantizer, scale in zip(acting, scales, strict=True):
            quantizer.set_scale(scale)
        for quantizer, _ in weights:
            quantizer.offset = None
    for quantizer, weight in weights:  # so that rounding to nearest gives the same value again
        weight.copy_(quantizer(weight))
        quantizer.offset = None


def _weights(block: nn.Module) -> list[tuple[WeightQuantizer, Tensor]]:
    layers = [module for module in block.modules() if isinstance(module, QuantizedLinear)]
    return [(q, layer.weight) for layer in layers if (q := layer.weight_quantizer) is not None]


def _error(block: nn.Module, call: BlockCall, inputs: Tensor, targets: Tensor) -> float:
    pairs = zip(inputs.split(64), targets.split(64), strict=True)
    return sum(float((call(block, x) - y).square().sum()) for x, y in pairs)
