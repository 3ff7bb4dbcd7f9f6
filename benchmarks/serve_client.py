"""Clients of a served bundle: their requests, and the comparison of the responses with the expected logits."""

from __future__ import annotations

import io
import itertools
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import to_pil_image

from deploy.runtimes.image_input import ImageInput
from deploy.runtimes.names import RuntimeName
from deploy.runtimes.open_engine import open_engine
from deploy.runtimes.recommended_runtime import recommend_runtime
from deploy.serving.model_config import ENCODED
from deploy.serving.serving_options import ListenOptions
from illama.bundle import OUTPUT
from illama.data.datasets import Sample
from illama.manifest import Manifest

MODEL = "served"
SETTLE = 20  # warm-up requests of each client, which are not timed
TIMEOUT = 60  # seconds after which a request counts as lost


@dataclass(frozen=True)
class Question:
    """An image file and its expected logits (classes,)."""

    file: bytes
    logits: np.ndarray


@dataclass
class Answers:
    """The responses to one or more clients.

    Attributes:
        seconds: duration of each request.
        lost: number of requests without a response.
        wrong: number of responses with a class that is not the engine's (:func:`is_wrong`).
        difference: largest absolute difference of a logit.
    """

    seconds: list[float]
    lost: int = 0
    wrong: int = 0
    difference: float = 0.0


def read_questions(
    split: Dataset[Sample], count: int, bundle: Path, runtime: RuntimeName | None = None
) -> list[Question]:
    """Returns the first ``count`` images of a split as PNG files, with the engine's logits at batch size 1."""
    takes, choice = ImageInput.of(Manifest.read(bundle)), recommend_runtime(bundle, runtime)
    engine = open_engine(choice.file, choice.runtime)
    questions = []
    for index in range(min(count, len(split))):  # type: ignore[arg-type]
        file = as_png(split[index][0])
        image = takes.read(io.BytesIO(file), lambda: "of the test split")
        questions.append(Question(file, engine.infer(image[None])[0]))
    return questions


def as_png(image: Image.Image | torch.Tensor) -> bytes:
    """Returns an image of a data set as a PNG file."""
    file = io.BytesIO()
    (to_pil_image(image) if isinstance(image, torch.Tensor) else image).save(file, "PNG")
    return file.getvalue()


def is_wrong(logits: np.ndarray, expected: np.ndarray) -> bool:
    """Returns whether logits (classes,) have another class than the engine's; a tie within 2% is not wrong.

    In bfloat16, an image can be rounded differently in a batch than alone.
    """
    return bool(expected.max() - expected[logits.argmax()] > 0.02 * np.abs(expected).max())


class Client:
    """A client with its own connection, which records the responses."""

    def __init__(self, url: str) -> None:
        import tritonclient.grpc as triton

        self._triton, self._connection, self.answers = triton, triton.InferenceServerClient(url), Answers([])

    def ask(self, question: Question) -> None:
        """Sends an image, waits for its logits, and compares them."""
        file = np.frombuffer(question.file, np.uint8)[None]
        request = self._triton.InferInput(ENCODED, file.shape, "UINT8")
        request.set_data_from_numpy(file)
        start = time.perf_counter()
        try:
            logits = self._connection.infer(MODEL, [request], client_timeout=TIMEOUT).as_numpy(OUTPUT)[0]
        except self._triton.InferenceServerException:
            self.answers.lost += 1
            return
        self.answers.seconds.append(time.perf_counter() - start)
        self.answers.wrong += int(is_wrong(logits, question.logits))
        self.answers.difference = max(self.answers.difference, float(np.abs(logits - question.logits).max()))

    def run(self, questions: Sequence[Question], seconds: float, together: threading.Barrier) -> Answers:
        """Repeats the requests for ``seconds``, after a warm-up that is not timed."""
        for question in questions[:SETTLE]:
            self.ask(question)
        self.answers.seconds.clear()
        together.wait(TIMEOUT)
        end = time.perf_counter() + seconds
        for question in itertools.cycle(questions):
            if time.perf_counter() >= end:
                break
            self.ask(question)
        self._connection.close()
        return self.answers


def free_ports() -> ListenOptions:
    """Returns three unused ports."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [listening.getsockname()[1] for listening in sockets]
    for listening in sockets:
        listening.close()
    return ListenOptions(http_port=ports[0], grpc_port=ports[1], metrics_port=ports[2])
