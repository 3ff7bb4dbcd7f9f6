"""The shipped quantization schemes:

python quant/list_schemes.py

Prints the name and the summary of each. Their files are in quant/schemes.
"""

from __future__ import annotations

from dataclasses import dataclass

from illama.cli import run_command
from quant.schemes.shipped import summaries


@dataclass(frozen=True)
class ListOptions:
    """List the shipped quantization schemes."""


def main(_: ListOptions) -> None:
    for name, summary in summaries().items():
        print(f"{name:<26} {summary}")


if __name__ == "__main__":
    run_command(ListOptions, main)
