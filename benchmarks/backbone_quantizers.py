"""The quantizers of real_backbone.py: this project's schemes, and ModelOpt's and NNCF's defaults, on a timm ViT.

Each is a function from a network and calibration images to a function from images (B, 3, H, W) to (features, logits),
where features are the input of the head. ModelOpt and NNCF use their defaults. This project's schemes were designed
with this network, by the noise of its features (docs/quantization.md). Of attention's two products, NNCF quantizes both
by default, ModelOpt and this project's `int8` none.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from illama.models.timm_vit import CausalVisionTransformer, to_quantizable
from quant.quantizers.calibrate import calibrate, mtq
from quant.quantizers.rotation import random_rotation
from quant.schemes.scheme import resolve, shipped_scheme

Outputs = tuple[Tensor, Tensor]
Infer = Callable[[Tensor], Outputs]
Quantizer = Callable[[nn.Module, Tensor], Infer]

SCHEMES = (
    *("int8", "int8-accurate", "int8-attention", "fp8", "fp8-attention", "w4a8"),
    *("mxfp8", "nvfp4", "nvfp4-weight-only"),
)
MODELOPT = {
    "modelopt-int8": "INT8_DEFAULT_CFG",
    "modelopt-int8-smoothquant": "INT8_SMOOTHQUANT_CFG",
    "modelopt-fp8": "FP8_DEFAULT_CFG",
}
NNCF = {"nncf-int8": None, "nncf-int8-transformer": "TRANSFORMER"}
REFERENCE = "fp32"
_BATCH = 16


class WithFeatures(nn.Module):
    """A timm ViT that returns (features, logits)."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Outputs:
        features = self.vit.forward_head(self.vit.forward_features(images), pre_logits=True)  # type: ignore[operator]
        return features, self.vit.head(features)  # type: ignore[operator]


def find_quantizers() -> tuple[dict[str, Quantizer], dict[str, str]]:
    """Returns the available quantizers by name, and the reason for each that is missing."""
    found: dict[str, Quantizer] = {REFERENCE: lambda vit, _: torch_infer(WithFeatures(vit))}
    found |= {name: partial(ours, scheme=name) for name in SCHEMES}
    found |= {name: partial(modelopt, config=config) for name, config in MODELOPT.items()}
    peers: dict[str, Quantizer] = {name: partial(nncf_openvino, model_type=kind) for name, kind in NNCF.items()}
    if find_spec("nncf") and find_spec("openvino"):
        return found | peers, {}
    return found, dict.fromkeys(peers, "nncf and openvino are not installed for this Python")


def settings(name: str) -> dict[str, str]:
    """Returns what a quantizer's result depends on besides its inputs: the hash of a scheme, since schemes change."""
    if name not in SCHEMES:
        return {}
    return {"scheme": hashlib.sha256(json.dumps(asdict(shipped_scheme(name))).encode()).hexdigest()[:16]}


def torch_infer(network: nn.Module) -> Infer:
    """Returns a network's function from images to (features, logits), without gradients."""

    @torch.inference_mode()
    def infer(images: Tensor) -> Outputs:
        return network(images)

    return infer


def ours(vit: Any, images: Tensor, scheme: str) -> Infer:
    """Quantizes by a scheme of this project; the PyTorch network has the arithmetic of its ONNX file."""
    model, spec = to_quantizable(vit), shipped_scheme(scheme).rotate
    quantized = calibrate(model, resolve(shipped_scheme(scheme), model), images.split(_BATCH))
    assert isinstance(quantized, CausalVisionTransformer)
    generator = torch.Generator().manual_seed(spec.seed)
    back = random_rotation(vit.embed_dim, generator, keeps_ones=True).float().t()

    @torch.inference_mode()
    def infer(images: Tensor) -> Outputs:
        features = quantized.vit.forward_head(quantized.forward_features(images), pre_logits=True)
        logits = quantized.vit.head(features)
        if spec.residual:  # the norm's parameters and the inverse rotation are in the head
            features = features @ back * vit.norm.weight + vit.norm.bias
        return features, logits

    return infer


def modelopt(vit: nn.Module, images: Tensor, config: str) -> Infer:
    """Quantizes timm's network by a configuration of ModelOpt, with its fake quantizers in PyTorch."""

    def run(network: nn.Module) -> None:
        with torch.inference_mode():
            for batch in images.split(_BATCH):
                network(batch)

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = mtq.quantize(WithFeatures(copy.deepcopy(vit)), getattr(mtq, config), run)
    return torch_infer(quantized)


def nncf_openvino(vit: nn.Module, images: Tensor, model_type: str | None) -> Infer:
    """Quantizes timm's network, converted to OpenVINO, by NNCF's post-training quantization.

    Everything that NNCF does not quantize is computed in float32, as for the others; on a CPU with AMX, OpenVINO's
    default is bfloat16.
    """
    import nncf
    import openvino

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it traces with a deprecated function of PyTorch
        model = openvino.convert_model(WithFeatures(vit), example_input=images[:2])
    options: dict[str, Any] = {"model_type": nncf.ModelType[model_type]} if model_type else {}
    dataset = nncf.Dataset([images[i : i + 1].numpy() for i in range(len(images))])
    with contextlib.redirect_stdout(io.StringIO()):
        quantized = nncf.quantize(model, dataset, subset_size=len(images), **options)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(quantized, "CPU", settings)

    def infer(images: Tensor) -> Outputs:
        features, logits = compiled(images.numpy()).values()
        return torch.from_numpy(features.copy()), torch.from_numpy(logits.copy())

    return infer
