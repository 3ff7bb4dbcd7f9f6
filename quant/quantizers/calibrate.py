"""From a float network to a quantized one: nvidia-modelopt observes activations, quantized layers hold the result."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from illama.errors import UserError
from illama.models.attention import QuantizerPoint, SoftMasked
from illama.models.illama import Linear
from quant.quantizers.layers import QuantizedConv2d, QuantizeDequantize, QuantizedLinear, WeightQuantizer
from quant.quantizers.observers import RangeObserver, weight_amax
from quant.quantizers.reconstruction import reconstruct
from quant.quantizers.smoothquant import smooth
from quant.schemes.formats import TensorSpec
from quant.schemes.scheme import Scheme, resolve

logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # a GPU is not missed here
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns of optional packages that nothing here needs
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import QuantInputBase, QuantLinearConvBase


class _ObservedLinear(QuantLinearConvBase):
    """ModelOpt's quantized form of our sliceable Linear."""


class _ObservedPoint(QuantInputBase):
    """ModelOpt's quantized form of an operand of an attention product."""


mtq.register(original_cls=Linear, quantized_cls=_ObservedLinear)
mtq.register(original_cls=QuantizerPoint, quantized_cls=_ObservedPoint)


def calibrate(model: SoftMasked, scheme: Scheme, batches: Iterable[Tensor]) -> SoftMasked:
    """A copy of ``model`` with every tensor that ``scheme`` names quantized, its ranges from ``batches``.

    Args:
        batches: images (B, C, H, W) as the network takes them; gone through more than once.

    Raises:
        UserError: if the scheme does not fit the network, or the images drive an activation to NaN or infinity.
    """
    plan = resolve(scheme, model)
    batches = list(batches)
    reference = copy.deepcopy(model).eval()
    reference.set_attention_form("plain")  # the fused form has no softmax output to quantize
    if scheme.smooth:
        smooth(reference, scheme, batches)
    quantized = quantize_layers(reference, plan, observe(reference, plan, batches))
    if scheme.reconstruction_iterations:
        reconstruct(reference, quantized, batches, scheme.reconstruction_iterations)
    return quantized


def observe(model: SoftMasked, plan: Mapping[str, TensorSpec], batches: Iterable[Tensor]) -> dict[str, RangeObserver]:
    """What every activation in ``plan`` looked like over ``batches``, by the tensor's name."""
    activations = {name: spec for name, spec in plan.items() if not name.endswith(".weight")}
    config: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, spec in activations.items():
        quantizer = f"{name.removesuffix('.input')}.input_quantizer"
        config.append({"quantizer_name": quantizer, "cfg": {"num_bits": 8, "calibrator": (RangeObserver, (spec,), {})}})

    def run(network: nn.Module) -> None:
        with torch.inference_mode():
            for images in batches:
                network(images)

    if not activations:
        return {}
    # It prints how many quantizers it made, and warns of packages that nothing here needs.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        observed = mtq.quantize(copy.deepcopy(model), {"quant_cfg": config, "algorithm": "max"}, run)
    return {
        name: observed.get_submodule(f"{name.removesuffix('.input')}.input_quantizer")._calibrator
        for name in activations
    }


def quantize_layers(
    model: SoftMasked, plan: Mapping[str, TensorSpec], observers: Mapping[str, RangeObserver]
) -> SoftMasked:
    """A copy of ``model`` with the layers and operands of ``plan`` replaced by quantized ones."""
    quantized = copy.deepcopy(model)
    for name, module in list(quantized.named_modules()):
        if name in plan and isinstance(module, QuantizerPoint):
            quantized.set_submodule(name, _activation(name, plan[name], observers[name]))
        elif f"{name}.weight" in plan or f"{name}.input" in plan:
            weight = _weight(plan[f"{name}.weight"], module) if f"{name}.weight" in plan else None
            of_input = f"{name}.input"
            activation = _activation(of_input, plan[of_input], observers[of_input]) if of_input in plan else None
            kind = QuantizedConv2d if isinstance(module, nn.Conv2d) else QuantizedLinear
            quantized.set_submodule(name, kind(module, weight, activation))  # type: ignore[arg-type]
    return quantized


def _activation(name: str, spec: TensorSpec, observer: RangeObserver) -> QuantizeDequantize:
    if spec.symmetric and not spec.dtype.signed and observer.low < 0:
        raise UserError(
            f"{name} has negative values, which {spec.format} cuts off: choose a signed format, or symmetric: false"
        )
    return QuantizeDequantize(spec, observer.low, observer.compute_amax() if spec.symmetric else observer.high)


def _weight(spec: TensorSpec, layer: Any) -> WeightQuantizer:
    return WeightQuantizer(spec, weight_amax(layer.weight, spec))
