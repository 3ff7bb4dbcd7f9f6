"""This project's schemes as peers, and the list of all peers."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from peers.base import Peer, Task
from peers.onnx_peers import ONNX_PEERS
from peers.runtimes import OPENVINO, OPENVINO_F32, ORT
from peers.torch_peers import TORCH_PEERS
from quant.export.onnx_export import export_onnx
from quant.schemes.scheme import Scheme, resolve, shipped_scheme

_NEEDS = (("quant.quantizers.calibrate", "illama-toolkit"),)
SCHEMES = ("int8", "int8-accurate", "int8-smooth", "fp8", "fp8-attention")


def quantize_by_scheme(task: Task, scheme: Scheme) -> Path:
    """Quantizes and exports as ``python quant/ptq.py`` does."""
    # Imported here, since it would add to the memory of the other peers.
    from quant.quantizers.calibrate import calibrate

    path = task.folder / "model.onnx"
    batches = [torch.from_numpy(batch) for batch in task.batches()]
    export_onnx(calibrate(task.model, resolve(scheme, task.model), batches), path, "plain")
    return path


def _peer(scheme: str) -> Peer:
    is_fp8 = scheme.startswith("fp8")  # a CPU can only simulate FP8
    runtimes = (ORT,) if is_fp8 else (ORT, OPENVINO, OPENVINO_F32)
    make = partial(quantize_by_scheme, scheme=shipped_scheme(scheme))
    return Peer(f"this project, {scheme}", make, runtimes, "docs/quantization.md", _NEEDS, timed=not is_fp8)


PEERS: dict[str, Peer] = {**ONNX_PEERS, **TORCH_PEERS, **{f"ours-{scheme}": _peer(scheme) for scheme in SCHEMES}}
