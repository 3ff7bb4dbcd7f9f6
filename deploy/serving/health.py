"""Checks whether a Triton server answers correctly. Triton itself reports "ready" even while every request fails.

Imports no large library but NumPy, because :mod:`deploy.probe` runs every few seconds.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from deploy.serving.known_answer import KnownAnswer
from illama.errors import UserError

CONFIG, KNOWN_ANSWER = "config.pbtxt", "known_answer.json"
STUB = "triton_python_backend_stub"  # program that runs a Python model
HEADER = "Inference-Header-Content-Length"
_Read = TypeVar("_Read")
_MAX_SLOWDOWN = 10  # maximum time of a known answer, relative to the time it took when it was created
_BUSY_SHARE = 0.1  # minimum use of a core by a busy model, while an answer is awaited
BUSY_SECONDS = 120  # maximum time without a finished request of a busy model; the largest take half a minute


class UnhealthyError(Exception):
    """A server does not answer correctly; the message says why."""


class LoadingError(UnhealthyError):
    """A model is not loaded yet."""


@dataclass(frozen=True)
class ServedRepository:
    """A repository of :mod:`deploy.serving.repository`, and the server on this machine that serves it.

    Attributes:
        url: URL of the server, such as http://127.0.0.1:8000.
        folder: path to the repository. Its files are read once, because the repository may be replaced while the server
            still serves what it loaded.
        timeout: seconds to wait for an answer, in addition to 10 times the network's own time.
    """

    url: str
    folder: Path
    timeout: float = 3.0
    _known: dict[tuple[str, str], KnownAnswer] = field(default_factory=dict, init=False, compare=False)
    _busy_since: dict[str, float] = field(default_factory=dict, init=False, compare=False)

    def check(self) -> None:
        """Runs all checks; raises UnhealthyError for the first that fails."""
        self.check_models()
        self.check_answers()

    def check_models(self) -> None:
        """Checks that every model is loaded, and that every process of Triton's Python backend is alive.

        Raises:
            LoadingError: a model is being loaded. A polling server does this repeatedly for a model that fails to load.
            UnhealthyError: a check failed; the message contains Triton's reason if there is one.
        """
        # Triton's index of ready models lists the repository's folder, which may have been replaced meanwhile.
        models, ready = self.models, self._read("v2/models/stats", _ready_versions)
        alive = Counter(path.parent.resolve() for _, path in live_backends())
        if missing := [model for model in models if model not in ready]:
            self._say_why(missing)
        for model in models:
            expected = self._read(f"v2/models/{model}/config", _expected_backends)
            for version in ready[model]:
                running = alive[(self.folder / model / version).resolve()]
                if running < expected:
                    raise UnhealthyError(f"{expected - running} of {expected} Python backends of {model} died")

    def check_answers(self) -> None:
        """Checks that every model gives its known answer, or is busy with other requests.

        A model that does not answer in time is busy if it finished other requests meanwhile, or if its processes used
        the CPU.

        Raises:
            UnhealthyError: a model returned an error or another answer; or it did not answer and is not busy, or has
                not finished a request for :data:`BUSY_SECONDS`.
        """
        for model in self.models:
            if f"{model}-network" in self.models:
                self._check_answer(model)

    def is_live(self) -> bool:
        """Whether the server responds, which it does after it has loaded its models or has failed to load them."""
        try:
            ask(self.url, urllib.request.Request(f"{self.url}/v2/health/live"), self.timeout)
        except (UnhealthyError, TimeoutError):
            return False
        return True

    @cached_property
    def models(self) -> list[str]:
        """Names of all models in the repository; raises UnhealthyError if there is none."""
        if found := sorted(path.parent.name for path in self.folder.glob(f"*/{CONFIG}")):
            return found
        raise UnhealthyError(f"{self.folder} has no model: give a repository of python deploy/serve.py")

    def _check_answer(self, model: str) -> None:
        known, before = self._known_answer(model, self._version(model)), self._activity(model)
        try:
            logits = self._infer(model, known)
        except TimeoutError as error:
            if self._was_busy(model, before):
                return
            raise UnhealthyError(f"model {model} does not answer") from error
        self._busy_since.pop(model, None)
        if known.matches(logits):
            return
        # A second request, because the server may have loaded another version or repository in between.
        self._known.clear()
        known = self._known_answer(model, self._version(model))
        if not known.matches(self._infer(model, known)):
            raise UnhealthyError(f"model {model} does not give its known answer")

    def _was_busy(self, model: str, before: tuple[float, int, float]) -> bool:
        now, ended, computed = self._activity(model)
        if ended > before[1]:
            self._busy_since.pop(model, None)
            return True
        since = self._busy_since.setdefault(model, before[0])
        return computed - before[2] > _BUSY_SHARE * (now - before[0]) and now - since < BUSY_SECONDS

    def _version(self, model: str) -> str:
        """Returns the newest loaded version, which answers requests."""
        return self._read(f"v2/models/{model}-network", lambda metadata: max(metadata["versions"], key=int))

    def _known_answer(self, model: str, version: str) -> KnownAnswer:
        if (model, version) not in self._known:
            path = self.folder / f"{model}-network" / version / KNOWN_ANSWER
            try:
                self._known[model, version] = KnownAnswer.read(path)
            except UserError as error:
                if not path.parent.exists():
                    raise LoadingError(f"{path.parent} was deleted, but is still loaded") from error
                raise UnhealthyError(f"cannot read {path}: write the repository again") from error
        return self._known[model, version]

    def _infer(self, model: str, known: KnownAnswer) -> np.ndarray:
        headers = {"Content-Type": "application/octet-stream", HEADER: "0"}
        post = urllib.request.Request(f"{self.url}/v2/models/{model}/infer", known.image, headers)
        body, head = ask(self.url, post, self.timeout + _MAX_SLOWDOWN * known.seconds)
        return np.frombuffer(body[head:], np.float32)

    def _activity(self, model: str) -> tuple[float, int, float]:
        """Returns (time, finished requests of a model and its network, also failed ones, CPU time of its backends)."""
        # Requests of its preprocessing do not count: it also finishes that of the known answer if the network hangs.
        ended = self._read("v2/models/stats", lambda stats: _count_ended(stats, (model, f"{model}-network")))
        folders = [(self.folder / f"{model}{part}").resolve() for part in ("-preprocess", "-network")]
        computed = sum(cpu_seconds(pid) for pid, path in live_backends() if path.parent.parent.resolve() in folders)
        return time.monotonic(), ended, computed

    def _say_why(self, missing: Sequence[str]) -> None:
        """Raises UnhealthyError with Triton's reason why models are not loaded."""
        index = self._read("v2/repository/index", _states, b"")
        states = {model: index.get(model, []) for model in missing}
        for model, each in states.items():
            if reason := next((reason for _, reason in each if reason), None):
                raise UnhealthyError(f"model {model} is not loaded: {' '.join(reason.split())}")
        if loading := next((model for model, each in states.items() for state, _ in each if state == "LOADING"), None):
            raise LoadingError(f"model {loading} is being loaded")
        raise UnhealthyError(f"model {missing[0]} is not loaded: see Triton's log")

    def _read(self, path: str, read: Callable[[Any], _Read], posted: bytes | None = None) -> _Read:
        """Returns ``read(response)`` for the JSON response to a request: a GET if nothing is posted."""
        request = urllib.request.Request(f"{self.url}/{path}", posted)
        try:
            return read(json.loads(ask(self.url, request, self.timeout)[0]))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UnhealthyError(f"the server at {self.url} is not Triton") from error


def ask(url: str, request: urllib.request.Request, timeout: float) -> tuple[bytes, int]:
    """Returns the body of a server's response, and the length of the JSON header in it.

    Args:
        url: the server's address, for messages.
        timeout: seconds.

    Raises:
        TimeoutError: there is no response in time.
        UnhealthyError: there is no server, or it answers with an error.
    """
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.read(), int(answer.headers.get(HEADER, 0))
    except urllib.error.HTTPError as error:
        reason = " ".join(error.read().decode(errors="replace").removeprefix('{"error":"').removesuffix('"}').split())
        raise UnhealthyError(f"{request.full_url}: HTTP status {error.code}, {reason[:300]}") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise TimeoutError from error
        raise UnhealthyError(f"no server at {url}: {error.reason}") from error
    except (ConnectionError, HTTPException) as error:
        raise UnhealthyError(f"no server at {url}: {str(error).strip()}") from error


def _ready_versions(stats: Any) -> dict[str, list[str]]:
    """Returns model -> its loaded versions, from Triton's statistics."""
    versions: dict[str, list[str]] = {}
    for each in stats["model_stats"]:
        versions.setdefault(each["name"], []).append(each["version"])
    return versions


def _states(index: Any) -> dict[str, list[tuple[str, str]]]:
    """Returns model -> (state, reason) of each version, from Triton's index of the repository."""
    states: dict[str, list[tuple[str, str]]] = {}
    for each in index:
        states.setdefault(each["name"], []).append((each.get("state", ""), each.get("reason", "")))
    return states


def _expected_backends(config: Any) -> int:
    """Returns the number of processes of the Python backend for each version of a model."""
    return sum(group["count"] for group in config["instance_group"]) if config.get("backend") == "python" else 0


def _count_ended(stats: Any, models: Sequence[str]) -> int:
    return sum(
        each["inference_stats"][kind]["count"]
        for each in stats["model_stats"]
        if each["name"] in models
        for kind in ("success", "fail")
    )


def cpu_seconds(pid: int) -> float:
    """Returns the CPU time of a process, in user and kernel mode; 0 if the process does not exist."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # fields 14 and 15 of proc(5)


def live_backends() -> Iterator[tuple[int, Path]]:
    """Yields (process id, path of model.py) of each process of the Python backend on this machine."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().split(b"\0")
        except OSError:  # the process ended meanwhile
            continue
        if len(command) > 1 and command[0].endswith(STUB.encode()):
            yield int(path.parent.name), Path(command[1].decode())
