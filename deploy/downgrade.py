"""Rewrite the graphs of bundles in an older ONNX opset, for runtimes that do not load opset 23:

python deploy/downgrade.py runs/ptq --for jetpack-6
python deploy/downgrade.py runs/ptq/int8 --opset 17 --out runs/opset-17

Weights, scales and golden answers stay the same (deploy/rewrites/lower_opset.py). Which runtime loads which opset is in
deploy/versions.yaml.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from illama.cli import run_command
from deploy.opset_options import OpsetOptions
from illama.errors import UserError
from illama.options import Flat


@dataclass(frozen=True)
class DowngradeOptions:
    """Write copies of bundles whose graphs load in older runtimes.

    Attributes:
        bundles: paths to bundles of python quant/ptq.py, or to folders of bundles such as runs/ptq.
        opset: the opset.
        out: folder of the new bundles. Defaults to runs/NAME, such as runs/jetpack-6.
    """

    bundles: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    opset: Flat[OpsetOptions] = field(default_factory=OpsetOptions)
    out: Path | None = None

    def __post_init__(self) -> None:
        if not self.bundles:
            raise UserError("no bundle given: python deploy/downgrade.py runs/ptq/int8 --for jetpack-6")
        if not self.opset.target:
            raise UserError("no runtime given: --for jetpack-6, for example, or --opset 17")


def main(options: DowngradeOptions) -> None:
    # Imported here, so that --help does not wait for ONNX.
    from deploy.rewrites.older_bundle import GRAPHS, NotForTargetError, write_older_bundle
    from deploy.trt.build_bundle import expand_bundles

    target = options.opset.target
    assert target is not None
    out = options.out or Path("runs") / target.name
    bundles, written = expand_bundles(options.bundles, GRAPHS), 0
    names = [bundle.resolve().name for bundle in bundles]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(
            f"two bundles are called {twice}, and {out / twice} can be only one of them: give one at a time"
        )
    for bundle, name in zip(bundles, names, strict=True):
        try:
            lines = write_older_bundle(bundle, target, out / name)
        except NotForTargetError as error:
            if len(bundles) == 1:
                raise
            print(f"{bundle} is skipped: {error}")
            continue
        written += 1
        print("\n  ".join([f"{out / name}", *lines]))
    if not written:
        raise UserError(f"no bundle could be written for {target.name}")


if __name__ == "__main__":
    run_command(DowngradeOptions, main)
