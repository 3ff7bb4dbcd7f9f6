"""Definition of a peer, which is a quantizer to compare, and of its task."""

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
BATCH = 64  # calibration images per call of all peers that accept batches
# Some peers send usage data to their authors unless these variables say that they run in a test.
QUIET = {"CI": "true", "NNCF_CI": "1"}


@dataclass(frozen=True)
class Task:
    """The input of every peer.

    Attributes:
        model: the network in float32, in evaluation mode, on the CPU.
        images: preprocessed calibration images (n, C, H, W), float32.
        validation: images and labels (m,) of the training split, to measure accuracy during quantization.
        folder: folder that the peer writes to; all files named ``model.*`` count as its result.
    """

    model: ILLaMA
    images: np.ndarray
    validation: tuple[np.ndarray, np.ndarray]
    folder: Path

    def batches(self) -> Iterator[np.ndarray]:
        """Yields the calibration images in batches of at most ``BATCH``."""
        for start in range(0, len(self.images), BATCH):
            yield self.images[start : start + BATCH]


@dataclass(frozen=True)
class Peer:
    """A quantizer of another library, or of this project, with its settings.

    Attributes:
        title: name in the table.
        make: function that writes the file and returns its path.
        runtimes: names of runtimes in :mod:`peers.runtimes`; the table has a row for each.
        about: its settings, and the documentation that recommends them.
        needs: pairs of a module to import and the package that contains it.
        validates: whether it measures accuracy during quantization, on training images.
        timed: whether its latency on a CPU is meaningful.
    """

    title: str
    make: Callable[[Task], Path]
    runtimes: tuple[str, ...]
    about: str
    needs: tuple[tuple[str, str], ...] = ()
    validates: bool = False
    timed: bool = True

    def settings(self) -> dict[str, Any]:
        """Returns what its result depends on besides its inputs and packages, for JSON."""
        return {
            "about": self.about,
            "runtimes": list(self.runtimes),
            "make": {name: str(value) for name, value in getattr(self.make, "keywords", {}).items()},
        }

    def check_installed(self) -> None:
        """Raises UserError with what to install if a package is missing."""
        check_installed(self.needs)


def check_installed(needs: Iterable[tuple[str, str]]) -> None:
    """Raises UserError with what to install if a (module, package) is missing."""
    missing = [package for module, package in needs if find_spec(module) is None]
    if missing:
        raise UserError(f"not installed: {', '.join(missing)} (pip install -r {REQUIREMENTS})")


@cache
def register_linear() -> None:
    """Registers this project's Linear with ModelOpt, which compares exact classes and would not quantize it."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import QuantLinearConvBase

    mtq.register(original_cls=Linear, quantized_cls=type("QuantizedLinear", (QuantLinearConvBase,), {}))


def be_quiet() -> None:
    """Disables the usage data of the peers, in this process and its children."""
    os.environ.update(QUIET)


def reason(error: BaseException) -> str:
    """Returns an exception in one line of at most 200 characters, without the working directory."""
    words = " ".join(str(error).replace(f"{Path.cwd()}/", "").split()) or "no message"
    text = words if isinstance(error, UserError) else f"{type(error).__name__}: {words}"
    return text if len(text) <= 200 else text[:197] + "..."
