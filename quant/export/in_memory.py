"""Quantizes a network in memory: the work of :func:`quant.quantize`."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from illama.bundle import package_versions
from illama.checkpoints.timm_checkpoint import timm_preprocessing
from illama.data.preprocessing import Preprocessing
from illama.errors import UserError
from illama.manifest import Provenance
from illama.models.attention import MaskedNetwork
from illama.models.timm_hybrid import fold_hybrid
from illama.models.timm_vit import CausalVisionTransformer, to_quantizable
from illama.partial_work import partial_work, sources_digest
from illama.steps import Steps
from quant.export.write_bundle import InMemory, Origin, plan_quantization, write_bundles
from quant.inputs import scheme_from_name_or_file, split_images
from quant.schemes.scheme import QuantizationPlan

_IMAGES = 512  # for calibration


def write_bundles_of(
    model: nn.Module,
    loader: Iterable[Any],
    scheme: str,
    out: Path,
    preprocessing: Preprocessing | None,
    classes: tuple[str, ...],
) -> Path:
    """See :func:`quant.quantize`, which has the same arguments."""
    network = _quantizable(model)
    preprocessing = preprocessing or _preprocessing_of(model, network)
    names = classes or tuple(map(str, range(network.config.num_classes)))
    plan = plan_quantization(network, scheme_from_name_or_file(scheme))
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    inputs = InMemory(network, _calibration(loader, preprocessing), device)
    with partial_work(out) as work:
        work.start({"function": "quant.quantize", "digest": _digest(inputs, plan, preprocessing, names)})
        origin = Origin(preprocessing, names, Provenance())
        write_bundles(work, inputs, [plan], origin, Steps().show)
    return out / plan.scheme.name


def _digest(inputs: InMemory, plan: QuantizationPlan, preprocessing: Preprocessing, classes: tuple[str, ...]) -> str:
    """Returns a SHA-256 of everything that determines the bundles; an interrupted call continues with the same."""
    facts = (plan.scheme, preprocessing, classes, inputs.model.config, package_versions(), sources_digest())
    digest = hashlib.sha256(repr(facts).encode())
    for tensor in (*inputs.model.parameters(), *inputs.model.buffers(), *inputs.calibration):
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _quantizable(model: nn.Module) -> MaskedNetwork:
    if isinstance(model, MaskedNetwork):
        network = copy.deepcopy(model).cpu().eval()
        if isinstance(network, CausalVisionTransformer):
            fold_hybrid(network.vit)
        return network
    if isinstance(model, VisionTransformer | Eva):
        return to_quantizable(model).cpu().eval()
    raise UserError(f"cannot quantize a {type(model).__name__}: give an iLLaMA, or a timm VisionTransformer or Eva")


def _preprocessing_of(model: nn.Module, network: MaskedNetwork) -> Preprocessing:
    size, channels = network.config.size, network.config.in_channels
    if isinstance(model, VisionTransformer | Eva):
        return timm_preprocessing(model, size, channels)
    square = Preprocessing.imagenet(size[0], channels)
    return square if size[0] == size[1] else replace(square, size=size, resize=None)


def _calibration(loader: Iterable[Any], preprocessing: Preprocessing) -> list[Tensor]:
    """Returns the first images of a loader in batches; UserError unless they are what the network takes."""
    shape, found = (preprocessing.in_channels, *preprocessing.size), list[Tensor]()
    for batch in loader:
        images = batch[0] if isinstance(batch, tuple | list) else batch
        images = torch.as_tensor(images) if isinstance(images, np.ndarray) else images
        if not isinstance(images, Tensor) or images.dtype != torch.float32 or tuple(images.shape[1:]) != shape:
            what = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise UserError(f"the loader yields {what}, and the network takes float32 images (B, {shape})")
        found.append(images.cpu())
        if sum(map(len, found)) >= _IMAGES:
            break
    if not found:
        raise UserError("the loader yields no images: calibration needs at least one batch")
    return split_images(torch.cat(found)[:_IMAGES])
