"""Computes the output for image files with a model that ``python deploy/serve.py`` serves, over HTTP."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from deploy.serving.health import HEADER, UnhealthyError, ask
from illama.bundle import FEATURES
from illama.errors import UserError
from illama.structured_files import read_bytes

_Read = TypeVar("_Read")
_SECONDS, _MAX_BYTES = 60, 1 << 30


class ServedModel:
    """A model on a server.

    Args:
        url: its address, such as ``http://127.0.0.1:8000/v2/models/int8``.

    Attributes:
        name, shape: of the output for an image.

    Raises:
        UserError: there is no such server or model.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        if not self.url.startswith(("http://", "https://")) or "/v2/models/" not in self.url:
            raise UserError(
                f"{url!r} is not the address of a model: give one such as http://127.0.0.1:8000/v2/models/int8"
            )
        self.name, self.shape = self._read(urllib.request.Request(self.url), _output)

    def infer(self, path: Path) -> tuple[np.ndarray, list[str]]:
        """Returns the logits of an image file, and the names of their classes.

        Of a model for features, returns these, and no names.

        Raises:
            UserError: the file cannot be read here or by the server, or the server does not answer.
        """
        content = read_bytes(path, _MAX_BYTES)
        size = {"binary_data_size": len(content)}
        image = {"name": "image", "shape": [1, len(content)], "datatype": "UINT8", "parameters": size}
        form = {"binary_data": False} if self.name == FEATURES else {"classification": self.shape[-1]}
        wanted = {"name": self.name, "parameters": form}
        head = json.dumps({"inputs": [image], "outputs": [wanted]}).encode()
        headers = {"Content-Type": "application/octet-stream", HEADER: str(len(head))}
        request = urllib.request.Request(f"{self.url}/infer", head + content, headers)
        return self._read(request, self._answer, f"{path}: ")

    def _answer(self, answer: Any) -> tuple[np.ndarray, list[str]]:
        if self.name != FEATURES:
            return _in_order(answer)
        return np.array(answer["outputs"][0]["data"], np.float32).reshape(self.shape), []

    def _read(self, request: urllib.request.Request, read: Callable[[Any], _Read], about: str = "") -> _Read:
        """Returns ``read(response)`` for the JSON response to a request; ``about`` begins the message of an error."""
        try:
            return read(json.loads(ask(self.url, request, _SECONDS)[0]))
        except (UnhealthyError, TimeoutError) as error:
            raise UserError(about + (str(error) or f"no answer from {self.url} within {_SECONDS} seconds")) from error
        except (ValueError, TypeError, LookupError) as error:
            raise UserError(f"{self.url} is no model of python deploy/serve.py") from error


def _output(model: Any) -> tuple[str, tuple[int, ...]]:
    """Returns the name and the shape for an image of a model's output."""
    output = model["outputs"][0]
    return str(output["name"]), tuple(map(int, output["shape"][1:]))


def _in_order(answer: Any) -> tuple[np.ndarray, list[str]]:
    """Returns logits and names from Triton's entries LOGIT:INDEX:NAME, in the order of the indices."""
    entries = sorted((text.split(":", 2) for text in answer["outputs"][0]["data"]), key=lambda entry: int(entry[1]))
    return np.array([float(logit) for logit, _, _ in entries], np.float32), [name for _, _, name in entries]
