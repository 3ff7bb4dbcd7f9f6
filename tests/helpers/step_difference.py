"""The largest difference between an exported file and its network, as one number."""

from pathlib import Path

import numpy as np

from illama.models.attention import MaskedNetwork
from quant.export.verify import FLOAT_TOLERANCE, TIE_TOLERANCE, Difference, compare_with_trace, trace_onnx


def local_differences(model: MaskedNetwork, path: Path, images: np.ndarray) -> dict[str, Difference]:
    """Returns the difference of every tensor of a file from the network that it was exported from."""
    return compare_with_trace(model, trace_onnx(path, images, model), images)


def largest_step_difference(model: MaskedNetwork, path: Path, images: np.ndarray) -> float:
    """Returns the largest of local_differences() as one number; 1 is within tolerance.

    The unit is one step for quantized tensors (2 if the share of differing values exceeds TIE_TOLERANCE), and
    FLOAT_TOLERANCE times the largest magnitude for float tensors.
    """
    return max(
        max(float(each.steps), 2.0 * (each.differing > TIE_TOLERANCE), each.relative / FLOAT_TOLERANCE)
        for each in local_differences(model, path, images).values()
    )
