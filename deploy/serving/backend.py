"""What runs inside Triton's Python backend: a bundle's own preprocessing, and its network in a runtime of this toolkit.

A model's ``model.py`` in a repository of :mod:`deploy.serving.repository` names one of these classes and holds nothing
else, so that what is served is the code that was measured. The machine needs this toolkit installed.

A fault of one request is that request's alone: an image that cannot be read is a mistake of the client (HTTP 400),
anything else one of the server (500), and the other requests of the batch are answered.
"""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as triton  # Triton's, and there only inside its Python backend

from deploy.runtimes.image_input import ImageInput
from deploy.runtimes.open_engine import open_engine
from deploy.runtimes.recommended_runtime import RuntimeChoice
from illama.errors import UserError
from illama.inference import usable_cores


class Preprocess:
    """Image files (B, bytes) uint8, zeros after the shorter ones -> the network's input (B, ...)."""

    def initialize(self, args: dict[str, str]) -> None:
        """``args`` are Triton's; the parameter ``preprocessing`` is JSON of :mod:`deploy.serving.model_config`."""
        torch.set_num_threads(1)  # an image is too little work to share out, and the cores are the network's
        config = json.loads(args["model_config"])
        self._input, self._output = config["input"][0]["name"], config["output"][0]["name"]
        facts = json.loads(config["parameters"]["preprocessing"]["string_value"])
        self._takes = ImageInput.from_dict(facts["input"])
        self._max_bytes, self._max_pixels = facts["max_bytes"], facts["max_pixels"]

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            files = _array(request, self._input)
            return _response(self._output, np.stack([self._read(file, index) for index, file in enumerate(files)]))
        except Exception as error:  # of any kind: raised on, it would fail the other requests too
            return _failure(error)

    def _read(self, file: np.ndarray, index: int) -> np.ndarray:
        if file.size > self._max_bytes:
            raise UserError(f"an image file has at most {self._max_bytes} bytes here, number {index} has {file.size}")
        return self._takes.read(BytesIO(file.tobytes()), lambda: f"number {index} of the request", self._max_pixels)


class Network:
    """A network's input (B, ...) -> logits (B, classes) float32, on the CPU."""

    def initialize(self, args: dict[str, str]) -> None:
        """``args`` are Triton's. Its instances share out the cores."""
        config = json.loads(args["model_config"])
        self._input, self._output = config["input"][0]["name"], config["output"][0]["name"]
        threads = max(1, usable_cores() // config["instance_group"][0]["count"])
        choice = RuntimeChoice.read(Path(args["model_repository"]) / args["model_version"])
        self._engine = open_engine(choice.file, choice.runtime, threads)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request; all of them are one call of the runtime."""
        batches = [_array(request, self._input) for request in requests]
        try:
            logits = self._engine.infer(np.concatenate(batches))
        except Exception as error:  # a runtime's exceptions share no other base class
            if len(batches) == 1:
                return [_failure(error)]
            return [response for request in requests for response in self.execute([request])]
        ends = np.cumsum([len(batch) for batch in batches])
        return [self._checked(part) for part in np.split(logits, ends[:-1])]

    def _checked(self, logits: np.ndarray) -> Any:
        if not np.isfinite(logits).all():
            return _failure(ArithmeticError("the network's logits are not finite"))
        return _response(self._output, logits)


# Arrays cross over by DLPack. Triton's own conversion is for the numpy that it was built with: under numpy 2 that of
# Triton 2.51 repeats a tensor's first byte, and a tensor of strings, converted unasked, ends the process.
def _array(request: Any, name: str) -> np.ndarray:
    return np.from_dlpack(triton.get_input_tensor_by_name(request, name))


def _response(name: str, array: np.ndarray) -> Any:
    # Triton takes contiguous arrays only. By way of torch: Triton renames the capsule to something that numpy, when it
    # goes, complains of in the log.
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return triton.InferenceResponse([triton.Tensor.from_dlpack(name, tensor)])


def _failure(error: Exception) -> Any:
    """An answer with the error alone: the client's mistake, or the server's."""
    if isinstance(error, UserError):
        return triton.InferenceResponse([], triton.TritonError(str(error), triton.TritonError.INVALID_ARG))
    triton.Logger.log_error(f"{type(error).__name__}: {error}")
    return triton.InferenceResponse([], triton.TritonError(f"{type(error).__name__}: {error}"))
