"""Whether a Triton server really answers. Triton itself says "ready" while every request fails on a dead backend.

Imports nothing of this project but :mod:`deploy.known_answer`, and no PyTorch: :mod:`deploy.probe` runs every few
seconds.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np

from deploy.known_answer import KnownAnswer

CONFIG, KNOWN_ANSWER = "config.pbtxt", "known_answer.json"
STUB = "triton_python_backend_stub"  # the process that runs a Python model
_HEADER = "Inference-Header-Content-Length"
_SLOWER = 10  # times that a known answer may take of what it took when it was made


class UnhealthyError(Exception):
    """A server does not answer as it should; the message says what and why."""


class LoadingError(UnhealthyError):
    """A model is not loaded yet."""


@dataclass(frozen=True)
class ServedRepository:
    """A repository of :mod:`deploy.triton_repository`, and the server on this machine that serves it.

    Attributes:
        url: such as http://127.0.0.1:8000.
        folder: the repository.
        timeout: seconds for an answer, beside what the network itself takes.
    """

    url: str
    folder: Path
    timeout: float = 3.0

    def check(self) -> None:
        """All checks; UnhealthyError with the first that fails."""
        self.check_models()
        self.check_answers()

    def check_models(self) -> None:
        """That every model is loaded, and that every process of Triton's Python backend is alive.

        Raises:
            LoadingError: a model is being loaded, as a polling server does again and again with one that fails.
            UnhealthyError: with Triton's own reason, where it gives one.
        """
        models, states, alive = self.models, self._states(), live_backends()
        missing = {model: states.get(model, {}) for model in models if not _ready(states.get(model, {}))}
        for model, versions in missing.items():
            if reason := next((reason for _, reason in versions.values() if reason), None):
                raise UnhealthyError(f"model {model} is not loaded: {' '.join(reason.split())}")
        if loading := [
            model for model, versions in missing.items() for state, _ in versions.values() if state == "LOADING"
        ]:
            raise LoadingError(f"model {loading[0]} is being loaded")
        if missing:
            raise UnhealthyError(f"model {next(iter(missing))} is not loaded: the log of Triton says why")
        for model in models:
            config = self._get(f"v2/models/{model}/config")
            if config.get("backend") != "python":
                continue
            wanted = sum(group["count"] for group in config["instance_group"])
            for version in _ready(states[model]):
                running = alive[(self.folder / model / version).resolve()]
                if running < wanted:
                    raise UnhealthyError(f"{wanted - running} of {wanted} Python backends of {model} died")

    def check_answers(self) -> None:
        """That every model gives its known answer, or is busy with other requests that it does answer.

        Raises:
            UnhealthyError: an error, another answer, or none in time while nothing else was answered.
        """
        for model in self.models:
            if f"{model}-network" in self.models:
                self._check_answer(model)

    def is_live(self) -> bool:
        """Whether the server answers at all, which it does once it has loaded its models or failed to."""
        try:
            self._open(urllib.request.Request(f"{self.url}/v2/health/live"), self.timeout)
        except (UnhealthyError, TimeoutError):
            return False
        return True

    @property
    def models(self) -> list[str]:
        """The names of all models in the repository; UnhealthyError if there is none."""
        if found := sorted(path.parent.name for path in self.folder.glob(f"*/{CONFIG}")):
            return found
        raise UnhealthyError(f"{self.folder} is no repository of python deploy/serve.py: it holds no model")

    def _check_answer(self, model: str) -> None:
        known, answered = self._known(model), self._answered(model)
        try:
            logits = self._infer(model, known)
        except TimeoutError as error:
            if self._answered(model) == answered:
                raise UnhealthyError(f"model {model} does not answer") from error
            return
        # Asked again where it was another version's: one may have been added or taken away in between.
        if not known.matches(logits) and not self._known(model).matches(self._infer(model, known)):
            raise UnhealthyError(f"model {model} gives other logits than it must")

    def _known(self, model: str) -> KnownAnswer:
        """The known answer of the newest version that is loaded, which is the one that answers."""
        versions = self._get(f"v2/models/{model}-network")["versions"]
        path = self.folder / f"{model}-network" / max(versions, key=int) / KNOWN_ANSWER
        try:
            return KnownAnswer.read(path)
        except (OSError, ValueError, TypeError) as error:
            raise UnhealthyError(f"cannot read {path}: write the repository again") from error

    def _infer(self, model: str, known: KnownAnswer) -> np.ndarray:
        headers = {"Content-Type": "application/octet-stream", _HEADER: "0"}
        post = urllib.request.Request(f"{self.url}/v2/models/{model}/infer", known.file, headers)
        body, head = self._open(post, self.timeout + _SLOWER * known.seconds)
        return np.frombuffer(body[head:], np.float32)

    def _answered(self, model: str) -> int:
        stats = self._get(f"v2/models/{model}/stats")["model_stats"]
        return sum(version["inference_stats"]["success"]["count"] for version in stats)

    def _states(self) -> dict[str, dict[str, tuple[str, str]]]:
        """Model -> version -> (state, reason)."""
        post = urllib.request.Request(f"{self.url}/v2/repository/index", b"", method="POST")
        states: dict[str, dict[str, tuple[str, str]]] = {}
        for each in self._json(post):
            version = each.get("version", "")
            states.setdefault(each["name"], {})[version] = (each.get("state", ""), each.get("reason", ""))
        return states

    def _get(self, path: str) -> Any:
        return self._json(urllib.request.Request(f"{self.url}/{path}"))

    def _json(self, request: urllib.request.Request) -> Any:
        try:
            return json.loads(self._open(request, self.timeout)[0])
        except ValueError as error:
            raise UnhealthyError(f"what answers at {self.url} is not Triton") from error

    def _open(self, request: urllib.request.Request, timeout: float) -> tuple[bytes, int]:
        """(body, bytes of it that are a JSON header); TimeoutError where nothing comes in time."""
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.read(), int(answer.headers.get(_HEADER, 0))
        except urllib.error.HTTPError as error:
            reason = " ".join(error.read().decode(errors="replace").split())
            raise UnhealthyError(f"{request.selector} is refused with {error.code}: {reason[:300]}") from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise TimeoutError from error
            raise UnhealthyError(f"no server at {self.url}: {error.reason}") from error
        except (ConnectionError, HTTPException) as error:
            raise UnhealthyError(f"no server at {self.url}: {str(error).strip()}") from error


def _ready(versions: dict[str, tuple[str, str]]) -> list[str]:
    return [version for version, (state, _) in versions.items() if state == "READY"]


def live_backends() -> Counter[Path]:
    """How many processes of the Python backend run on this machine, by the folder of the model's version."""
    found: Counter[Path] = Counter()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile
            continue
        if len(command) > 1 and command[0].endswith(STUB.encode()):
            found[Path(command[1].decode()).parent.resolve()] += 1
    return found
