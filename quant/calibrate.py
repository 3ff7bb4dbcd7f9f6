"""From a float network to a quantized one: nvidia-modelopt observes the ranges, quant.layers holds the result."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from illama.errors import UserError
from illama.masks import Operand
from illama.model import ILLaMA, Linear
from quant.layers import QuantizedConv2d, QuantizeDequantize, QuantizedLinear
from quant.schemes import NumberFormat, Scheme

logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # a GPU is not missed here
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns of optional packages that nothing here needs
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import QuantInputBase, QuantLinearConvBase


class _ObservedLinear(QuantLinearConvBase):
    """ModelOpt's quantized form of our sliceable Linear."""


class _ObservedOperand(QuantInputBase):
    """ModelOpt's quantized form of an operand of an attention product."""


mtq.register(original_cls=Linear, quantized_cls=_ObservedLinear)
mtq.register(original_cls=Operand, quantized_cls=_ObservedOperand)


def calibrate(model: ILLaMA, scheme: Scheme, batches: Iterable[Tensor]) -> ILLaMA:
    """A copy of ``model`` with every layer that ``scheme`` names quantized, its ranges from ``batches``.

    Args:
        batches: images (B, C, H, W) as the network takes them.

    Raises:
        UserError: if the images drive an activation to NaN or infinity.
    """
    observed = observe(model, scheme, batches)
    for name, module in list(observed.named_modules()):
        if isinstance(module, QuantInputBase):
            observed.set_submodule(name, _quantized(module, name, scheme))
    return observed


def observe(model: ILLaMA, scheme: Scheme, batches: Iterable[Tensor]) -> ILLaMA:
    """A copy of ``model`` with ModelOpt's calibrated fake quantizers; its attention in the plain form."""
    observed = copy.deepcopy(model).eval()
    observed.set_attention_form("plain")  # the fused form has no softmax output to observe

    def run(network: nn.Module) -> None:
        with torch.inference_mode():
            for images in batches:
                network(images)

    try:
        # It prints how many quantizers it made, and warns of packages that nothing here needs.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return mtq.quantize(observed, _modelopt_config(scheme), run)
    except AssertionError as error:  # the observers' own check
        raise UserError("a calibration image gives NaN or infinite activations: check the images") from error


def _modelopt_config(scheme: Scheme) -> dict[str, Any]:
    def bits(number: NumberFormat) -> dict[str, Any]:
        return {"num_bits": (4, 3) if number.name == "fp8" else 8, "unsigned": number.name == "uint8"}

    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": {**bits(scheme.weights), "axis": 0}},
            {"quantizer_name": "*input_quantizer", "cfg": {**bits(scheme.activations), "axis": None}},
            {"quantizer_name": "*core.p.input_quantizer", "cfg": {**bits(scheme.probabilities), "axis": None}},
        ],
        "algorithm": "max",
    }


def _quantized(module: Any, name: str, scheme: Scheme) -> nn.Module:
    number = scheme.probabilities if name.endswith("core.p") else scheme.activations
    quantizer = QuantizeDequantize(number, module.input_quantizer.amax.detach())
    if isinstance(module, Operand):
        return quantizer
    kind = QuantizedConv2d if isinstance(module, nn.Conv2d) else QuantizedLinear
    return kind(module, scheme.weights, module.weight_quantizer.amax.detach(), quantizer)  # type: ignore[arg-type]
