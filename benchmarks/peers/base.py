"""What a peer is, and what it is given."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from illama.errors import UserError
from illama.models.illama import ILLaMA, Linear

REQUIREMENTS = "benchmarks/peers-requirements.txt"
BATCH = 64  # calibration images a call; the same for all peers that take batches
# Some of the peers send usage figures to their makers unless they believe they run in a test.
QUIET = {"CI": "true", "NNCF_CI": "1"}


@dataclass(frozen=True)
class Task:
    """What every peer is given.

    Attributes:
        model: float32, in evaluation mode, on the CPU.
        images: calibration images (n, C, H, W), float32, as the network takes them.
        validation: images and labels (m,) to check accuracy on while quantizing; of the training split too.
        folder: where the peer writes; what counts as its file is everything here that is called ``model.*``.
    """

    model: ILLaMA
    images: np.ndarray
    validation: tuple[np.ndarray, np.ndarray]
    folder: Path

    def batches(self) -> Iterator[np.ndarray]:
        """The calibration images, at most ``BATCH`` at a time."""
        for start in range(0, len(self.images), BATCH):
            yield self.images[start : start + BATCH]


@dataclass(frozen=True)
class Peer:
    """One way from a checkpoint to a file.

    Attributes:
        title: what the table calls it.
        make: writes the file and returns its path.
        runtimes: names in :mod:`peers.runtimes`; the table has a row for each.
        about: its settings, and where its documentation recommends them.
        needs: module to import -> package that has it.
        validates: it looks at the accuracy while it quantizes, on training images.
        timed: whether a CPU runs it as it is meant to be run, so that its latency says something.
    """

    title: str
    make: Callable[[Task], Path]
    runtimes: tuple[str, ...]
    about: str
    needs: tuple[tuple[str, str], ...] = ()
    validates: bool = False
    timed: bool = True

    def settings(self) -> dict[str, Any]:
        """What its result depends on besides its inputs and packages, as JSON has it."""
        return {
            "about": self.about,
            "runtimes": list(self.runtimes),
            "make": {name: str(value) for name, value in getattr(self.make, "keywords", {}).items()},
        }

    def check_installed(self) -> None:
        """UserError with what to install, if a package misses."""
        check_installed(self.needs)


def check_installed(needs: Iterable[tuple[str, str]]) -> None:
    """UserError with what to install, if a (module, package) misses."""
    missing = [package for module, package in needs if find_spec(module) is None]
    if missing:
        raise UserError(f"not installed: {', '.join(missing)} (pip install -r {REQUIREMENTS})")


@cache
def register_linear() -> None:
    """Tell ModelOpt that our Linear is one: it goes by the exact class, and would leave all of them in float."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import QuantLinearConvBase

    mtq.register(original_cls=Linear, quantized_cls=type("QuantizedLinear", (QuantLinearConvBase,), {}))


def be_quiet() -> None:
    """Turn off what the peers would send over the network; processes started later inherit it."""
    os.environ.update(QUIET)


def reason(error: BaseException) -> str:
    """An exception in one line of at most 200 characters, without the folder it all runs in."""
    words = " ".join(str(error).replace(f"{Path.cwd()}/", "").split()) or "no message"
    text = words if isinstance(error, UserError) else f"{type(error).__name__}: {words}"
    return text if len(text) <= 200 else text[:197] + "..."
