"""Compares this project's quantizer with others, on the same checkpoint and images: python benchmarks/quant_peers.py

    python -m venv runs/peers-venv
    runs/peers-venv/bin/pip install -c constraints.txt -e '.[all]' -r benchmarks/peers-requirements.txt
    runs/peers-venv/bin/python benchmarks/quant_peers.py
    runs/peers-venv/bin/python benchmarks/quant_peers.py --checkpoint illama/weights/tiny-emoji --data runs/emoji

Every peer quantizes in its own process and is tested on the whole test split; then all are timed alternately in one
run. For a peer that is not installed or fails, the table has the reason. The same command resumes an interrupted one.
It writes ``DATA.json`` and ``DATA.md`` to ``results/quant-peers``.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peers.all_peers import PEERS
from peers.base import be_quiet, reason
from peers.runtimes import LOADERS, ORT
from peers.work import LABELS, RESULT, WorkOptions, logits_file, open_both, peer_versions

from illama.cli import run_command
from eval.measure.latency import TimingOptions, measure_latency
from eval.metrics.paired import paired_drop
from eval.report.store import write_results
from illama.atomic_write import write_file
from illama.bundle import SHIPPED, package_versions, sha256
from illama.checkpoints.load import load_checkpoint
from illama.errors import UserError
from illama.hardware import describe_machine, usable_cores
from illama.inference import Infer, load_images, top1
from illama.manifest import Drop
from quant.mixed_precision.layer_effects import decibels

REFERENCE = "fp32"  # in ONNX Runtime
BATCHES = (1, 8)


@dataclass(frozen=True)
class PeerOptions:
    """Quantize a checkpoint with every peer, and compare.

    Attributes:
        checkpoint: path to a checkpoint, as for quant/ptq.py.
        data: data set, as for quant/ptq.py.
        peers: names of peers. If not given, all.
        calibration_images: number of calibration images, of the training split.
        rounds: number of timed rounds; 0 for no timing.
        threads: number of threads for quantization and inference, limited to the number of cores.
        test_images: number of test images. If not given, all.
        again: quantize again even if an earlier run succeeded.
        out: folder of the peers' files.
        results: folder of the table.
    """

    checkpoint: Path = SHIPPED
    data: str = "fashion-mnist"
    peers: tuple[str, ...] = ()
    calibration_images: int = 512
    rounds: int = 40
    threads: int = 2
    test_images: int | None = None
    again: bool = False
    out: Path = Path("runs/quant-peers")
    results: Path = Path("results/quant-peers")

    @property
    def name(self) -> str:
        """Name of the data set in folder and file names."""
        kind, _, folder = self.data.partition(":")
        return kind if folder else Path(kind).name


@dataclass(frozen=True)
class Row:
    """A peer's file in one runtime. The reference is float32 in ONNX Runtime.

    Attributes:
        error: reason, in one line, if there are no results.
        top1: top-1 in percent.
        drop: accuracy drop from the reference.
        agreement: percent of the test images with the reference's class.
        sqnr_db: SQNR of the logits against the reference's, in dB; None if they are equal.
        cosine: mean cosine similarity of an image's logits to the reference's.
        mb: size in 10^6 bytes.
        seconds: duration of the quantization.
        peak_gib: peak memory of the quantization in GiB.
        p50: batch size -> median milliseconds of a call.
        findings: counts of the linter's warnings and errors by rule, "none", or None for a file that is not ONNX.
        ratio: batch size -> ``p50`` over the reference's in the same run.
    """

    peer: str
    title: str
    runtime: str
    about: str
    error: str | None = None
    top1: float | None = None
    drop: Drop | None = None
    agreement: float | None = None
    sqnr_db: float | None = None
    cosine: float | None = None
    mb: float | None = None
    seconds: float | None = None
    peak_gib: float | None = None
    findings: str | None = None
    p50: dict[int, float] | None = None
    ratio: dict[int, float] | None = None


def chosen(options: PeerOptions) -> list[str]:
    """Returns the names of the peers to compare, the reference first; raises UserError for an unknown name."""
    unknown = [name for name in options.peers if name not in PEERS]
    if unknown:
        raise UserError(f"unknown peer {unknown[0]!r}: choose from {', '.join(PEERS)}")
    return list(dict.fromkeys([REFERENCE, *(options.peers or PEERS)]))


def work_options(options: PeerOptions, name: str) -> WorkOptions:
    """Returns the options of a peer's process."""
    return WorkOptions(
        name,
        options.checkpoint,
        options.data,
        (options.out / options.name / name).resolve(),
        options.calibration_images,
        threads_of(options),
        options.test_images,
    )


def threads_of(options: PeerOptions) -> int:
    return min(options.threads, usable_cores())


def run_in_process(job: WorkOptions) -> None:
    """Runs a peer in its own process, with its output in log.txt."""
    command = [sys.executable, "-m", "peers.work"]
    for field, value in asdict(job).items():
        command += [] if value is None else [f"--{field.replace('_', '-')}", str(value)]
    path = os.pathsep.join(map(str, sys.path))
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads), "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with (job.out / "log.txt").open("wb") as log:
        process = subprocess.run(command, stdout=log, stderr=log, env=environment)
    if process.returncode or not (job.out / RESULT).exists():
        write_result(job.out, {"error": f"{death(process.returncode)}; see {os.path.relpath(job.out)}/log.txt"})


def death(status: int) -> str:
    """Describes how a process ended."""
    if status >= 0:
        return f"its process ended with status {status}"
    hint = ", as when memory runs out" if -status == signal.SIGKILL else ""
    return f"its process was ended by {signal.Signals(-status).name}{hint}"


def write_result(folder: Path, result: dict[str, Any]) -> None:
    with write_file(folder / RESULT) as draft:
        draft.write_text(json.dumps(result, indent=2) + "\n")


def collect(options: PeerOptions) -> dict[str, dict[str, Any]]:
    """Returns each peer's result: that of an earlier run if nothing that it depends on has changed, or a new one."""
    results = {}
    names = chosen(options)
    weights = sha256(load_checkpoint(options.checkpoint).weights)
    for place, name in enumerate(names, 1):
        job = work_options(options, name)
        key = {
            "weights": weights,
            "data": options.data,
            "calibration_images": job.calibration_images,
            "test_images": job.test_images,
            "threads": job.threads,
            "settings": PEERS[name].settings(),
            "versions": package_versions() | peer_versions(),
        }
        print(f"[{place}/{len(names)}] {name} ...", end=" ", flush=True)
        result = None if options.again else kept(job.out, key)
        start = time.perf_counter()
        if result is None:
            shutil.rmtree(job.out, ignore_errors=True)
            job.out.mkdir(parents=True)
            run_in_process(job)
            result = {**json.loads((job.out / RESULT).read_text()), "key": key}
            write_result(job.out, result)
            print(result.get("error") or f"{time.perf_counter() - start:.0f} s", flush=True)
        else:
            print("kept", flush=True)
        results[name] = result
    return results


def kept(folder: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """Returns a successful earlier result from the same inputs, or None."""
    try:
        result: dict[str, Any] = json.loads((folder / RESULT).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return result if "error" not in result and result.get("key") == key else None


def rows_of(options: PeerOptions, results: dict[str, dict[str, Any]]) -> list[Row]:
    """Returns the rows of the table, without latency."""
    if failed := results[REFERENCE].get("error") or results[REFERENCE]["failed"].get(ORT):
        raise UserError(f"the float32 reference failed: {failed}")
    folder = options.out / options.name
    reference = np.load(folder / REFERENCE / logits_file(ORT))
    labels = np.load(folder / REFERENCE / LABELS)
    rows = []
    for name, result in results.items():
        for runtime in PEERS[name].runtimes:
            known = Row(
                name,
                PEERS[name].title,
                runtime,
                PEERS[name].about,
                result.get("error") or result["failed"].get(runtime),
            )
            rows.append(known if known.error else evaluated(known, result, folder / name, reference, labels))
    return rows


def evaluated(row: Row, result: dict[str, Any], folder: Path, reference: np.ndarray, labels: np.ndarray) -> Row:
    """Returns the row with its accuracy, from logits (n, classes) and labels (n,)."""
    logits = np.load(folder / logits_file(row.runtime))
    classes, expected = logits.argmax(1), reference.argmax(1)
    cosines = (logits * reference).sum(1) / (np.linalg.norm(logits, axis=1) * np.linalg.norm(reference, axis=1))
    sqnr = decibels(float(np.square(reference).sum()), float(np.square(logits - reference).sum()))
    return Row(
        row.peer,
        row.title,
        row.runtime,
        row.about,
        None,
        top1(logits, labels),
        paired_drop(expected == labels, classes == labels),
        float((classes == expected).mean() * 100),
        round(sqnr, 2) if math.isfinite(sqnr) else None,
        round(float(cosines.mean()), 6),
        result["mb"],
        result["seconds"],
        result["peak_gib"],
        result["findings"],
    )


def timed(options: PeerOptions, results: dict[str, dict[str, Any]], rows: list[Row]) -> list[Row]:
    """Returns the rows with latencies, measured alternately in this process."""
    _, data, preprocessing = open_both(options.checkpoint, options.data)
    images, _ = load_images(data.calibration(max(BATCHES)), preprocessing.transform())
    engines: dict[str, Infer] = {}
    notes: dict[str, str] = {}
    for row in rows:
        if row.error is None and PEERS[row.peer].timed:
            print(f"load {key_of(row)} ...", flush=True)
            try:
                path = work_options(options, row.peer).out / results[row.peer]["file"]
                engines[key_of(row)] = LOADERS[row.runtime](path, options.checkpoint, threads_of(options))
                for batch in BATCHES:
                    engines[key_of(row)](images[:batch])  # some compile in the first call
            except Exception as error:  # it ran in its own process
                engines.pop(key_of(row), None)
                notes[key_of(row)] = f"not timed: {reason(error)}"
    print(f"time {len(engines)} of them with {BATCHES} images a call, {options.rounds} rounds ...", flush=True)
    measured = measure_latency(engines, images, BATCHES, TimingOptions(options.rounds)).latency
    times = {
        batch: {name: each.p50 for name, found in measured.items() for each in found if each.batch == batch}
        for batch in BATCHES
    }
    reference = key_of(next(row for row in rows if (row.peer, row.runtime) == (REFERENCE, ORT)))
    return [with_latency(row, times, reference, notes.get(key_of(row))) for row in rows]


def key_of(row: Row) -> str:
    return f"{row.peer} in {row.runtime}"


def with_latency(row: Row, times: dict[int, dict[str, float]], reference: str, note: str | None) -> Row:
    """Returns the row with its medians and their ratios to the reference's."""
    values = {**vars(row), "error": row.error or note}
    if key_of(row) in times[BATCHES[0]]:
        values["p50"] = {batch: times[batch][key_of(row)] for batch in BATCHES}
        values["ratio"] = {batch: times[batch][key_of(row)] / times[batch][reference] for batch in BATCHES}
    return Row(**values)


def markdown(rows: list[Row], title: str) -> str:
    """Returns the rows as a Markdown table."""
    calls = " | ".join(f"p50 ms, {batch} image{'s' * (batch > 1)} (ratio)" for batch in BATCHES)
    lines = [
        title,
        "",
        "| quantizer | runs in | top-1 % | drop (95% interval) | agrees % | SQNR dB | cosine | MB | quantize s | GiB | "
        f"{calls} | linter's warnings |",
        "|---" * (11 + len(BATCHES)) + "|",
    ]
    for row in rows:
        if row.top1 is None or row.drop is None:
            lines.append(
                f"| {row.title} | {row.runtime} | failed: {(row.error or '').replace('|', '/')} |"
                + " - |" * (8 + len(BATCHES))
            )
            continue
        speed = [
            f"{row.p50[batch]:.2f} ({row.ratio[batch]:.2f})" if row.p50 and row.ratio else row.error or "-"
            for batch in BATCHES
        ]
        sqnr = "-" if row.sqnr_db is None else f"{row.sqnr_db:.1f}"
        drop = f"{row.drop.points:+.2f} ({row.drop.low:+.2f} to {row.drop.high:+.2f})"
        lines.append(
            f"| {row.title} | {row.runtime} | {row.top1:.2f} | {drop} | {row.agreement:.2f} | {sqnr} | "
            f"{row.cosine:.5f} | {row.mb:.2f} | {row.seconds:.1f} | {row.peak_gib:.2f} | {' | '.join(speed)} | "
            f"{row.findings or '-'} |"
        )
    settings = dict.fromkeys((row.title, row.about) for row in rows)
    lines += ["", "Settings, and where they are recommended:", "", *(f"- {name}: {text}" for name, text in settings)]
    return "\n".join(lines) + "\n"


def describe(options: PeerOptions, test_images: int) -> str:
    """Returns a sentence with the checkpoint, data, machine and versions."""
    versions = ", ".join(f"{name} {version}" for name, version in (package_versions() | peer_versions()).items())
    return (
        f"{options.checkpoint.name} on {options.name}: {test_images} test images, {options.calibration_images} "
        f"calibration images. {describe_machine()['cpu']}, {threads_of(options)} threads. {versions}."
    )


def main(options: PeerOptions) -> None:
    be_quiet()
    names = chosen(options)
    for name in names:
        try:
            PEERS[name].check_installed()
        except UserError as error:
            print(f"{name} will be left out: {error}", file=sys.stderr)
    results = collect(options)
    rows = rows_of(options, results)
    if options.rounds:
        rows = timed(options, results, rows)
    labels = np.load(options.out / options.name / REFERENCE / LABELS)
    title, majority = describe(options, len(labels)), 100 * float(np.bincount(labels).max()) / len(labels)
    content = {
        "peers": [asdict(row) for row in rows],
        "peer_versions": peer_versions(),
        "threads": threads_of(options),
        "test_images": len(labels),
        "majority_percent": majority,
    }
    write_results(options.results, options.name, content, markdown(rows, title))


if __name__ == "__main__":
    run_command(PeerOptions, main)
