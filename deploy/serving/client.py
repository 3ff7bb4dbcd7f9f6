"""Classifies image files with a model that ``python deploy/serve.py`` serves, over HTTP."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np

from illama.errors import UserError
from illama.structured_files import read_bytes

_HEADER = "Inference-Header-Content-Length"
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
            raise UserError(f"{url!r} is no address of a model: give one such as http://127.0.0.1:8000/v2/models/int8")
        self.classes = int(self._read(urllib.request.Request(self.url))["outputs"][0]["shape"][-1])

    def infer(self, path: Path) -> tuple[np.ndarray, list[str]]:
        """Returns the logits of an image file in descending order, and the names of their classes.

        Raises:
            UserError: the file cannot be read here or by the server, or the server does not answer.
        """
        content = read_bytes(path, _MAX_BYTES)
        image: dict[str, Any] = {"name": "image", "shape": [1, len(content)], "datatype": "UINT8"}
        wanted = {"name": "logits", "parameters": {"classification": self.classes}}
        image["parameters"] = {"binary_data_size": len(content)}
        head = json.dumps({"inputs": [image], "outputs": [wanted]}).encode()
        headers = {"Content-Type": "application/octet-stream", _HEADER: str(len(head))}
        answer = self._read(urllib.request.Request(f"{self.url}/infer", head + content, headers))
        # Each entry is LOGIT:INDEX:NAME, in descending order.
        entries = [text.split(":", 2) for text in answer["outputs"][0]["data"]]
        return np.array([float(logit) for logit, *_ in entries], np.float32), [name for *_, name in entries]

    def _read(self, request: urllib.request.Request) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            reason = " ".join(error.read().decode(errors="replace").split())
            raise UserError(f"{self.url} answers with HTTP status {error.code}: {reason}") from error
        except (OSError, HTTPException, ValueError) as error:  # no server, or another than Triton
            raise UserError(f"no Triton server answers at {self.url}: {getattr(error, 'reason', error)}") from error
