"""What runs inside Triton's Python backend: a bundle's own preprocessing, and its ONNX file.

A model's ``model.py`` in a repository of :mod:`deploy.triton_repository` names one of these classes and holds nothing
else, so that what is served is the code that was measured. The machine needs this toolkit installed.
"""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as triton  # Triton's, and there only inside its Python backend

from deploy.engines import OnnxRuntimeEngine
from illama.accuracy import usable_cores
from illama.bundle import CPU_ONNX
from illama.data import Preprocessing
from illama.errors import UserError
from illama.images import decode_image


class Preprocess:
    """JPEG or PNG files (B, bytes) uint8, zeros after the shorter ones -> the network's input (B, C, H, W) float32."""

    def initialize(self, args: dict[str, str]) -> None:
        """``args`` are Triton's; the config's parameter ``preprocessing`` is the bundle's, in JSON."""
        torch.set_num_threads(1)  # an image is too little work to share out, and the cores are the network's
        config = json.loads(args["model_config"])
        self._input, self._output = config["input"][0]["name"], config["output"][0]["name"]
        given = json.loads(config["parameters"]["preprocessing"]["string_value"])
        self._preprocessing = Preprocessing.from_dict(given)
        self._transform = self._preprocessing.transform()

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request; an image that cannot be read fails its own request alone."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            images = [self._read(file, index) for index, file in enumerate(_array(request, self._input))]
        except UserError as error:
            return triton.InferenceResponse([], triton.TritonError(str(error)))
        return _response(self._output, np.stack(images))

    def _read(self, file: np.ndarray, index: int) -> np.ndarray:
        image = decode_image(
            BytesIO(file.tobytes()), lambda: f"number {index} of the request", self._preprocessing.exif
        )
        return self._transform(image).numpy()


class OnnxNetwork:
    """A network's input (B, C, H, W) float32 -> logits (B, classes) float32, by ONNX Runtime on the CPU."""

    def initialize(self, args: dict[str, str]) -> None:
        """``args`` are Triton's. Its instances share out the cores."""
        config = json.loads(args["model_config"])
        self._input, self._output = config["input"][0]["name"], config["output"][0]["name"]
        threads = max(1, usable_cores() // config["instance_group"][0]["count"])
        self._engine = OnnxRuntimeEngine(Path(args["model_repository"]) / args["model_version"] / CPU_ONNX, threads)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request; all of them are one call of ONNX Runtime."""
        batches = [_array(request, self._input) for request in requests]
        logits = self._engine.infer(np.concatenate(batches))
        ends = np.cumsum([len(batch) for batch in batches])
        return [_response(self._output, part) for part in np.split(logits, ends[:-1])]


# Arrays cross over by DLPack. Triton's own conversion is for the numpy that it was built with: under numpy 2 that of
# Triton 2.51 repeats a tensor's first byte, and a tensor of strings, converted unasked, ends the process.
def _array(request: Any, name: str) -> np.ndarray:
    return np.from_dlpack(triton.get_input_tensor_by_name(request, name))


def _response(name: str, array: np.ndarray) -> Any:
    # By way of torch: Triton renames the capsule to something that numpy, when it goes, complains of in the log.
    return triton.InferenceResponse([triton.Tensor.from_dlpack(name, torch.from_numpy(array))])
