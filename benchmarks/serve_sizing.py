"""Machines for a load: python benchmarks/serve_sizing.py results/serve-load/int8.json --images-per-second 5000

It is computed step by step from the results of benchmarks/serve_load.py: from the server's CPU time, not its
throughput, since the clients of that measurement shared its cores.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from illama.cli import run_command
from eval.report.store import write_results
from illama.errors import UserError
from illama.markdown_table import markdown


@dataclass(frozen=True)
class SizingOptions:
    """Compute the number of machines for a load, from a measurement on such a machine.

    Attributes:
        measured: path to a JSON file of benchmarks/serve_load.py.
        images_per_second: peak load.
        p99_ms: largest acceptable 99th percentile of the latency, in milliseconds.
        cores: cores of each machine. If not given, those of the measured machine.
        busy: largest acceptable utilization of the cores at the peak; above it, queues grow long.
        spare: number of machines that may fail at the peak.
        out: folder of the results.
    """

    measured: Annotated[Path, tyro.conf.Positional]
    images_per_second: float
    p99_ms: float = 100
    cores: int | None = None
    busy: float = 0.6
    spare: int = 1
    out: Path = Path("results/serve-sizing")


def machines(cpu_ms: float, images_per_second: float, cores: int, busy: float, spare: int) -> int:
    """Returns the number of machines for a load.

    Args:
        cpu_ms: CPU time per image in milliseconds, over all cores.
        images_per_second: peak load.
        cores: cores of each machine.
        busy: largest acceptable utilization of the cores.
        spare: number of machines that may fail.
    """
    return math.ceil(images_per_second * cpu_ms / 1e3 / (cores * busy)) + spare


def main(options: SizingOptions) -> None:
    if not (
        0 < options.images_per_second < math.inf
        and 0 < options.busy <= 1
        and options.spare >= 0
        and (options.cores or 1) >= 1
    ):
        raise UserError("--images-per-second and --cores must be above 0, --busy in 0..1, and --spare 0 or more")
    try:
        content = json.loads(options.measured.read_text())
        rows, machine, memory = content["rows"], content["machine"], content["memory_gib"]
        name, measured_cores = machine["cpu"], machine["cores"]
        fast = [row for row in rows if row["p99_ms"] <= options.p99_ms]
        best = min(fast, key=lambda row: row["server_cpu_ms"], default=None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{options.measured} is not a result of benchmarks/serve_load.py: run it first") from error
    if best is None:
        raise UserError(f"no row has a p99 within {options.p99_ms:g} ms: raise --p99-ms, or measure with fewer clients")
    cores, cpu = options.cores or measured_cores, best["server_cpu_ms"]
    count = machines(cpu, options.images_per_second, cores, options.busy, options.spare)
    needed = options.images_per_second * cpu / 1e3
    peak = cores * options.busy
    rows = [
        ("measured", f"{cpu:.2f} ms of a core for an image, p99 {best['p99_ms']:.1f} ms, at {best['clients']} clients"),
        ("on", f"{name}, {measured_cores} cores; {memory:.1f} GiB for the server"),
        ("the load", f"{options.images_per_second:g} images/s x {cpu:.2f} ms = {needed:.1f} cores at work"),
        ("a machine", f"{cores} cores x {options.busy:g} = {peak:.1f} cores at the peak"),
        ("machines", f"{needed:.1f} / {peak:.1f}, rounded up, + {options.spare} spare = {count}"),
    ]
    write_results(options.out, "serve-sizing", {"machines": count}, markdown(("what", "how much"), rows))


if __name__ == "__main__":
    run_command(SizingOptions, main)
