"""Models for Triton's Python backend: a bundle's preprocessing, and its network in a runtime of this toolkit.

A ``model.py`` in a repository of :mod:`deploy.serving.repository` only imports one of these classes, so that the served
code is the code that was benchmarked. This toolkit must be installed on the server's machine.

An error in one request does not affect the others of its batch: an image that cannot be read is a client error (HTTP
400), any other error is a server error (HTTP 500).
"""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as triton  # exists only inside Triton's Python backend

from deploy.runtimes.open_engine import load_engine
from deploy.runtimes.recommended_runtime import RuntimeChoice
from deploy.runtimes.verification import verify
from deploy.serving.model_config import PreprocessParameters
from illama.errors import UserError
from illama.hardware import usable_cores
from illama.structured_files import parse_json


class Preprocess:
    """Image files (B, bytes) uint8, padded with zeros -> the network's input (B, ...)."""

    def initialize(self, args: dict[str, str]) -> None:
        """Called by Triton; the parameter ``preprocessing`` is JSON of :mod:`deploy.serving.model_config`."""
        torch.set_num_threads(1)  # one image is too little work for more threads
        config = json.loads(args["model_config"])
        self._input, self._output = config["input"][0]["name"], config["output"][0]["name"]
        text = config["parameters"]["preprocessing"]["string_value"]
        self._parameters = parse_json(text, PreprocessParameters, "the parameter preprocessing")

    def execute(self, requests: list[Any]) -> list[Any]:
        """Returns one response for each request."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            files = _array(request, self._input)
            return _response(self._output, np.stack([self._read(file, index) for index, file in enumerate(files)]))
        except Exception as error:  # if raised, it would fail the other requests too
            return _failure(error)

    def _read(self, file: np.ndarray, index: int) -> np.ndarray:
        limits = self._parameters
        if file.size > limits.max_bytes:
            raise UserError(f"image file number {index} has {file.size} bytes, the maximum is {limits.max_bytes}")
        return limits.input.read(BytesIO(file.tobytes()), lambda: f"number {index} of the request", limits.max_pixels)


class Network:
    """A network's input (B, ...) -> its output (B, ...) float32, on the CPU."""

    def initialize(self, args: dict[str, str]) -> None:
        """Called by Triton. The instances of the model share the cores."""
        config = json.loads(args["model_config"])
        self._input, self._output = config["input"][0]["name"], config["output"][0]["name"]
        threads = max(1, usable_cores() // config["instance_group"][0]["count"])
        choice = RuntimeChoice.read(Path(args["model_repository"]) / args["model_version"])
        self._engine = load_engine(choice.file, choice.runtime, threads)
        if not choice.unverified:
            # The outcome is not stored: a new file in this folder would make a polling server load the model again.
            verify(self._engine, choice.file, remember=False)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Returns one response for each request; the requests are computed as one batch."""
        batches = [_array(request, self._input) for request in requests]
        try:
            output = self._engine.infer(np.concatenate(batches))
        except Exception as error:  # the runtimes' exceptions have no other common base class
            if len(batches) == 1:
                return [_failure(RuntimeError(str(error)))]  # Triton has checked the shape: no client error
            return [response for request in requests for response in self.execute([request])]
        ends = np.cumsum([len(batch) for batch in batches])
        return [self._checked(part) for part in np.split(output, ends[:-1])]

    def _checked(self, output: np.ndarray) -> Any:
        if not np.isfinite(output).all():
            return _failure(ArithmeticError("the network's output is not finite"))
        return _response(self._output, output)


# Arrays are passed by DLPack. Triton's own conversion requires the numpy with which it was built: with numpy 2, that of
# Triton 2.51 repeats a tensor's first byte, and ends the process for a tensor of strings, even without being called.
def _array(request: Any, name: str) -> np.ndarray:
    return np.from_dlpack(triton.get_input_tensor_by_name(request, name))


def _response(name: str, array: np.ndarray) -> Any:
    # Triton takes contiguous arrays only. They are converted to PyTorch tensors, because Triton renames the capsule, of
    # which numpy complains in the log when it deletes the capsule.
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return triton.InferenceResponse([triton.Tensor.from_dlpack(name, tensor)])


def _failure(error: Exception) -> Any:
    """Returns a response with an error, of the client for a UserError, else of the server."""
    if isinstance(error, UserError):
        return triton.InferenceResponse([], triton.TritonError(str(error), triton.TritonError.INVALID_ARG))
    triton.Logger.log_error(f"{type(error).__name__}: {error}")
    return triton.InferenceResponse([], triton.TritonError(f"{type(error).__name__}: {error}"))
