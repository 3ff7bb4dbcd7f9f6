"""Names of the runtimes, the values of ``--runtime``. Imports nothing slow."""

from __future__ import annotations

from typing import Literal

RuntimeName = Literal[
    "openvino",
    "onnxruntime",
    "onnxruntime-cuda",
    "onnxruntime-tensorrt",
    "onnxruntime-nv-tensorrt-rtx",
    "tensorrt",
    "tensorrt_rtx",
    "torch",
    "torch-compile",
]
TITLES: dict[str, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
