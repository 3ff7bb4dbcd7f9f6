"""Files of quantized networks: float weights, scales, and the scheme in the metadata."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from illama.checkpoints.load import CONFIG_METADATA, read_state
from illama.checkpoints.tensor_files import read_metadata
from illama.errors import UserError
from illama.models.attention import MaskedNetwork
from illama.structured_files import parse_json
from quant.quantizers.calibrate import quantize_layers
from quant.quantizers.layers import QuantizeDequantize, quantizers
from quant.quantizers.observers import RangeObserver
from quant.quantizers.rotation import rotatable_mlps, rotate, rotate_hidden
from quant.schemes.scheme import Scheme, resolve, stored_scheme

SCHEME_METADATA = "quant_scheme"  # keys in the metadata of a .safetensors file; the values are JSON
ZERO_POINTS_METADATA = "quant_zero_points"


def write_quantized_weights(model: MaskedNetwork, scheme: Scheme, path: Path) -> None:
    """Writes a network that was quantized by ``scheme``."""
    activations = [(name, each) for name, each in quantizers(model) if isinstance(each, QuantizeDequantize)]
    metadata = {
        CONFIG_METADATA: json.dumps(model.config.to_dict()),
        SCHEME_METADATA: json.dumps(asdict(scheme)),
        ZERO_POINTS_METADATA: json.dumps({name: each.zero_point for name, each in activations if each.zero_point}),
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    path.write_bytes(save(tensors, metadata))  # not save_file, whose file only its owner may read


def read_quantized_weights(path: Path, network: MaskedNetwork) -> tuple[MaskedNetwork, Scheme]:
    """Returns the network in a file of :func:`write_quantized_weights`, in evaluation mode, and its scheme.

    Args:
        network: the same architecture without quantization; it is not changed.

    Raises:
        UserError: the file is missing, damaged, or of another kind.
    """
    state, notes = read_state(path), read_metadata(path)
    try:
        config = parse_json(notes[CONFIG_METADATA], type(network.config), f"the config in {path}")
        name = f"the scheme in {path}"
        scheme = stored_scheme(parse_json(notes[SCHEME_METADATA], dict[str, Any], name), name)
        zero_points = parse_json(notes[ZERO_POINTS_METADATA], dict[str, int], f"the zero points in {path}")
    except KeyError as error:
        raise UserError(
            f"{path} is damaged or has no quantized network: make the bundle again with python quant/qat.py"
        ) from error
    if config != network.config:
        raise UserError(f"{path} is of another network than {network.config}: give its own checkpoint")
    plan = resolve(scheme, model := copy.deepcopy(network)).tensors
    rotate(model, scheme.rotate)  # for the modules and biases that it adds
    names = rotatable_mlps(model, scheme)
    if scheme.rotate.hidden_blocks:  # the chosen ones have their matrix in the file
        names = [name for name in names if f"{name}.norm.matrix" in state]
    rotate_hidden(model, scheme.rotate, names)
    # The ranges are in the file; these observers only determine the quantizers' shapes.
    observers = {name: RangeObserver(spec) for name, spec in plan.items()}
    for observer in observers.values():
        observer.collect(torch.tensor([0.0, 1.0]))
    model = quantize_layers(model, plan, observers)
    try:
        for name in state.keys() - model.state_dict().keys():
            owner, _, part = name.rpartition(".")
            if part == "bias" and getattr(model.get_submodule(owner), "bias", 0) is None:  # it has a centered mean
                model.get_submodule(owner).bias = nn.Parameter(state[name])
        model.load_state_dict(state)
    except (RuntimeError, AttributeError) as error:
        raise UserError(
            f"{path} does not fit its own scheme: make the bundle again with python quant/qat.py"
        ) from error
    for name, quantizer in quantizers(model):
        if isinstance(quantizer, QuantizeDequantize):
            quantizer.zero_point = zero_points.get(name, 0)
    model.set_attention_form("plain")
    return model.eval(), scheme
