"""Peers that quantize the PyTorch network (NVIDIA ModelOpt, torchao, Intel Neural Compressor), and PyTorch in float."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.onnx import symbolic_helper

from illama.bundle import INPUT
from peers.base import Peer, Task, register_linear
from peers.runtimes import COMPILED, EAGER, INDUCTOR, ORT, SIMULATED

_MODELOPT_PAGE = "nvidia.github.io/Model-Optimizer/guides/_pytorch_quantization.html"
_MODELOPT = (("modelopt", "nvidia-modelopt"),)
_MODELOPT_EXPORT = (
    *_MODELOPT,
    ("onnx_graphsurgeon", "onnx-graphsurgeon"),
    ("lief", "lief"),
    ("onnxconverter_common", "onnxconverter-common"),
    ("onnxslim", "onnxslim"),
    ("polygraphy", "polygraphy"),
)
_TORCHAO_PAGE = "docs.pytorch.org/ao, PyTorch 2 Export Quantization with X86 Backend through Inductor"
_INC_PAGE = "intel.github.io/neural-compressor, PyTorch Static Quantization, PT2E backend"
_SHAPES = ({0: torch.export.Dim("batch")},)


def torch_file(task: Task) -> Path:
    """Saves the checkpoint's weights with PyTorch."""
    path = task.folder / "model.pt"
    torch.save(task.model.state_dict(), path)
    return path


def _modelopt(task: Task, config: str) -> nn.Module:
    import modelopt.torch.quantization as mtq

    register_linear()
    model = copy.deepcopy(task.model)
    model.set_attention_form("plain")
    return mtq.quantize(model, getattr(mtq, config), partial(_run_all, task=task))


@torch.no_grad()
def _run_all(network: nn.Module, task: Task) -> None:
    for batch in task.batches():
        network(torch.from_numpy(batch))


def modelopt_int8(task: Task, config: str = "INT8_DEFAULT_CFG") -> Path:
    """Quantizes by a configuration of ModelOpt, and exports with its ONNX exporter."""
    from modelopt.torch._deploy.utils import OnnxBytes, get_onnx_bytes_and_metadata

    model = _modelopt(task, config)
    # It uses PyTorch's older exporter, which supports neither RMSNorm nor complex numbers.
    torch.onnx.register_custom_op_symbolic("aten::rms_norm", _rms_norm_in_onnx, 18)
    images = torch.from_numpy(task.images[:2])
    with torch.no_grad(), mock.patch("torch.compiler.is_compiling", return_value=True):
        file, _ = get_onnx_bytes_and_metadata(model, (images,), model_name="model", dynamic_axes={INPUT: {0: "batch"}})
    path = task.folder / "model.onnx"
    path.write_bytes(OnnxBytes.from_bytes(file).get_onnx_model_file_bytes())
    return path


def _rms_norm_in_onnx(graph: Any, x: Any, shape: Any, weight: Any, eps: Any) -> Any:
    """Exports x / sqrt(mean(x^2) + eps) * weight over the last axis."""

    def constant(value: Tensor) -> Any:
        return graph.op("Constant", value_t=value)

    mean = graph.op("ReduceMean", graph.op("Mul", x, x), constant(torch.tensor([-1])), keepdims_i=1)
    small = constant(torch.tensor(symbolic_helper._parse_arg(eps, "f")))
    return graph.op("Mul", graph.op("Div", x, graph.op("Sqrt", graph.op("Add", mean, small))), weight)


def modelopt_fp8(task: Task) -> Path:
    """mtq.FP8_DEFAULT_CFG, saved by modelopt.torch.opt, since only TensorRT supports the operators of its FP8 ONNX."""
    import modelopt.torch.opt as mto

    path = task.folder / "model.pth"
    mto.save(_modelopt(task, "FP8_DEFAULT_CFG"), path)
    return path


def torchao_pt2e(task: Task, attention: bool = False) -> Path:
    """prepare_pt2e, calibration and convert_pt2e with X86InductorQuantizer, saved by torch.export."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    model = copy.deepcopy(task.model)
    config = x86.get_default_x86_inductor_quantization_config()
    quantizer = x86.X86InductorQuantizer().set_global(config)
    if attention:
        model.set_attention_form("plain")  # it cannot quantize the fused operator
        quantizer.set_function_type_qconfig(torch.matmul, config)
    images = torch.from_numpy(task.images[:2])
    with torch.no_grad():
        # Without strict, the quantizer recognizes only the exact class Linear, and leaves this network's in float.
        program = torch.export.export(model, (images,), dynamic_shapes=_SHAPES, strict=True).module()
        prepared = prepare_pt2e(program, quantizer)
        _run_all(prepared, task)
        return _save_program(convert_pt2e(prepared), images, task)


def neural_compressor(task: Task) -> Path:
    """Intel Neural Compressor's export, prepare and convert with its default static configuration."""
    from neural_compressor.torch.export import export
    from neural_compressor.torch.quantization import convert, get_default_static_config, prepare

    images = torch.from_numpy(task.images[:2])
    with torch.no_grad():
        program = export(copy.deepcopy(task.model), (images,), dynamic_shapes=_SHAPES)
        prepared = prepare(program, get_default_static_config())
        _run_all(prepared, task)
        return _save_program(convert(prepared), images, task)


def _save_program(quantized: nn.Module, images: Tensor, task: Task) -> Path:
    path = task.folder / "model.pt2"
    torch.export.save(torch.export.export(quantized, (images,), dynamic_shapes=_SHAPES), path)
    return path


_TORCHAO = (("torchao", "torchao"),)
TORCH_PEERS: dict[str, Peer] = {
    "fp32-torch": Peer("float32", torch_file, (EAGER, COMPILED), "the checkpoint's own network, compiled: frozen"),
    "modelopt-torch-int8": Peer(
        "ModelOpt torch, INT8 default",
        modelopt_int8,
        (ORT,),
        f"INT8_DEFAULT_CFG, exported by ModelOpt, weights kept in float32 ({_MODELOPT_PAGE})",
        _MODELOPT_EXPORT,
    ),
    "modelopt-torch-smoothquant": Peer(
        "ModelOpt torch, INT8 SmoothQuant",
        partial(modelopt_int8, config="INT8_SMOOTHQUANT_CFG"),
        (ORT,),
        f"INT8_SMOOTHQUANT_CFG, exported likewise ({_MODELOPT_PAGE})",
        _MODELOPT_EXPORT,
    ),
    "modelopt-torch-fp8": Peer(
        "ModelOpt torch, FP8 default",
        modelopt_fp8,
        (SIMULATED,),
        f"FP8_DEFAULT_CFG ({_MODELOPT_PAGE})",
        _MODELOPT,
        timed=False,
    ),
    "torchao": Peer(
        "torchao PT2E",
        torchao_pt2e,
        (INDUCTOR,),
        f"X86InductorQuantizer's default, strict export ({_TORCHAO_PAGE})",
        _TORCHAO,
    ),
    "torchao-attention": Peer(
        "torchao PT2E, attention too",
        partial(torchao_pt2e, attention=True),
        (INDUCTOR,),
        f"the same and torch.matmul ({_TORCHAO_PAGE})",
        _TORCHAO,
    ),
    "neural-compressor": Peer(
        "Intel Neural Compressor",
        neural_compressor,
        (INDUCTOR,),
        f"default static configuration ({_INC_PAGE})",
        (
            ("neural_compressor", "neural-compressor[pt]"),
            ("prettytable", "prettytable"),
            ("cpuinfo", "py-cpuinfo"),
            ("psutil", "psutil"),
        ),
    ),
}
