"""Runtimes of the peers' files on a CPU: name -> function from images (B, C, H, W) to logits (B, classes)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import torch._inductor.config
from torch import nn

from illama.checkpoints.load import load_checkpoint
from illama.inference import Infer, torch_infer
from peers.base import check_installed, register_linear

ORT, OPENVINO, OPENVINO_F32 = "ONNX Runtime", "OpenVINO", "OpenVINO, float32 kept"
EAGER, COMPILED, INDUCTOR, SIMULATED = "PyTorch", "torch.compile", "Inductor", "PyTorch, simulated"
# (the peer's file, its checkpoint, number of threads) -> function from images to logits
Load = Callable[[Path, Path, int], Infer]


def load_onnxruntime(path: Path, checkpoint: Path, threads: int) -> Infer:
    """Loads an ONNX file in ONNX Runtime, with default graph optimizations."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def load_openvino(path: Path, checkpoint: Path, threads: int) -> Infer:
    """Loads an ONNX or OpenVINO file in OpenVINO, which computes float32 in bfloat16 by default where it can."""
    return _openvino(path, threads, {})


def load_openvino_f32(path: Path, checkpoint: Path, threads: int) -> Infer:
    """Loads a file in OpenVINO without bfloat16 (docs.openvino.ai, "Precision Control", INFERENCE_PRECISION_HINT)."""
    return _openvino(path, threads, {"INFERENCE_PRECISION_HINT": "f32"})


def _openvino(path: Path, threads: int, more: dict[str, Any]) -> Infer:
    check_installed((("openvino", "openvino"),))
    import openvino

    core = openvino.Core()
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, **more}
    request = core.compile_model(core.read_model(path), "CPU", settings).create_infer_request()
    return lambda images: request.infer([images])[0].copy()


def load_eager(path: Path, checkpoint: Path, threads: int) -> Infer:
    """Loads the float network of the checkpoint."""
    torch.set_num_threads(threads)
    return torch_infer(load_checkpoint(checkpoint).model)


def load_compiled(path: Path, checkpoint: Path, threads: int) -> Infer:
    """Loads the float network of the checkpoint with torch.compile."""
    torch.set_num_threads(threads)
    return _compiled(load_checkpoint(checkpoint).model)


def load_inductor(path: Path, checkpoint: Path, threads: int) -> Infer:
    """Loads a quantized program of torch.export with torch.compile, which lowers it to 8-bit kernels."""
    check_installed((("torchao", "torchao"),))
    # Registers the program's operators, and their lowerings with Inductor.
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401

    torch.set_num_threads(threads)
    return _compiled(torch.export.load(path).module())


def _compiled(network: nn.Module) -> Infer:
    # Freezing packs the weights in advance, for the whole process; 8-bit kernels need it (docs.pytorch.org/ao, "PyTorch
    # 2 Export Quantization with X86 Backend through Inductor"). Batch sizes are static, since with dynamic ones the
    # quantized convolution fails at an assertion about its strides (torch 2.14, torchao 0.18).
    torch._inductor.config.freezing = True
    compiled = torch.compile(network, dynamic=False)

    @torch.no_grad()
    def infer(images: np.ndarray) -> np.ndarray:
        return compiled(torch.from_numpy(images)).numpy()

    return infer


def load_simulated(path: Path, checkpoint: Path, threads: int) -> Infer:
    """Loads ModelOpt's saved state, whose 8-bit values are computed in float32."""
    import modelopt.torch.opt as mto

    torch.set_num_threads(threads)
    register_linear()
    return torch_infer(mto.restore(load_checkpoint(checkpoint).model, path))


LOADERS: dict[str, Load] = {
    ORT: load_onnxruntime,
    OPENVINO: load_openvino,
    OPENVINO_F32: load_openvino_f32,
    EAGER: load_eager,
    COMPILED: load_compiled,
    INDUCTOR: load_inductor,
    SIMULATED: load_simulated,
}
