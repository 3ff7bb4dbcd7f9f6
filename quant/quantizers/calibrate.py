"""Post-training quantization: nvidia-modelopt observes activations, and quantized layers hold the result."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.nn import QuantInputBase, QuantLinearConvBase
from torch import Tensor, nn

from illama.errors import UserError
from illama.memory import release_memory
from illama.models.attention import MaskedNetwork, QuantizerPoint
from illama.models.illama import Linear
from illama.progress import track
from illama.quiet import quiet
from quant.quantizers.gptq import round_weights
from quant.quantizers.layers import (
    BlockQuantizer,
    QuantizedConv2d,
    QuantizeDequantize,
    QuantizedLinear,
    WeightQuantizer,
    copy_sharing_weights,
)
from quant.quantizers.observers import RangeObserver, weight_amax
from quant.quantizers.reconstruction import reconstruct
from quant.quantizers.rotation import prepare
from quant.schemes.formats import TensorSpec
from quant.schemes.scheme import QuantizationPlan

# Our layers with quantized inputs, and what ModelOpt makes of them.
_OBSERVED: dict[Any, Any] = {Linear: QuantLinearConvBase, QuantizerPoint: QuantInputBase}


@contextmanager
def _registered_layers() -> Iterator[None]:
    """Registers our layers with ModelOpt inside the block; it finds a layer by its exact class."""
    for original, observed in _OBSERVED.items():
        mtq.register(original_cls=original, quantized_cls=observed)
    try:
        yield
    finally:
        for original in _OBSERVED:
            mtq.unregister(original)


def calibrate(
    model: MaskedNetwork, plan: QuantizationPlan, batches: Iterable[Tensor], device: str = "cpu"
) -> MaskedNetwork:
    """Returns a copy of ``model`` with every tensor quantized that ``plan`` names, with ranges from ``batches``.

    Args:
        batches: images (B, C, H, W), preprocessed; iterated more than once.
        device: where the networks run. ``model`` and the result are on the CPU.

    Raises:
        UserError: an activation is NaN or infinite.
    """
    scheme, tensors, batches = plan.scheme, plan.tensors, [images.to(device) for images in batches]
    reference = copy.deepcopy(model).eval()
    reference.set_attention_form("plain")  # the fused form has no softmax output to quantize
    prepare(reference, scheme, batches)
    release_memory()
    reference.to(device)
    quantized = quantize_layers(reference, tensors, observe(reference, tensors, batches)).to(device)
    if scheme.gptq:
        round_weights(reference, quantized, batches, in_place=not scheme.reconstruction_iterations)
    if scheme.reconstruction_iterations:  # rounds weights in place, which both networks share, block after block
        reconstruct(reference, quantized, batches, scheme.reconstruction_iterations)
    del reference
    release_memory()
    return quantized.cpu()


def observe(
    model: MaskedNetwork, plan: Mapping[str, TensorSpec], batches: Iterable[Tensor]
) -> dict[str, RangeObserver]:
    """Returns the observers of every activation in ``plan`` after ``batches``, by tensor name."""
    observers = {name: RangeObserver(spec) for name, spec in plan.items() if not name.endswith(".weight")}
    if not observers:
        return {}
    config: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name in observers:
        quantizer = f"{name.removesuffix('.input')}.input_quantizer"
        # ModelOpt calls a constructor for its calibrator; this one returns our observer.
        config.append(
            {"quantizer_name": quantizer, "cfg": {"num_bits": 8, "calibrator": (observers.__getitem__, (name,), {})}}
        )

    def run(network: nn.Module) -> None:
        with torch.inference_mode():
            for images in track(batches, "calibrate", "batch"):
                network(images)

    # ModelOpt prints the number of quantizers, and warns of quantizers that it leaves disabled.
    with _registered_layers(), quiet(), contextlib.redirect_stdout(io.StringIO()):
        mtq.quantize(copy_sharing_weights(model), {"quant_cfg": config, "algorithm": "max"}, run)
    return observers


def quantize_layers(
    model: MaskedNetwork, plan: Mapping[str, TensorSpec], observers: Mapping[str, RangeObserver]
) -> MaskedNetwork:
    """Returns a copy of ``model``, sharing its weights, in which what ``plan`` names is quantized."""
    quantized = copy_sharing_weights(model)
    for name, module in list(quantized.named_modules()):
        if name in plan and isinstance(module, QuantizerPoint):
            quantized.set_submodule(name, _activation(name, plan[name], observers[name]))
        elif f"{name}.weight" in plan or f"{name}.input" in plan:
            spec: Any = plan.get(f"{name}.weight")
            weight = WeightQuantizer(spec, weight_amax(module.weight, spec)) if spec else None  # type: ignore[arg-type]
            of_input = f"{name}.input"
            activation = _activation(of_input, plan[of_input], observers[of_input]) if of_input in plan else None
            kind = QuantizedConv2d if isinstance(module, nn.Conv2d) else QuantizedLinear
            quantized.set_submodule(name, kind(module, weight, activation))  # type: ignore[arg-type]
    return quantized


def _activation(name: str, spec: TensorSpec, observer: RangeObserver) -> QuantizeDequantize | BlockQuantizer:
    if spec.dtype.block:
        return BlockQuantizer(spec, observer.compute_amax())
    if spec.symmetric and not spec.dtype.signed and observer.low < 0:
        raise UserError(
            f"{name} has negative values, which {spec.format} cannot represent: use a signed one, or symmetric: false"
        )
    return QuantizeDequantize(spec, observer.low, observer.compute_amax() if spec.symmetric else observer.high)
