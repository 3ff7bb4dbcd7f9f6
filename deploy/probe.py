"""Check whether a server on this machine answers correctly: python deploy/probe.py runs/models

For health checks. Exits with 0 if every model of the repository is loaded, every Python backend is alive, and every
model gives its known answer; otherwise with 1 and one line that says what is wrong. Triton's own /v2/health reports
"ready" even if every request fails on a dead backend.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deploy.serving.health import ServedRepository, UnhealthyError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path, help="path to the model repository that python deploy/serve.py wrote")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="URL of the server's HTTP protocol")
    parser.add_argument(
        "--timeout",
        type=float,
        default=3.0,
        help="seconds to wait for an answer, in addition to 10 times the network's own time",
    )
    options = parser.parse_args()
    try:
        ServedRepository(options.url, options.repository, options.timeout).check()
    except (UnhealthyError, TimeoutError, ValueError) as error:  # ValueError: an invalid URL
        sys.exit(f"error: {error or 'the server does not answer'}")


if __name__ == "__main__":
    main()
