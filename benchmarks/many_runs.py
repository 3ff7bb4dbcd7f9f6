"""Trains many runs in parallel and compares them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from tqdm import tqdm

from illama.errors import UserError
from illama.hardware import usable_cores
from illama.manifest import TRAINED, Manifest

TRAIN = Path(__file__).parents[1] / "illama" / "train.py"
OPTIONS = "options.json"


def train_all(runs: Mapping[Path, Mapping[str, Any]]) -> None:
    """Trains each run with its options into its folder, on one core per run.

    Raises:
        UserError: a folder contains a run with other options, or a run failed; the message has its last error line.
    """
    for out, options in runs.items():
        if (out / OPTIONS).exists() and (out / OPTIONS).read_text() != as_text(options):
            raise UserError(f"{out} contains a run with other options: choose another --out or delete it")
    missing = [(out, options) for out, options in runs.items() if not finished(out)]
    running: list[tuple[Path, subprocess.Popen[bytes]]] = []
    with tqdm(total=len(missing), unit="run", disable=None) as bar:
        try:
            while missing or running:
                while missing and len(running) < usable_cores():
                    running.append(start(*missing.pop(0)))
                time.sleep(0.2)
                for out, process in [pair for pair in running if pair[1].poll() is not None]:
                    running.remove((out, process))
                    if process.returncode:
                        words = (out / "stderr.txt").read_text().strip() or f"exit status {process.returncode}"
                        raise UserError(f"{out} failed: {words.splitlines()[-1]}")
                    bar.update()
        finally:
            for _, process in running:
                process.terminate()


def finished(out: Path) -> bool:
    """Returns whether a folder contains a finished run."""
    return (out / OPTIONS).exists() and (out / "bundle").exists()


def as_text(options: Mapping[str, Any]) -> str:
    """Returns a run's options as they are stored in its folder."""
    return json.dumps(options, default=str, indent=2)


def start(out: Path, options: Mapping[str, Any]) -> tuple[Path, subprocess.Popen[bytes]]:
    """Starts a run on one thread; returns its folder and process."""
    out.mkdir(parents=True, exist_ok=True)
    (out / OPTIONS).write_text(as_text(options))
    command = [sys.executable, str(TRAIN), "--out", str(out)]
    for name, value in options.items():
        flag = name.replace("_", "-")
        command += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    with (out / "stderr.txt").open("wb") as errors:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return out, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)


def final_top1(out: Path) -> float:
    """Returns the test top-1 of a finished run in percent."""
    scores = Manifest.read(out / "bundle").scores
    assert scores is not None
    return scores.values[TRAINED]


def compare(top1: np.ndarray, reference: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Returns the mean difference over the seeds and its 95% confidence interval (Student's t on paired seeds)."""
    differences = top1 - reference
    mean, half = differences.mean(), stats.sem(differences) * stats.t.ppf(0.975, len(differences) - 1)
    return float(mean), (float(mean - half), float(mean + half))
