"""This project's schemes as peers, and the list of all peers."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from peers.base import Peer, Task
from peers.olive_aimet_peers import OLIVE_AIMET_PEERS
from peers.onnx_peers import ONNX_PEERS
from peers.runtimes import OPENVINO, OPENVINO_F32, ORT
from peers.torch_peers import TORCH_PEERS
from quant.export.onnx_export import export_onnx
from quant.schemes.scheme import Scheme, emulated_on_cpus, read_scheme, resolve, shipped_scheme

_NEEDS = (("quant.quantizers.calibrate", "illama-toolkit"),)
SCHEMES = (
    *("int8", "int8-accurate", "int8-attention", "fp8", "fp8-attention", "w4a8", "w6a6", "w4a4"),
    *("mxfp8", "nvfp4", "nvfp4-weight-only"),
)


def quantize_by_scheme(task: Task, scheme: Scheme) -> Path:
    """Quantizes and exports as ``python quant/ptq.py`` does."""
    # Imported here, since it would add to the memory of the other peers.
    from quant.quantizers.calibrate import calibrate

    path = task.folder / "model.onnx"
    batches = [torch.from_numpy(batch) for batch in task.batches()]
    export_onnx(calibrate(task.model, resolve(scheme, task.model), batches), path, "plain")
    return path


def _peer(scheme: Scheme) -> Peer:
    is_timed = emulated_on_cpus({name: spec for name, spec in scheme.tensors.items() if spec}) is None
    runtimes = (ORT, OPENVINO, OPENVINO_F32) if is_timed else (ORT,)
    about = f"{scheme.summary} (docs/quantization.md)"
    make = partial(quantize_by_scheme, scheme=scheme)
    return Peer(f"this project, {scheme.name}", make, runtimes, about, _NEEDS, timed=is_timed)


_FILES = sorted(Path(__file__).parent.glob("*.yaml"))
OURS = {f"ours-{each.name}": _peer(each) for each in (*map(shipped_scheme, SCHEMES), *map(read_scheme, _FILES))}
PEERS: dict[str, Peer] = {**ONNX_PEERS, **OLIVE_AIMET_PEERS, **TORCH_PEERS, **OURS}
