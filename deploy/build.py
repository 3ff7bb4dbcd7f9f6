"""Build TensorRT engines from bundles:

python deploy/build.py runs/ptq/int8 --targets sm86,sm89 --batch 1:8:64
python deploy/build.py runs/ptq --targets sm89 --batch 1

With tensorrt-rtx installed, no GPU is needed. The build fails unless every attention becomes one fused operator in the
precision of the scheme (deploy/trt/fusion.py).
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from illama.cli import run_command
from deploy.trt.engine_options import EngineOptions, LibraryName
from illama.bundle import as_run
from illama.errors import UserError


@dataclass(frozen=True)
class BuildOptions(EngineOptions):
    """Build a TensorRT engine for each bundle that `python quant/ptq.py` wrote.

    Writes BUNDLE/engines/NAME/, with the engine, the record of how it was built, and its golden answers.

    An engine that was built from the same graph, by the same library and with the same options, is kept.

    Attributes:
        bundles: paths to bundles with a model.fused.onnx, or to folders of bundles such as runs/ptq.
        library: tensorrt or tensorrt_rtx. Defaults to the first of the two that can build here.
        name: name of the engine's folder in the bundle's engines/. Defaults to LIBRARY-TARGETS-BATCH.
    """

    bundles: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    library: LibraryName | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name is not None and not re.fullmatch(r"\w[\w.+-]{,99}", self.name, re.ASCII):
            raise UserError(f"--name must consist of letters, digits and ._+-, not {self.name!r}")
        if not self.bundles:
            raise UserError("no bundle given: python deploy/build.py runs/ptq/int8")


def main(options: BuildOptions) -> None:
    # Imported here, so that --help does not wait for the libraries.
    from deploy.runtimes.recommended_runtime import note_unmeasured
    from deploy.trt.build_bundle import build_supported, expand_bundles
    from deploy.trt.library import require_library
    from deploy.trt.record import EngineRecord
    from illama.progress import Activity

    library = require_library(options.library)
    for bundle in expand_bundles(options.bundles):
        with Activity(f"build {bundle.name} engine"):
            path, reason = build_supported(library, bundle, options, options.name)
        if reason:
            print(f"{bundle}: {reason}; use INT8 there")
        if path:
            record = EngineRecord.read(path)
            attentions = "fused attentions" if record.fused else "attentions, possibly decomposed"
            print(f"{path}: {record.engine_bytes / 1e6:.1f} MB, {record.attentions} {attentions}")
            if note := note_unmeasured(path, bundle):
                print(f"  {as_run(note)}")
            print(f"  with NVIDIA's own tool: cd {shlex.quote(str(bundle))} && {record.trtexec}")


if __name__ == "__main__":
    run_command(BuildOptions, main)
