"""Check whether a server on this machine answers correctly:

python deploy/probe.py runs/models
python deploy/probe.py runs/models --url http://127.0.0.1:9000 --timeout 10
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from illama.cli import run_command
from deploy.serving.health import ServedRepository, UnhealthyError
from illama.bundle import as_run
from illama.options import NotNegative


@dataclass(frozen=True)
class ProbeOptions:
    """Check whether a server on this machine answers correctly, for health checks.

    Exits with 0 if every model of the repository is loaded, every Python backend is alive, and every model gives its
    known answer; otherwise with 1 and one line that says what is wrong. Triton's own /v2/health reports "ready" even if
    every request fails on a dead backend.

    Attributes:
        repository: path to the model repository that python deploy/serve.py wrote.
        url: URL of the server's HTTP protocol.
        timeout: seconds to wait for an answer, in addition to 10 times the network's own time.
    """

    repository: Annotated[Path, tyro.conf.Positional]
    url: str = "http://127.0.0.1:8000"
    timeout: NotNegative = 3.0


def main(options: ProbeOptions) -> None:
    try:
        ServedRepository(options.url, options.repository, options.timeout).check()
        print(f"every model of {options.repository} answers correctly")
    except (UnhealthyError, TimeoutError, ValueError) as error:  # ValueError: an invalid URL
        sys.exit(f"error: {as_run(str(error) or 'the server does not answer')}")


if __name__ == "__main__":
    run_command(ProbeOptions, main)
