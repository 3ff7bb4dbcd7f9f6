"""Classifies image files with a model that ``python deploy/serve.py`` serves, over HTTP."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from deploy.serving.health import HEADER, UnhealthyError, ask
from illama.errors import UserError
from illama.structured_files import read_bytes

_Read = TypeVar("_Read")
_SECONDS, _MAX_BYTES = 60, 1 << 30


class ServedModel:
    """A model on a server.

    Args:
        url: its address, such as ``http://127.0.0.1:8000/v2/models/int8``.

    Attributes:
        classes: the number of classes.

    Raises:
        UserError: there is no such server or model.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        if not self.url.startswith(("http://", "https://")) or "/v2/models/" not in self.url:
            raise UserError(
                f"{url!r} is not the address of a model: give one such as http://127.0.0.1:8000/v2/models/int8"
            )
        self.classes = self._read(urllib.request.Request(self.url), lambda model: int(model["outputs"][0]["shape"][-1]))

    def infer(self, path: Path) -> tuple[np.ndarray, list[str]]:
        """Returns the logits of an image file in descending order, and the names of their classes.

        Raises:
            UserError: the file cannot be read here or by the server, or the server does not answer.
        """
        content = read_bytes(path, _MAX_BYTES)
        size = {"binary_data_size": len(content)}
        image = {"name": "image", "shape": [1, len(content)], "datatype": "UINT8", "parameters": size}
        wanted = {"name": "logits", "parameters": {"classification": self.classes}}
        head = json.dumps({"inputs": [image], "outputs": [wanted]}).encode()
        headers = {"Content-Type": "application/octet-stream", HEADER: str(len(head))}
        return self._read(urllib.request.Request(f"{self.url}/infer", head + content, headers), _in_order, f"{path}: ")

    def _read(self, request: urllib.request.Request, read: Callable[[Any], _Read], about: str = "") -> _Read:
        """Returns ``read(response)`` for the JSON response to a request; ``about`` begins the message of an error."""
        try:
            return read(json.loads(ask(self.url, request, _SECONDS)[0]))
        except (UnhealthyError, TimeoutError) as error:
            raise UserError(about + (str(error) or f"no answer from {self.url} within {_SECONDS} seconds")) from error
        except (ValueError, TypeError, LookupError) as error:
            raise UserError(f"{self.url} is no model of python deploy/serve.py") from error


def _in_order(answer: Any) -> tuple[np.ndarray, list[str]]:
    """Returns logits and names from Triton's entries LOGIT:INDEX:NAME, which are in descending order."""
    entries = [text.split(":", 2) for text in answer["outputs"][0]["data"]]
    return np.array([float(logit) for logit, _, _ in entries], np.float32), [name for _, _, name in entries]
