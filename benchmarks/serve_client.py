"""Clients of a served bundle: the questions that they ask, and what they make of the answers."""

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
from illama.bundle import OUTPUT, Manifest
from illama.data.datasets import Sample

MODEL = "served"
SETTLE = 20  # requests of each client whose time is not counted
TIMEOUT = 60  # seconds, after which a request is lost


@dataclass(frozen=True)
class Question:
    """An image file, and the logits (classes,) that it must be answered with."""

    file: bytes
    logits: np.ndarray


@dataclass
class Answers:
    """What one client, or several, got: seconds of each answer, and what went wrong.

    Attributes:
        lost: requests without an answer.
        wrong: answers with another class than the engine's own (:func:`is_wrong`).
        difference: largest absolute difference of a logit.
    """

    seconds: list[float]
    lost: int = 0
    wrong: int = 0
    difference: float = 0.0


def read_questions(
    split: Dataset[Sample], count: int, bundle: Path, runtime: RuntimeName | None = None
) -> list[Question]:
    """The first ``count`` images of a split as PNG files, with the answers of the engine itself, one at a time."""
    takes, choice = ImageInput.of(Manifest.read(bundle)), recommend_runtime(bundle, runtime)
    engine = open_engine(choice.file, choice.runtime)
    questions = []
    for index in range(min(count, len(split))):  # type: ignore[arg-type]
        file = as_png(split[index][0])
        image = takes.read(io.BytesIO(file), lambda: "of the test split")
        questions.append(Question(file, engine.infer(image[None])[0]))
    return questions


def as_png(image: Image.Image | torch.Tensor) -> bytes:
    """The PNG file of an image as a data set gives it."""
    file = io.BytesIO()
    (to_pil_image(image) if isinstance(image, torch.Tensor) else image).save(file, "PNG")
    return file.getvalue()


def is_wrong(logits: np.ndarray, expected: np.ndarray) -> bool:
    """Whether logits (classes,) name another class than those of the engine itself, but for a tie within 2%.

    In bfloat16 an image may be rounded otherwise in a batch than alone.
    """
    return bool(expected.max() - expected[logits.argmax()] > 0.02 * np.abs(expected).max())


class Client:
    """A client of its own connection, which notes what it gets."""

    def __init__(self, url: str) -> None:
        import tritonclient.grpc as triton

        self._triton, self._connection, self.answers = triton, triton.InferenceServerClient(url), Answers([])

    def ask(self, question: Question) -> None:
        """Send one image, wait for its logits and judge them."""
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
        """Ask the questions over and over; those before all clients are ready count as answers, not in time."""
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
    """Three ports that nothing listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [listening.getsockname()[1] for listening in sockets]
    for listening in sockets:
        listening.close()
    return ListenOptions(http_port=ports[0], grpc_port=ports[1], metrics_port=ports[2])
