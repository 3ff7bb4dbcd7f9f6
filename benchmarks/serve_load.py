"""Measures a served bundle under load: python benchmarks/serve_load.py runs/ptq/int8

Writes a model repository, starts Triton, and runs clients that send test images as PNG files over gRPC, each the next
one after the last response. Every response is compared with the engine's result without a server. The clients share the
cores of the machine with the server.

Then faults are injected (benchmarks/serve_faults.py): 1,000 simultaneous requests, every fifth of them broken, and a
killed backend.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from serve_client import MODEL, Answers, Client, Question, free_ports, read_questions
from serve_faults import measure_faults
from tqdm import tqdm

from illama.cli import run_command
from deploy.serving.repository import write_repository
from deploy.serving.server import running_server
from deploy.serving.serving_options import ListenOptions, ServingOptions
from eval.report.store import write_results
from illama.atomic_write import make_out
from illama.data.datasets import open_data
from illama.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LoadOptions(ServingOptions):
    """Measure a server under load; a request that is lost or answered wrongly fails the command.

    Responses are compared with those of the same runtime without a server, so the server needs --device cpu.

    Attributes:
        bundle: path to a bundle with a model.onnx.
        data: data set whose test images are sent.
        images: number of test images.
        clients: numbers of simultaneous clients to measure.
        seconds: duration for each number of clients.
        faults: number of simultaneous requests while a backend is killed; 0 for none.
        out: folder of the results, and of the server's log if the command fails.
    """

    bundle: Annotated[Path, tyro.conf.Positional]
    data: str = "fashion-mnist"
    images: int = 256
    clients: tuple[int, ...] = (1, 4, 16)
    seconds: float = 10
    faults: int = 1000
    out: Path = Path("results/serve-load")

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.clients, default=0) < 1 or self.images < 1 or not 0 < self.seconds < math.inf:
            raise UserError("--clients, --images and --seconds must be above 0")
        if self.faults < 0:
            raise UserError("--faults must be 0 or more")
        if self.device != "cpu":
            raise UserError(f"responses are compared with those of the CPU: remove --device {self.device}")


def load(url: str, questions: Sequence[Question], clients: int, seconds: float) -> Answers:
    """Runs simultaneous clients, each of which starts at another request, and returns their responses."""
    together = threading.Barrier(clients)
    starts = [index * len(questions) // clients for index in range(clients)]
    with ThreadPoolExecutor(clients) as pool:
        runs = [
            pool.submit(Client(url).run, [*questions[start:], *questions[:start]], seconds, together)
            for start in starts
        ]
        every = [run.result() for run in runs]
    return Answers(
        [value for answers in every for value in answers.seconds],
        sum(answers.lost for answers in every),
        sum(answers.wrong for answers in every),
        max(answers.difference for answers in every),
    )


def row(clients: int, seconds: float, answers: Answers, cpu: float, images: float, batches: float) -> dict[str, Any]:
    """Returns a row of the table; raises UserError if there was no response.

    Args:
        clients: number of clients.
        seconds: duration of the measurement.
        answers: responses to all clients.
        cpu: the server's CPU seconds.
        images: number of images that the server computed.
        batches: number of batches that the server computed.
    """
    if not answers.seconds:
        raise UserError(f"the server answered none of {answers.lost} requests: see its log")
    p50, p99 = (float(np.percentile(answers.seconds, q)) * 1e3 for q in (50, 99))
    return {
        "clients": clients,
        "images_per_second": len(answers.seconds) / seconds,
        "p50_ms": p50,
        "p99_ms": p99,
        "server_cpu_ms": cpu / images * 1e3,
        "mean_batch": images / batches,
        "lost": answers.lost,
        "wrong": answers.wrong,
        "largest_difference": answers.difference,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    columns = {
        "clients": ("clients", "d"),
        "images_per_second": ("images/s", ".0f"),
        "p50_ms": ("p50 ms", ".1f"),
        "p99_ms": ("p99 ms", ".1f"),
        "server_cpu_ms": ("server's CPU ms an image", ".2f"),
        "mean_batch": ("mean batch", ".1f"),
        "lost": ("lost", "d"),
        "wrong": ("wrong", "d"),
        "largest_difference": ("largest difference of a logit", ".1g"),
    }
    lines = [[title for title, _ in columns.values()], ["---"] * len(columns)]
    lines += [[format(line[name], form) for name, (_, form) in columns.items()] for line in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def batches_so_far(options: ListenOptions) -> tuple[float, float]:
    """Returns (images, batches) that the network has computed since the server's start, from Triton's metrics."""
    with urllib.request.urlopen(f"http://{options.address}:{options.metrics_port}/metrics") as answer:
        metrics = answer.read().decode()
    name = rf'{{model="{MODEL}-network",version="1"}} (\d+)'
    counts = [re.search(metric + name, metrics) for metric in ("nv_inference_count", "nv_inference_exec_count")]
    return tuple(float(found[1]) if found else 0.0 for found in counts)  # type: ignore[return-value]


def process_tree(process: int) -> list[Path]:
    """Returns the folders in /proc of a process and its descendants."""
    folder = Path(f"/proc/{process}")
    children = " ".join(path.read_text() for path in folder.glob("task/*/children")).split()
    return [folder, *itertools.chain.from_iterable(process_tree(int(child)) for child in children)]


def memory_gib(process: int) -> list[float]:
    """Returns the proportional set size (Pss) of a process and of each of its descendants, in GiB."""
    sizes = [
        re.search(r"^Pss:\s+(\d+) kB", (folder / "smaps_rollup").read_text(), re.M) for folder in process_tree(process)
    ]
    return [int(found[1]) / 2**20 for found in sizes if found]


def cpu_seconds(process: int) -> float:
    """Returns the CPU seconds of a process and its descendants (proc_pid_stat(5))."""
    stats = [(folder / "stat").read_text().rpartition(")")[2].split() for folder in process_tree(process)]
    return sum(int(values[11]) + int(values[12]) for values in stats) / os.sysconf("SC_CLK_TCK")


def measure(options: LoadOptions, questions: Sequence[Question], repository: Path, log: Path) -> dict[str, Any]:
    """Measures a server of ``repository`` under each load, and writes its messages to ``log``."""
    listen, rows = free_ports(), []
    start = time.perf_counter()
    with log.open("wb") as messages, running_server(repository, listen, messages) as server:
        ready = time.perf_counter() - start
        for clients in tqdm(options.clients, unit="load", disable=None):
            before = cpu_seconds(server.process.pid), *batches_so_far(listen)
            answers = load(f"{listen.address}:{listen.grpc_port}", questions, clients, options.seconds)
            after = cpu_seconds(server.process.pid), *batches_so_far(listen)
            rows.append(row(clients, options.seconds, answers, *np.subtract(after, before).tolist()))
        memory = memory_gib(server.process.pid)
    chosen = {key: value for key, value in asdict(options).items() if key not in ("bundle", "out")}
    sizes = {"memory_gib": sum(memory), "process_memory_gib": memory}
    return {"rows": rows, "ready_seconds": ready, **sizes, "options": chosen}


def main(options: LoadOptions) -> None:
    questions = read_questions(open_data(options.data).test(), options.images, options.bundle, options.runtime)
    name = options.bundle.resolve().name
    log = options.out / f"{name}.log"
    make_out(options.out)
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "models"
        write_repository(repository, {MODEL: [options.bundle]}, options)
        try:
            facts = measure(options, questions, repository, log)
            faults = measure_faults(repository, questions, options.faults, log) if options.faults else None
        except UserError as error:
            raise UserError(f"{error} (the server's log is {log})") from error
    write_results(options.out, name, facts, table(facts["rows"]))
    print(f"ready after {facts['ready_seconds']:.1f} s, {facts['memory_gib']:.2f} GiB")
    if faults:
        write_results(options.out, f"{name}-faults", asdict(faults), faults.table())
    if bad := sum(line["lost"] + line["wrong"] for line in facts["rows"]):
        raise UserError(f"{bad} requests were lost or answered with another class than the engine's: see {log}")
    if faults and faults.wrong + faults.mistaken:
        raise UserError(
            f"{faults.wrong} requests got another class, {faults.mistaken} the wrong kind of response: see {log}"
        )
    log.unlink()


if __name__ == "__main__":
    run_command(LoadOptions, main)
