"""Whether a server on this machine answers rightly, for a health check: python deploy/probe.py runs/models

Ends with 0 if every model of the repository is loaded, every Python backend is alive, and the pictures whose answers
are known are answered so; else with 1 and a line that says what is wrong. Triton's own /v2/health says "ready" while
every request fails on a dead backend. This command imports neither PyTorch nor anything else that is slow.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deploy.serving.health import ServedRepository, UnhealthyError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path, help="the model repository that python deploy/serve.py wrote")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server's HTTP protocol")
    parser.add_argument("--timeout", type=float, default=3.0, help="seconds for an answer, plus 10 times the network's")
    options = parser.parse_args()
    try:
        ServedRepository(options.url, options.repository, options.timeout).check()
    except (UnhealthyError, TimeoutError, ValueError) as error:  # ValueError: of what is no URL
        sys.exit(f"error: {error or 'the server does not answer'}")


if __name__ == "__main__":
    main()
