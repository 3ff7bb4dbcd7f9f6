"""How ONNX Runtime is opened on the CPU, everywhere in this project."""

from __future__ import annotations

from pathlib import Path

import onnxruntime

from illama.inference import usable_cores


def cpu_session(
    model: Path | bytes, threads: int = 0, profile: Path | None = None, fused: bool = False
) -> onnxruntime.InferenceSession:
    """A session that computes what the graph says.

    By default ONNX Runtime multiplies weights of 8 or 4 bits by inputs that it rounds to 8 bits on the way, though the
    graph has them in floating point (``session.qdq_matmulnbits_accuracy_level`` 4, in its documentation of session
    options). Level 1 keeps them in float32.

    Args:
        model: a file, or its contents.
        threads: within an operator; 0 for one a core.
        profile: prefix of the file of times that ``end_profiling`` writes.
        fused: the graph is one for TensorRT. Left to itself, ONNX Runtime rounds a quantized convolution's bias to
            integers of the product of its scales, which half precision has no room for, and takes a Relu before a
            QuantizeLinear to FP8 for one that changes nothing.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads or usable_cores(), 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    disabled = ["WeightBiasQuantization", "ReluQuantRewrite"] if fused else None
    return onnxruntime.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
    )
