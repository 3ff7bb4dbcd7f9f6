"""Latency of several engines under the same conditions, and the energy of a call where the machine tells."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from onnxruntime.capi import onnxruntime_pybind11_state as ort
from tqdm import tqdm

from eval.benchmark.sensors import SYSFS, Meter, Watch, find_gpu, read_governor
from illama.errors import UserError
from illama.inference import Infer, usable_cores

Item = TypeVar("Item")
LEAST_TURNS = 3
UNREADABLE = "not readable here"
# What the runtimes raise for a batch that they do not take or have no memory for; ONNX Runtime's share no base class.
_REFUSALS = (
    UserError,
    RuntimeError,
    MemoryError,
    ValueError,
    ort.InvalidArgument,
    ort.Fail,
    ort.RuntimeException,
    ort.EPFail,
    ort.NotImplemented,
)


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one call with ``batch`` images.

    Attributes:
        calls: how many were timed.
        joules: of one call, where the device says what it takes; None elsewhere.
    """

    batch: int
    mean: float
    p50: float
    p90: float
    p99: float
    calls: int
    joules: float | None = None

    @property
    def images_per_second(self) -> float:
        return 1e3 * self.batch / self.mean


@dataclass(frozen=True)
class Timings:
    """What ``measure_latency`` found.

    Attributes:
        latency: engine -> one for each batch size that it takes, in the order asked for.
        refused: engine -> batch size -> why there is none.
        conditions: for a report, in words and numbers.
    """

    latency: dict[str, list[Latency]]
    refused: dict[str, dict[int, str]]
    conditions: dict[str, Any]


@dataclass(frozen=True)
class _Turns:
    """How often an engine has its turn, and of how many calls, ``settle`` before those that are timed."""

    turns: int
    calls: int
    settle: int

    def within(self, seconds: float, a_call: float) -> _Turns:
        """What fits into ``seconds``: first fewer turns, then shorter ones, of which at most a quarter settles."""
        affordable = int(seconds / max(a_call, 1e-9))
        turns = min(self.turns, max(LEAST_TURNS, affordable // (self.settle + self.calls)))
        a_turn = affordable // turns
        settle = self.settle if a_turn >= self.settle + self.calls else min(self.settle, a_turn // 4)
        return _Turns(turns, min(self.calls, max(1, a_turn - settle)), settle)


def measure_latency(
    engines: Mapping[str, Infer],
    images: np.ndarray,
    batches: Sequence[int] = (1,),
    rounds: int = 40,
    calls: int = 10,
    settle: int = 3,
    seconds: float | None = None,
    meters: Mapping[str, Meter] | None = None,
    seed: int = 0,
    progress: bool = True,
    root: Path = SYSFS,
) -> Timings:
    """Time all engines in turn, in a new order each round, so that drift and neighbours hit all alike.

    At each batch size every engine is warmed up until its time settles; then come the rounds. A turn is ``settle``
    calls that are not counted, while the threads of the engine before go to sleep, and ``calls`` that are. Energy
    has turns of its own after these, each as long as its meter needs, since sensors are slower than a call.

    Args:
        images: (N, C, H, W); repeated where a batch is larger than N. One batch is in memory at a time.
        seconds: about how long the rounds at one batch size may take, shared alike by the engines; an engine that is
            too slow for all its turns has fewer, spread over the rounds, but no fewer than 3. None for no limit.
        meters: engine -> what measures the energy of the device it runs on.
        root: of sysfs.

    Raises:
        UserError: for no images, or a number that is not positive.
    """
    _check(images, batches, rounds, calls, settle, seconds)
    wanted, share = _Turns(rounds, calls, settle), None if seconds is None else seconds / max(1, len(engines))
    timings = Timings({name: [] for name in engines}, {name: {} for name in engines}, _state(root))
    watch, order, start, switches = Watch(root, find_gpu()), np.random.default_rng(seed), time.monotonic(), _switches()
    watch.look()
    for batch in batches:
        try:
            given = images[np.arange(batch) % len(images)]
        except MemoryError as error:
            for name in engines:
                timings.refused[name][batch] = str(error)
            continue
        plans, refused = _warm_up(engines, given, wanted, share, progress)
        for name, reason in refused.items():
            timings.refused[name][batch] = reason
        times = _take_turns({name: engines[name] for name in plans}, given, plans, rounds, order, watch, progress)
        joules = _energy(engines, given, {name: m for name, m in (meters or {}).items() if name in plans}, progress)
        for name, values in times.items():
            timings.latency[name].append(_summarise(values, batch, joules.get(name)))
    watch.look()
    timings.conditions.update(
        {
            "batch sizes": list(batches),
            "rounds": rounds,
            "calls a turn": calls,
            "calls before them": settle,
            "seconds for a batch size": "no limit" if seconds is None else seconds,
            "involuntary context switches a second": round((_switches() - switches) / (time.monotonic() - start), 1),
            **watch.summary(),
            "energy": "; ".join(sorted({meter.covers for meter in (meters or {}).values()})) or UNREADABLE,
        }
    )
    return timings


def _check(
    images: np.ndarray, batches: Sequence[int], rounds: int, calls: int, settle: int, seconds: float | None
) -> None:
    if not len(images):
        raise UserError("there is no image to time anything with: give one at least")
    if not batches or min(batches) < 1 or len(set(batches)) < len(batches):
        raise UserError(f"batch sizes are different numbers of 1 or more, not {list(batches)}")
    if min(rounds, calls, settle) < 1 or (seconds is not None and not seconds > 0):
        raise UserError("rounds, calls, calls before them and seconds must all be more than zero")


def _state(root: Path) -> dict[str, Any]:
    """What the process may use, and who else was at work before it."""
    return {
        "threads": usable_cores(),
        "cores": sorted(os.sched_getaffinity(0)),
        "clock governor": read_governor(root) or UNREADABLE,
        "load average before": round(os.getloadavg()[0], 2),
    }


def _switches() -> int:
    """How often so far the system took a core from a thread of this process that wanted to go on."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _bar(items: Iterable[Item], doing: str, unit: str, progress: bool) -> Iterable[Item]:
    disable = None if progress else True  # None: shown on a terminal
    return tqdm(items, desc=doing, unit=unit, disable=disable, leave=False)


def _warm_up(
    engines: Mapping[str, Infer], images: np.ndarray, wanted: _Turns, share: float | None, progress: bool
) -> tuple[dict[str, _Turns], dict[str, str]]:
    """(engine -> how often to call it, engine -> why it does not take this batch)."""
    plans, refused = {}, {}
    for name in _bar(engines, f"warm up, batch {len(images)}", "engine", progress):
        try:
            a_call = _settled(engines[name], images, wanted.settle, share)
        except _REFUSALS as error:
            refused[name] = " ".join(str(error).split())[:300] or type(error).__name__
        else:
            plans[name] = wanted if share is None else wanted.within(share, a_call)
    return plans, refused


def _settled(infer: Infer, images: np.ndarray, calls: int, limit: float | None) -> float:
    """Seconds of a call, once the last ``calls`` of them are no more than 5% faster than any before, or at ``limit``.

    The first call counts for nothing: it may compile.
    """
    infer(images)
    times: list[float] = []
    while True:
        times.append(_seconds(infer, images))
        if len(times) > calls and min(times[-calls:]) > 0.95 * min(times[:-calls]):
            break
        if limit is not None and sum(times) > limit / 4:
            break
    return float(np.median(times[-calls:]))


def _seconds(infer: Infer, images: np.ndarray) -> float:
    start = time.perf_counter()
    infer(images)
    return time.perf_counter() - start


def _take_turns(
    engines: Mapping[str, Infer],
    images: np.ndarray,
    plans: Mapping[str, _Turns],
    rounds: int,
    order: np.random.Generator,
    watch: Watch,
    progress: bool,
) -> dict[str, list[float]]:
    """Engine -> seconds of its timed calls."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    names = list(engines)
    for index in _bar(range(rounds), f"time, batch {len(images)}", "round", progress):
        for name in (names[place] for place in order.permutation(len(names))):
            plan = plans[name]
            if (index + 1) * plan.turns // rounds > index * plan.turns // rounds:  # so many turns, evenly spread
                for _ in range(plan.settle):
                    engines[name](images)
                times[name] += [_seconds(engines[name], images) for _ in range(plan.calls)]
        watch.look(now=False)
    return times


def _energy(
    engines: Mapping[str, Infer], images: np.ndarray, meters: Mapping[str, Meter], progress: bool
) -> dict[str, float | None]:
    """Engine -> joules of a call, over as many calls without a pause as its meter needs."""
    found: dict[str, float | None] = {}
    for name in _bar(meters, f"energy, batch {len(images)}", "engine", progress):
        meter, calls = meters[name], 0
        engines[name](images)
        end = time.perf_counter() + meter.shortest
        meter.start()
        while not calls or time.perf_counter() < end:
            engines[name](images)
            calls += 1
        joules = meter.stop()
        found[name] = None if joules is None else joules / calls
    return found


def _summarise(seconds: list[float], batch: int, joules: float | None) -> Latency:
    times = np.array(seconds) * 1e3
    p50, p90, p99 = (float(value) for value in np.percentile(times, [50, 90, 99]))
    return Latency(batch, float(np.mean(times)), p50, p90, p99, len(times), joules)
