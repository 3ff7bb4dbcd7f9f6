"""The inputs, the scheme and the quantized network that a bundle was exported from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from illama.bundle import SCHEME, WEIGHTS
from illama.errors import UserError
from illama.manifest import Manifest
from illama.models.attention import MaskedNetwork
from illama.options import SourceOptions
from quant.export.weights import read_quantized_weights
from quant.inputs import Inputs, onnx_scheme, open_inputs
from quant.quantizers.calibrate import calibrate
from quant.schemes.scheme import FLOAT, Scheme, resolve


def open_source(bundle: Path | None, given: Mapping[str, Any]) -> Inputs:
    """Opens the checkpoint and the images that a bundle was made from.

    Args:
        bundle: if None, the defaults of :class:`illama.options.SourceOptions` are used.
        given: ``checkpoint``, ``model``, ``data`` and ``calibration_images``; values that are not None take precedence
            over the bundle's manifest.

    Raises:
        UserError: ``bundle`` is not a bundle, or was made from another checkpoint.
    """
    manifest = Manifest.read(bundle) if bundle else None
    source = (manifest and manifest.provenance.source) or SourceOptions()
    if manifest:
        preprocessing = manifest.preprocessing
        source = replace(source, exif=preprocessing.exif, class_order=preprocessing.class_order)
    source = replace(source, **{name: value for name, value in given.items() if value is not None})
    inputs = open_inputs(source, needs_labels=False)
    if manifest and not {*inputs.checkpoint.digests().values()} <= {*manifest.provenance.inputs.values()}:
        raise UserError(f"{bundle} was not made from {inputs.source.checkpoint}: give the right --checkpoint")
    return inputs


def bundle_scheme(bundle: Path | None, name: str | None) -> Scheme:
    """Returns the scheme called ``name``; if not given, the bundle's own."""
    if bundle and not name:
        quantization = Manifest.read(bundle).quantization
        name = str(own) if (own := bundle / SCHEME).exists() else quantization.scheme if quantization else FLOAT
    return Scheme(FLOAT) if name in ("fp32", FLOAT) else onnx_scheme(name or "int8")


def open_quantized(bundle: Path | None, inputs: Inputs, scheme: Scheme) -> MaskedNetwork:
    """Returns the network that the bundle's graph was exported from: read if it was trained, otherwise calibrated."""
    trained = bundle / WEIGHTS if bundle else None
    if trained and trained.exists() and scheme.tensors:
        return read_quantized_weights(trained, inputs.model)[0]
    return calibrate(inputs.model, resolve(scheme, inputs.model), inputs.calibration, inputs.device)
