"""Peers that quantize the float ONNX graph: ONNX Runtime, OpenVINO's NNCF, NVIDIA ModelOpt."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from illama.bundle import INPUT
from illama.inference import top1
from peers.base import Peer, Task
from peers.runtimes import OPENVINO, OPENVINO_F32, ORT
from quant.export.onnx_export import export_onnx

PRODUCTS = ["MatMul", "Gemm", "Conv"]
_ORT_PAGE = "onnxruntime.ai/docs/performance/model-optimizations/quantization.html"
_NNCF_PAGE = "docs.openvino.ai, Model Optimization, Post-training Quantization"
_NNCF = (("openvino", "openvino"), ("nncf", "nncf"))
_MODELOPT_PAGE = "nvidia.github.io/Model-Optimizer/guides/_onnx_quantization.html"
_MODELOPT = (
    ("modelopt", "nvidia-modelopt"),
    ("onnx_graphsurgeon", "onnx-graphsurgeon"),
    ("onnxslim", "onnxslim"),
    ("onnxconverter_common", "onnxconverter-common"),
    ("polygraphy", "polygraphy"),
    ("lief", "lief"),
)


class _Reader(CalibrationDataReader):
    """The calibration images for ONNX Runtime's calibrator."""

    def __init__(self, task: Task) -> None:
        self._batches = task.batches()

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch}


def float_graph(task: Task) -> Path:
    """Exports the checkpoint as a float32 ONNX graph of opset 23."""
    path = task.folder / "model.onnx"
    export_onnx(task.model, path, "plain")
    return path


def with_float_graph(task: Task, quantize: Callable[[Path, Path], object], name: str = "model.onnx") -> Path:
    """Calls ``quantize`` with a temporary float graph and the path to write to."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", task.folder / name
        export_onnx(task.model, source, "plain")
        quantize(source, target)
    return target


def ort_static(task: Task, **settings: Any) -> Path:
    """quantize_static after ONNX Runtime's pre-processing, Q/DQ format, weights int8 per channel.

    The documentation recommends to optimize a transformer with onnxruntime.transformers first. That tool fuses nothing
    in this network, since it does not support the mask after the softmax or RoPE.
    """

    def quantize(source: Path, target: Path) -> None:
        prepared = source.with_name("prepared.onnx")
        quant_pre_process(source, prepared)
        quantize_static(
            prepared,
            target,
            _Reader(task),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            weight_type=QuantType.QInt8,
            **settings,
        )

    return with_float_graph(task, quantize)


def ort_dynamic(task: Task) -> Path:
    """quantize_dynamic after ONNX Runtime's pre-processing: weights int8 per channel, activations at each call."""

    def quantize(source: Path, target: Path) -> None:
        prepared = source.with_name("prepared.onnx")
        quant_pre_process(source, prepared)
        quantize_dynamic(prepared, target, per_channel=True, weight_type=QuantType.QInt8)

    return with_float_graph(task, quantize)


def nncf_plain(task: Task, transformer: bool = False) -> Path:
    """nncf.quantize on the OpenVINO model, over all calibration images."""

    def quantize(source: Path, target: Path) -> None:
        import nncf
        import openvino

        kind = nncf.ModelType.TRANSFORMER if transformer else None
        images = nncf.Dataset([image[None] for image in task.images])
        model = openvino.Core().read_model(source)
        model = nncf.quantize(model, images, model_type=kind, subset_size=len(task.images))
        openvino.save_model(model, target, compress_to_fp16=False)  # compression would round the float weights

    return with_float_graph(task, quantize, "model.xml")


def nncf_accuracy(task: Task) -> Path:
    """nncf.quantize_with_accuracy_control: layers return to float until the accuracy drop is within a point."""

    def validate(model: Any, samples: Iterable[tuple[np.ndarray, int]]) -> tuple[float, None]:
        logits, labels = zip(*((model([image])[0], label) for image, label in samples), strict=True)
        return top1(np.concatenate(logits), np.array(labels)) / 100, None

    def quantize(source: Path, target: Path) -> None:
        import nncf
        import openvino

        calibration = nncf.Dataset([image[None] for image in task.images])
        # With labels, since NNCF ranks the layers on a subset.
        samples = [(image[None], label) for image, label in zip(*task.validation, strict=True)]
        checks = nncf.Dataset(samples, lambda sample: sample[0])
        model = openvino.Core().read_model(source)
        model = nncf.quantize_with_accuracy_control(
            model,
            calibration,
            checks,
            validate,
            max_drop=0.01,
            drop_type=nncf.DropType.ABSOLUTE,
            subset_size=len(task.images),
        )
        openvino.save_model(model, target, compress_to_fp16=False)

    return with_float_graph(task, quantize, "model.xml")


def modelopt_onnx(task: Task, **settings: Any) -> Path:
    """modelopt.onnx.quantization.quantize, calibrated by ONNX Runtime on the CPU."""

    def quantize(source: Path, target: Path) -> None:
        from modelopt.onnx.quantization import quantize as modelopt_quantize

        modelopt_quantize(
            str(source),
            quantize_mode="int8",
            calibration_data=task.images,
            calibration_eps=["cpu"],
            output_path=str(target),
            log_level="ERROR",
            **settings,
        )

    return with_float_graph(task, quantize)


def _ort_peer(name: str, what: str, **settings: Any) -> Peer:
    about = f"quantize_static after quant_pre_process, Q/DQ, weights int8 per channel; {what} ({_ORT_PAGE})"
    return Peer(f"ONNX Runtime, {name}", partial(ort_static, **settings), (ORT,), about)


_U8 = {"activation_type": QuantType.QUInt8}
_S8 = {"activation_type": QuantType.QInt8}
_PRODUCTS_ONLY = {"op_types_to_quantize": PRODUCTS}
ONNX_PEERS: dict[str, Peer] = {
    "fp32": Peer("float32", float_graph, (ORT, OPENVINO, OPENVINO_F32), "quant.export.onnx_export, opset 23"),
    "ort-s8s8": _ort_peer("S8S8", "all operators; Q/DQ S8S8 is the page's first choice", **_S8),
    "ort-u8s8": _ort_peer("U8S8", "all operators; U8S8 is quantize_static's default", **_U8),
    "ort-s8s8-products": _ort_peer("S8S8, products only", "operators that multiply", **_S8, **_PRODUCTS_ONLY),
    "ort-u8s8-products": _ort_peer("U8S8, products only", "operators that multiply", **_U8, **_PRODUCTS_ONLY),
    "ort-u8s8-percentile": _ort_peer(
        "U8S8, products only, percentile",
        "operators that multiply, percentile 99.999",
        calibrate_method=CalibrationMethod.Percentile,
        **_U8,
        **_PRODUCTS_ONLY,
    ),
    "ort-u8s8-entropy": _ort_peer(
        "U8S8, products only, entropy",
        "operators that multiply, entropy",
        calibrate_method=CalibrationMethod.Entropy,
        **_U8,
        **_PRODUCTS_ONLY,
    ),
    "ort-dynamic": Peer(
        "ONNX Runtime, dynamic",
        ort_dynamic,
        (ORT,),
        f"quantize_dynamic per channel, which the page prefers for transformers ({_ORT_PAGE})",
    ),
    "nncf-default": Peer(
        "NNCF, default",
        nncf_plain,
        (OPENVINO, OPENVINO_F32),
        f"nncf.quantize over all calibration images ({_NNCF_PAGE}, Basic)",
        _NNCF,
    ),
    "nncf-transformer": Peer(
        "NNCF, model_type=TRANSFORMER",
        partial(nncf_plain, transformer=True),
        (OPENVINO, OPENVINO_F32),
        f"with SmoothQuant ({_NNCF_PAGE}, Basic)",
        _NNCF,
    ),
    "nncf-accuracy": Peer(
        "NNCF, accuracy control",
        nncf_accuracy,
        (OPENVINO, OPENVINO_F32),
        f"max_drop=0.01, on training images ({_NNCF_PAGE}, Quantizing with Accuracy Control)",
        _NNCF,
        validates=True,
    ),
    "modelopt-onnx": Peer(
        "ModelOpt ONNX, default",
        modelopt_onnx,
        (ORT, OPENVINO),
        f"int8, entropy, the rest float16, meant for TensorRT ({_MODELOPT_PAGE})",
        _MODELOPT,
    ),
    "modelopt-onnx-fp32": Peer(
        "ModelOpt ONNX, rest float32",
        partial(modelopt_onnx, high_precision_dtype="fp32"),
        (ORT, OPENVINO),
        f"int8, entropy, high_precision_dtype=fp32 ({_MODELOPT_PAGE})",
        _MODELOPT,
    ),
    "modelopt-onnx-max": Peer(
        "ModelOpt ONNX, rest float32, max",
        partial(modelopt_onnx, high_precision_dtype="fp32", calibration_method="max"),
        (ORT, OPENVINO),
        f"the same with calibration_method=max ({_MODELOPT_PAGE})",
        _MODELOPT,
    ),
}
