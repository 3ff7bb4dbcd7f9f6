"""Fault injection for a served bundle: many simultaneous requests, some of them broken, and a killed backend.

The server is ``python deploy/serve.py --run``, restarted whenever it ends with an error, as by systemd or Kubernetes.
Every request is counted as answered correctly, answered with another class, rejected, or lost. A broken request must be
rejected as the client's error, and a good one must never be.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from serve_client import MODEL, TIMEOUT, Question, free_ports, is_wrong

from deploy.serving.health import ServedRepository, UnhealthyError, live_backends
from deploy.serving.model_config import ENCODED
from deploy.serving.serving_options import ListenOptions
from illama.bundle import OUTPUT
from illama.errors import UserError
from illama.markdown_table import markdown

BROKEN_EVERY = 5
READY_SECONDS = 120
_SERVE = Path(__file__).parents[1] / "deploy" / "serve.py"


@dataclass(frozen=True)
class Faults:
    """The outcome of the requests and of the server.

    Attributes:
        good: number of good requests.
        broken: number of broken requests.
        answered: good requests with a correct response.
        wrong: good requests with another class.
        lost: good requests without a response.
        refused: broken requests that were rejected as the client's error.
        broken_lost: broken requests without a response.
        mistaken: good requests that were rejected, and broken ones that were answered.
        noticed_seconds: seconds from the kill to the end of the command.
        recovered_seconds: seconds from the kill to the first correct response.
    """

    good: int
    broken: int
    answered: int
    wrong: int
    lost: int
    refused: int
    broken_lost: int
    mistaken: int
    noticed_seconds: float
    recovered_seconds: float

    def table(self) -> str:
        """Returns a Markdown table."""
        row = [
            self.good,
            self.answered,
            self.lost,
            self.wrong,
            self.broken,
            self.refused,
            self.broken_lost,
            self.mistaken,
            f"{self.noticed_seconds:.1f}",
            f"{self.recovered_seconds:.1f}",
        ]
        heading = [
            "good requests",
            "answered rightly",
            "lost",
            "wrong",
            "broken requests",
            "refused",
            "broken lost",
            "mistaken",
            "noticed after s",
            "answers again after s",
        ]
        return markdown(heading, [list(map(str, row))])


class Supervisor:
    """Runs the command on a repository, and restarts it whenever it ends."""

    def __init__(self, repository: Path, listen: ListenOptions, log: Path) -> None:
        ports = [f"--{kind}-port={getattr(listen, f'{kind}_port')}" for kind in ("http", "grpc", "metrics")]
        self._command = [sys.executable, str(_SERVE), "--out", str(repository), "--run", *ports]
        self._log, self._stopping = log, threading.Event()
        self.ends: list[float] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            with self._log.open("ab") as messages:
                self._process = subprocess.Popen(self._command, stdout=messages, stderr=messages)
                self._process.wait()
            self.ends.append(time.monotonic())
            self._stopping.wait(0.1)

    def stop(self) -> None:
        self._stopping.set()
        while self._thread.is_alive():  # it may just be starting another process
            if self._process:
                self._process.terminate()
            self._thread.join(0.5)


@contextmanager
def supervised(repository: Path, listen: ListenOptions, log: Path) -> Iterator[Supervisor]:
    """Yields a supervised server that is healthy; raises UserError if it does not become healthy."""
    supervisor = Supervisor(repository, listen, log)
    try:
        wait_until_healthy(repository, listen)
        yield supervisor
    finally:
        supervisor.stop()


def wait_until_healthy(repository: Path, listen: ListenOptions) -> float:
    """Returns the time at which the server gives its known answers; raises UserError if that takes too long."""
    served, end = ServedRepository(listen.url, repository), time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        try:
            served.check()
            return time.monotonic()
        except (UnhealthyError, TimeoutError):
            time.sleep(0.1)
    raise UserError(f"the server was not healthy within {READY_SECONDS} s: see its log")


def kill_backend(version: Path) -> float:
    """Kills the process of a model version with SIGKILL, and returns the time."""
    for process, path in live_backends():
        if path.parent.resolve() == version.resolve():
            os.kill(process, signal.SIGKILL)
            return time.monotonic()
    raise UserError(f"no process runs {version}: see the server's log")


def send_all(url: str, files: Sequence[bytes]) -> list[Any]:
    """Sends all requests at once over gRPC; returns the logits (classes,) of each, or its error."""
    import tritonclient.grpc as triton

    answers: list[Any] = [None] * len(files)
    left = threading.Semaphore(0)

    def keep(index: int, result: Any, error: Any) -> None:
        try:
            answers[index] = error if error is not None else result.as_numpy(OUTPUT)[0]
        finally:
            left.release()

    with triton.InferenceServerClient(url) as client:
        for index, file in enumerate(files):
            request = triton.InferInput(ENCODED, [1, len(file)], "UINT8")
            request.set_data_from_numpy(np.frombuffer(file, np.uint8)[None])
            client.async_infer(
                MODEL, [request], lambda result, error, index=index: keep(index, result, error), client_timeout=TIMEOUT
            )
        for _ in files:
            left.acquire()
    return answers


def measure_faults(repository: Path, questions: Sequence[Question], requests: int, log: Path) -> Faults:
    """Sends many requests at once, every fifth of them broken, and kills the network's backend meanwhile.

    Raises:
        UserError: the server does not recover.
    """
    listen = free_ports()
    asked = [questions[index % len(questions)] for index in range(requests)]
    files = [q.file[: len(q.file) // 2] if index % BROKEN_EVERY == 0 else q.file for index, q in enumerate(asked)]
    with supervised(repository, listen, log) as supervisor:
        answers: list[Any] = []
        sender = threading.Thread(target=lambda: answers.extend(send_all(f"127.0.0.1:{listen.grpc_port}", files)))
        sender.start()
        time.sleep(0.5)  # so that some requests are answered and others are in progress
        killed = kill_backend(repository / f"{MODEL}-network" / "1")
        sender.join()
        recovered = wait_until_healthy_again(supervisor, repository, listen)
        noticed = supervisor.ends[0]
    return judge(asked, answers, noticed - killed, recovered - killed)


def wait_until_healthy_again(supervisor: Supervisor, repository: Path, listen: ListenOptions) -> float:
    """Returns the time at which a restarted server is healthy, after the killed one has ended."""
    end = time.monotonic() + READY_SECONDS
    while not supervisor.ends and time.monotonic() < end:
        time.sleep(0.05)
    if not supervisor.ends:
        raise UserError("the command did not end after a backend was killed: see its log")
    return wait_until_healthy(repository, listen)


def judge(asked: Sequence[Question], answers: Sequence[Any], noticed: float, recovered: float) -> Faults:
    """Counts the outcomes of the requests."""
    counts: Counter[tuple[bool, str]] = Counter()
    for index, (question, answer) in enumerate(zip(asked, answers, strict=True)):
        if isinstance(answer, np.ndarray):
            kind = "wrong" if is_wrong(answer, question.logits) else "answered"
        else:
            kind = "refused" if "INVALID_ARGUMENT" in str(answer.status()) else "lost"
        counts[index % BROKEN_EVERY == 0, kind] += 1
    good, broken = (
        sum(count for (is_broken, _), count in counts.items() if is_broken == each) for each in (False, True)
    )
    mistaken = counts[False, "refused"] + counts[True, "answered"] + counts[True, "wrong"]
    return Faults(
        good,
        broken,
        counts[False, "answered"],
        counts[False, "wrong"],
        counts[False, "lost"],
        counts[True, "refused"],
        counts[True, "lost"],
        mistaken,
        noticed,
        recovered,
    )
