"""Serve bundles with Triton Inference Server:

python deploy/serve.py runs/ptq/int8 --run
python deploy/serve.py runs/ptq/int8 --out runs/models --max-batch 16 --http-port 9000 --run

Writes a model repository, and starts the server on it if --run is given. docs/scale.md computes how many machines a
load needs.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from illama.cli import run_command
from deploy.serving.serving_options import ListenOptions, ServingOptions
from deploy.serving.stop_signals import exit_on_signals
from illama.errors import UserError
from illama.options import Count


@dataclass(frozen=True, kw_only=True)
class ServeOptions(ServingOptions, ListenOptions):
    """Write a Triton model repository from bundles, and run the server on it.

    Writes a folder for each model, with its configuration, to OUT.

    Attributes:
        bundles: paths to bundles; each becomes a model named after its folder. If none is given, --run serves --out.
        out: path to the model repository; an existing one is replaced, unless --add is given.
        name: name of one model, whose successive versions the bundles become.
        add: add the bundles to an existing repository, as new versions of its models.
        version: number of the first version; if not given, the next number, or 1 in a new repository.
        run: start the server and keep it running until Ctrl-C.
    """

    bundles: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    out: Path = Path("runs/models")
    name: str | None = None
    add: bool = False
    version: Count | None = None
    run: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.bundles and not (self.run and self.out.exists()):
            raise UserError("give bundles of python quant/ptq.py, or --run with an existing repository as --out")


def main(options: ServeOptions) -> None:
    with exit_on_signals(0 if options.run else 130):  # a server that is stopped has done its work
        # Imported here, so that --help does not wait for PyTorch.
        from deploy.serving.repository import (
            add_versions,
            check_repository,
            describe_model,
            name_models,
            write_repository,
        )
        from deploy.serving.server import serve

    models = name_models(options.bundles, options.name)
    if options.add and models:
        add_versions(options.out, models, options, options.version)
    elif models:
        write_repository(options.out, models, options, options.version or 1)
    for name in models:
        print(describe_model(options.out, name, options))
    if options.run:
        check_repository(options.out)
        serve(options.out, options)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background commands with SIGINT ignored
    run_command(ServeOptions, main)
