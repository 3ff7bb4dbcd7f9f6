"""Latency of several engines under the same conditions, and the energy of a call where it can be measured.

A percentile of few calls is mostly chance. As MLPerf Inference by its early-stopping rule, :func:`percentile_bound`
therefore states, with 99% confidence, a latency that the percentile does not exceed, and none at all if there are too
few calls: github.com/mlcommons/inference_policies/blob/master/inference_rules.adoc (appendix on early stopping).
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
from onnxruntime.capi import onnxruntime_pybind11_state as ort

from eval.measure.sensors import SYSFS, Meter, Sensor, Watch, find_gpu, read_governor
from illama.errors import UserError
from illama.hardware import usable_cores
from illama.inference import Infer
from illama.options import Count, Positive, check_bounds
from illama.progress import track

LEAST_TURNS = 3
CONFIDENCE = 0.99  # of the bounds of percentiles
UNREADABLE = "not readable here"
# Raised by runtimes for a batch that they reject or have no memory for; those of ONNX Runtime share no base class.
_OF_ONNX_RUNTIME = (ort.InvalidArgument, ort.Fail, ort.RuntimeException, ort.EPFail, ort.NotImplemented)
_REFUSALS = (UserError, RuntimeError, MemoryError, ValueError, *_OF_ONNX_RUNTIME)


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call with ``batch`` images.

    Attributes:
        p90, p99: bounds of the percentiles (:func:`percentile_bound`); None if there are too few calls for them.
        calls: number of timed calls.
        joules: energy of one call; None if the device does not report it.
    """

    batch: int
    mean: float
    p50: float
    p90: float | None
    p99: float | None
    calls: int
    joules: float | None = None

    @property
    def images_per_second(self) -> float:
        return 1e3 * self.batch / self.mean


@dataclass(frozen=True)
class Timings:
    """Result of :func:`measure_latency`.

    Attributes:
        latency: engine -> its latency at each batch size that it takes, in the given order.
        refused: engine -> batch size -> why it was not timed.
        conditions: conditions of the measurement, for a report.
        sensors: what sensors could be read during the measurement.
    """

    latency: dict[str, list[Latency]]
    refused: dict[str, dict[int, str]]
    conditions: dict[str, Any]
    sensors: set[Sensor] = field(default_factory=set)


@dataclass(frozen=True)
class _Turns:
    """Number of an engine's turns, and of calls in each: ``settle`` untimed ones, then ``calls`` timed ones."""

    turns: int
    calls: int
    settle: int

    def within(self, seconds: float, a_call: float) -> _Turns:
        """Returns what fits into ``seconds``: first fewer turns, then shorter ones, at most a quarter untimed."""
        affordable = int(seconds / max(a_call, 1e-9))
        turns = min(self.turns, max(LEAST_TURNS, affordable // (self.settle + self.calls)))
        a_turn = affordable // turns
        settle = self.settle if a_turn >= self.settle + self.calls else min(self.settle, a_turn // 4)
        return _Turns(turns, min(self.calls, max(1, a_turn - settle)), settle)


@dataclass(frozen=True)
class TimingOptions:
    """How engines are timed.

    Attributes:
        rounds: number of rounds; in each, every engine has a turn.
        calls: timed calls of a turn.
        settle: untimed calls before them, while the threads of the previous engine go to sleep.
        seconds: approximate time for the rounds at one batch size, divided equally among the engines; a slow engine
            has fewer turns, spread over the rounds, but at least 3. None for no limit.
        seed: random seed of the order.
        progress: whether to show progress bars.
        root: root of sysfs.

    Raises:
        UserError: a number is not positive.
    """

    rounds: Count = 40
    calls: Count = 10
    settle: Count = 3
    seconds: Positive | None = None
    seed: int = 0
    progress: bool = True
    root: Path = SYSFS

    def __post_init__(self) -> None:
        check_bounds(self)


def measure_latency(
    engines: Mapping[str, Infer],
    images: np.ndarray,
    batches: Sequence[int] = (1,),
    options: TimingOptions | None = None,
    meters: Mapping[str, Meter] | None = None,
) -> Timings:
    """Times all engines in turn, in a new random order each round, so that drift and other load affect all equally.

    At each batch size every engine is warmed up until its time is stable; then the rounds start. Energy is measured in
    separate turns afterwards, each as long as its meter needs, since sensors are slow.

    Args:
        images: (N, C, H, W); repeated if a batch is larger than N. One batch is in memory at a time.
        meters: engine -> meter of the energy of the device it runs on.

    Raises:
        UserError: there are no images, or a batch size is not positive or given twice.
    """
    options, meters = options or TimingOptions(), meters or {}
    _check(images, batches)
    share = None if options.seconds is None else options.seconds / max(1, len(engines))
    timings = Timings({name: [] for name in engines}, {name: {} for name in engines}, _state(options.root))
    watch, order = Watch(options.root, find_gpu()), np.random.default_rng(options.seed)
    start, switches = time.monotonic(), _switches()
    watch.look()
    for batch in batches:
        try:
            given = images[np.arange(batch) % len(images)]
        except MemoryError as error:
            for name in engines:
                timings.refused[name][batch] = str(error)
            continue
        plans, refused = _warm_up(engines, given, options, share)
        for name, reason in refused.items():
            timings.refused[name][batch] = reason
        times = _take_turns({name: engines[name] for name in plans}, given, plans, options, order, watch)
        metered = {name: each for name, each in meters.items() if name in plans}
        joules = _energy(engines, given, metered, options.progress)
        for name, values in times.items():
            timings.latency[name].append(_summarize(values, batch, joules.get(name)))
    watch.look()
    timings.conditions.update(_conditions(batches, options, meters, watch))
    rate = (_switches() - switches) / (time.monotonic() - start)
    timings.conditions["involuntary context switches a second"] = round(rate, 1)
    timings.sensors.update(watch.sensors | ({"energy"} if meters else set()))
    return timings


def _conditions(
    batches: Sequence[int], options: TimingOptions, meters: Mapping[str, Meter], watch: Watch
) -> dict[str, Any]:
    return {
        "batch sizes": list(batches),
        "rounds": options.rounds,
        "calls a turn": options.calls,
        "calls before them": options.settle,
        "seconds for a batch size": "no limit" if options.seconds is None else options.seconds,
        **watch.summary(),
        "energy": "; ".join(sorted({meter.covers for meter in meters.values()})) or UNREADABLE,
    }


def _check(images: np.ndarray, batches: Sequence[int]) -> None:
    if not len(images):
        raise UserError("there are no images to time with: give at least one")
    if not batches or min(batches) < 1 or len(set(batches)) < len(batches):
        raise UserError(f"--batches must be different numbers of 1 or more, not {list(batches)}")


def _state(root: Path) -> dict[str, Any]:
    """Returns the CPUs that the process may use, and the load before it started."""
    return {
        "threads": usable_cores(),
        "cores": sorted(os.sched_getaffinity(0)),
        "clock governor": read_governor(root) or UNREADABLE,
        "load average before": round(os.getloadavg()[0], 2),
    }


def _switches() -> int:
    """Returns the number of involuntary context switches of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _warm_up(
    engines: Mapping[str, Infer], images: np.ndarray, options: TimingOptions, share: float | None
) -> tuple[dict[str, _Turns], dict[str, str]]:
    """Returns the turns of each engine, and why the other engines do not take this batch."""
    plans, refused, wanted = {}, {}, _Turns(options.rounds, options.calls, options.settle)
    for name in track(engines, f"warm up, batch {len(images)}", "engine", options.progress):
        try:
            a_call = _settled(engines[name], images, wanted.settle, share)
        except _REFUSALS as error:
            refused[name] = " ".join(str(error).split())[:300] or type(error).__name__
        else:
            plans[name] = wanted if share is None else wanted.within(share, a_call)
    return plans, refused


def _settled(infer: Infer, images: np.ndarray, calls: int, limit: float | None) -> float:
    """Returns the seconds of a call, once the last ``calls`` are at most 5% faster than any before, or at ``limit``.

    The first call is not counted: it may compile.
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
    options: TimingOptions,
    order: np.random.Generator,
    watch: Watch,
) -> dict[str, list[float]]:
    """Returns the seconds of each engine's timed calls."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    names, rounds = list(engines), options.rounds
    for index in track(range(rounds), f"time, batch {len(images)}", "round", options.progress):
        for name in (names[place] for place in order.permutation(len(names))):
            plan = plans[name]
            # The engine's turns are spread evenly over the rounds.
            if (index + 1) * plan.turns // rounds > index * plan.turns // rounds:
                for _ in range(plan.settle):
                    engines[name](images)
                times[name] += [_seconds(engines[name], images) for _ in range(plan.calls)]
        watch.look(now=False)
    return times


def _energy(
    engines: Mapping[str, Infer], images: np.ndarray, meters: Mapping[str, Meter], progress: bool
) -> dict[str, float | None]:
    """Returns the joules of a call of each engine, over as many consecutive calls as its meter needs."""
    found: dict[str, float | None] = {}
    for name in track(meters, f"energy, batch {len(images)}", "engine", progress):
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


def _summarize(seconds: list[float], batch: int, joules: float | None) -> Latency:
    times = np.array(seconds) * 1e3
    p90, p99 = (percentile_bound(times, percentile) for percentile in (0.9, 0.99))
    return Latency(batch, float(np.mean(times)), float(np.median(times)), p90, p99, len(times), joules)


def percentile_bound(values: Sequence[float] | np.ndarray, percentile: float) -> float | None:
    """Returns the smallest value that a percentile exceeds with a probability of at most 1%; None for too few values.

    The number of values above the true percentile is binomial. If at most ``t`` of them were above it with a
    probability of 1% or less, then it lies below the ``t``-th largest value.

    Args:
        values: independent measurements.
        percentile: as a share, such as 0.99.
    """
    count = len(values)
    above = int(scipy.stats.binom.ppf(1 - CONFIDENCE, count, 1 - percentile)) if count else 0
    while above > 0 and scipy.stats.binom.cdf(above, count, 1 - percentile) > 1 - CONFIDENCE:
        above -= 1
    return float(np.sort(values)[count - above]) if above > 0 else None
