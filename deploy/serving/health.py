"""Whether a Triton server really answers. Triton itself says "ready" while every request fails on a dead backend.

Imports nothing of this project but :mod:`deploy.serving.known_answer`, and no PyTorch: :mod:`deploy.probe` runs every
few seconds.
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

CONFIG, KNOWN_ANSWER = "config.pbtxt", "known_answer.json"
STUB = "triton_python_backend_stub"  # the process that runs a Python model
_HEADER = "Inference-Header-Content-Length"
_Read = TypeVar("_Read")
_SLOWER = 10  # times that a known answer may take of what it took when it was made
_BUSY_SHARE = 0.1  # of a core, over the time that an answer was waited for
BUSY_SECONDS = 120  # that a server may compute without ending a request; the largest ones take half a minute


class UnhealthyError(Exception):
    """A server does not answer as it should; the message says what and why."""


class LoadingError(UnhealthyError):
    """A model is not loaded yet."""


@dataclass(frozen=True)
class ServedRepository:
    """A repository of :mod:`deploy.serving.repository`, and the server on this machine that serves it.

    Attributes:
        url: such as http://127.0.0.1:8000.
        folder: the repository. What was read of it once is not read again, for it may be written anew under a server
            that holds what it loaded.
        timeout: seconds for an answer, beside what the network itself takes.
    """

    url: str
    folder: Path
    timeout: float = 3.0
    _known: dict[tuple[str, str], KnownAnswer] = field(default_factory=dict, init=False, compare=False)
    _busy_since: dict[str, float] = field(default_factory=dict, init=False, compare=False)

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
        # Not Triton's index of what is ready: it lists the repository's folder, which may have been written anew.
        models, ready = self.models, self._read(self._get("v2/models/stats"), _ready_versions)
        alive = Counter(path.parent.resolve() for _, path in live_backends())
        if missing := [model for model in models if model not in ready]:
            self._say_why(missing)
        for model in models:
            wanted = self._read(self._get(f"v2/models/{model}/config"), _wanted_backends)
            for version in ready[model]:
                running = alive[(self.folder / model / version).resolve()]
                if running < wanted:
                    raise UnhealthyError(f"{wanted - running} of {wanted} Python backends of {model} died")

    def check_answers(self) -> None:
        """That every model gives its known answer, or is busy with other requests.

        It is busy where requests of others ended while the known answer did not come, or where its processes computed.

        Raises:
            UnhealthyError: an error, another answer, or none in time while nothing was done, or when nothing has ended
                for :data:`BUSY_SECONDS`.
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

    @cached_property
    def models(self) -> list[str]:
        """The names of all models in the repository; UnhealthyError if there is none."""
        if found := sorted(path.parent.name for path in self.folder.glob(f"*/{CONFIG}")):
            return found
        raise UnhealthyError(f"{self.folder} is no repository of python deploy/serve.py: it holds no model")

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
        # Asked again: a version, or the repository, may have been loaded anew in between.
        self._known.clear()
        known = self._known_answer(model, self._version(model))
        if not known.matches(self._infer(model, known)):
            raise UnhealthyError(f"model {model} gives other logits than it must")

    def _was_busy(self, model: str, before: tuple[float, int, float]) -> bool:
        now, ended, computed = self._activity(model)
        if ended > before[1]:
            self._busy_since.pop(model, None)
            return True
        since = self._busy_since.setdefault(model, before[0])
        return computed - before[2] > _BUSY_SHARE * (now - before[0]) and now - since < BUSY_SECONDS

    def _version(self, model: str) -> str:
        """The newest version that is loaded, which is the one that answers."""
        return self._read(self._get(f"v2/models/{model}-network"), lambda facts: max(facts["versions"], key=int))

    def _known_answer(self, model: str, version: str) -> KnownAnswer:
        if (model, version) not in self._known:
            path = self.folder / f"{model}-network" / version / KNOWN_ANSWER
            try:
                self._known[model, version] = KnownAnswer.read(path)
            except (OSError, ValueError, TypeError) as error:
                if not path.parent.exists():
                    raise LoadingError(f"{path.parent} is gone, and still loaded") from error
                raise UnhealthyError(f"cannot read {path}: write the repository again") from error
        return self._known[model, version]

    def _infer(self, model: str, known: KnownAnswer) -> np.ndarray:
        headers = {"Content-Type": "application/octet-stream", _HEADER: "0"}
        post = urllib.request.Request(f"{self.url}/v2/models/{model}/infer", known.file, headers)
        body, head = self._open(post, self.timeout + _SLOWER * known.seconds)
        return np.frombuffer(body[head:], np.float32)

    def _activity(self, model: str) -> tuple[float, int, float]:
        """(now, requests that it or its network has answered, also with an error, processor time of its backends)."""
        # Not those of its preprocessing, which answers the known picture too while the network hangs.
        ended = self._read(self._get("v2/models/stats"), lambda stats: _count_ended(stats, (model, f"{model}-network")))
        folders = [(self.folder / f"{model}{part}").resolve() for part in ("-preprocess", "-network")]
        computed = sum(cpu_seconds(pid) for pid, path in live_backends() if path.parent.parent.resolve() in folders)
        return time.monotonic(), ended, computed

    def _say_why(self, missing: Sequence[str]) -> None:
        """Raise what Triton tells of models that are not loaded."""
        index = self._read(urllib.request.Request(f"{self.url}/v2/repository/index", b""), _states)
        states = {model: index.get(model, []) for model in missing}
        for model, each in states.items():
            if reason := next((reason for _, reason in each if reason), None):
                raise UnhealthyError(f"model {model} is not loaded: {' '.join(reason.split())}")
        if loading := next((model for model, each in states.items() for state, _ in each if state == "LOADING"), None):
            raise LoadingError(f"model {loading} is being loaded")
        raise UnhealthyError(f"model {missing[0]} is not loaded: the log of Triton says why")

    def _get(self, path: str) -> urllib.request.Request:
        return urllib.request.Request(f"{self.url}/{path}")

    def _read(self, request: urllib.request.Request, read: Callable[[Any], _Read]) -> _Read:
        """What ``read`` makes of the JSON that answers a request."""
        try:
            return read(json.loads(self._open(request, self.timeout)[0]))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
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


def _ready_versions(stats: Any) -> dict[str, list[str]]:
    """Model -> its versions that are loaded, of Triton's statistics."""
    versions: dict[str, list[str]] = {}
    for each in stats["model_stats"]:
        versions.setdefault(each["name"], []).append(each["version"])
    return versions


def _states(index: Any) -> dict[str, list[tuple[str, str]]]:
    """Model -> (state, reason) of each version, of Triton's index of a repository."""
    states: dict[str, list[tuple[str, str]]] = {}
    for each in index:
        states.setdefault(each["name"], []).append((each.get("state", ""), each.get("reason", "")))
    return states


def _wanted_backends(config: Any) -> int:
    """How many processes of the Python backend run each version of a model."""
    return sum(group["count"] for group in config["instance_group"]) if config.get("backend") == "python" else 0


def _count_ended(stats: Any, models: Sequence[str]) -> int:
    return sum(
        each["inference_stats"][kind]["count"]
        for each in stats["model_stats"]
        if each["name"] in models
        for kind in ("success", "fail")
    )


def cpu_seconds(pid: int) -> float:
    """Processor time of a process, in user and in kernel mode; 0 if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # fields 14 and 15 of proc(5)


def live_backends() -> Iterator[tuple[int, Path]]:
    """The processes of the Python backend on this machine: (process id, path of the model.py that it runs)."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile
            continue
        if len(command) > 1 and command[0].endswith(STUB.encode()):
            yield int(path.parent.name), Path(command[1].decode())
