"""Serve bundles with Triton Inference Server: python deploy/serve.py runs/ptq/int8 --run

Writes a model repository, and starts the server on it with --run. docs/scale.md says how many machines do it.
"""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":  # what follows takes seconds to import, in which these would end the command without a word
    for _signal in (signal.SIGTERM, signal.SIGINT):
        signal.signal(_signal, lambda *_: (os.write(1, b"stopped\n"), os._exit(0)))

import tyro

from deploy.runtimes.recommended_runtime import RuntimeChoice
from deploy.serving.repository import add_versions, check_repository, versions, write_repository
from deploy.serving.server import running_server
from deploy.serving.serving_options import ListenOptions, ServingOptions
from illama.cli import run_command
from illama.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ServeOptions(ServingOptions, ListenOptions):
    """Write a Triton model repository from bundles, and run the server on it.

    Attributes:
        bundles: each becomes a model under its folder's name; none to run what --out holds.
        out: the repository; an earlier one there is replaced, unless --add is given.
        name: make the bundles successive versions of one model of this name instead.
        add: add the bundles to the repository as new versions of the models that are there.
        version: number of the first version; the next one, or 1, if not given.
        run: start the server and stay until Ctrl-C.
    """

    bundles: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    out: Path = Path("runs/models")
    name: str | None = None
    add: bool = False
    version: int | None = None
    run: bool = False


def main(options: ServeOptions) -> None:
    if options.bundles:
        write(options)
    elif not options.run or not options.out.exists():
        raise UserError("no bundles: give those that python quant/ptq.py wrote, or with --run a repository as --out")
    if options.run:
        serve(options)


def write(options: ServeOptions) -> None:
    """Write the repository, or add to it, and say what is in it."""
    if options.version is not None and not 1 <= options.version < 1 << 31:
        raise UserError("--version is 1 or more, and less than 2^31")
    models = name_models(options.bundles, options.name)
    if options.add:
        add_versions(options.out, models, options, options.version)
    else:
        write_repository(options.out, models, options, options.version or 1)
    for name in models:
        numbers = versions(options.out, name)
        listed = ", ".join(map(str, numbers))
        print(f"{options.out}: {name}, versions {listed}; {options.live_versions} of the newest are served")
        if options.device == "cpu":
            choice = RuntimeChoice.read(options.out / f"{name}-network" / str(numbers[-1]))
            print(f"{name} runs {choice.file.name} in {choice.runtime}, {choice.reason}")


def name_models(bundles: tuple[Path, ...], name: str | None) -> dict[str, tuple[Path, ...]]:
    """The bundles by the model that they are versions of: each is one of its own, unless a name is given.

    Raises:
        UserError: a name that is no folder's name, or one twice.
    """
    models: dict[str, tuple[Path, ...]] = {bundle.resolve().name: (bundle,) for bundle in bundles}
    if name:
        models = {name: bundles}
    elif len(models) < len(bundles):
        raise UserError("two bundles have the same folder name: give --name to make them versions of one model")
    taken = [f"{model}{part}" for model in models for part in ("", "-preprocess", "-network")]
    for model in taken:
        if not re.fullmatch(r"\w[\w.-]{,199}", model, re.ASCII) or taken.count(model) > 1:
            raise UserError(
                f"{model[:200]!r} cannot be a model's name: rename the bundle, or give a --name of up to "
                "180 letters, digits, '_', '-' and '.'"
            )
    return models


def serve(options: ServeOptions) -> None:
    """Run the server until Ctrl-C or SIGTERM; UserError once it no longer answers."""
    check_repository(options.out)
    try:
        with running_server(options.out, options) as server:
            print(
                f"ready: http://{options.address}:{options.http_port}, gRPC {options.grpc_port}, metrics "
                f"{options.metrics_port}; Ctrl-C stops it\n"
                "Triton has no authentication: whoever reaches these ports can use it",
                flush=True,
            )
            server.watch()
    except KeyboardInterrupt:
        print("stopped")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_command(ServeOptions, main)
