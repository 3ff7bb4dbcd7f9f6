"""Milliseconds of a call of ONNX files on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deploy.runtimes.cpu_runtime import cpu_runtime
from deploy.runtimes.names import RuntimeName
from deploy.runtimes.open_engine import load_engine
from eval.measure.latency import TimingOptions, measure_latency
from illama.errors import UserError
from illama.memory import release_memory

_SECONDS = 0.5  # of timed calls of each file, about


@dataclass
class RuntimeTimer:
    """Times files in one runtime, and the float file in the one that is the fastest for it.

    Attributes:
        images: (N, C, H, W) float32, repeated if a call takes more.
        float_name: name of the float file.
        batch: number of images in a call.
        runtime: if not given, the fastest one for the first file that is not the float file.
        threads: number of threads on a CPU; 0 for one per core.
    """

    images: np.ndarray
    float_name: str
    batch: int = 1
    runtime: RuntimeName | None = None
    threads: int = 0
    _asked: RuntimeName | None = field(init=False)

    def __post_init__(self) -> None:
        self._asked = self.runtime

    def __call__(self, files: Mapping[str, Path]) -> dict[str, float]:
        """Returns name -> median milliseconds of a call of each file; the files take turns.

        Raises:
            UserError: the runtime cannot open or run a file.
        """
        engines = {name: load_engine(path, self._runtime(name, path), self.threads) for name, path in files.items()}
        options = TimingOptions(seconds=_SECONDS * len(engines), progress=False)
        infer = {name: engine.infer for name, engine in engines.items()}
        timings = measure_latency(infer, self.images, (self.batch,), options)
        for engine in engines.values():
            engine.close()
        release_memory()
        for name, reasons in timings.refused.items():
            for reason in reasons.values():
                raise UserError(f"{files[name].name} cannot be timed with {self.batch} images a call: {reason}")
        return {name: latency.p50 for name, (latency,) in timings.latency.items()}

    def _runtime(self, name: str, path: Path) -> RuntimeName | None:
        if name == self.float_name:
            return self._asked
        self.runtime = self.runtime or cpu_runtime(path, self.threads)
        return self.runtime
