"""Check any ONNX file of a vision transformer before it is deployed:

python deploy/lint.py vit.onnx
python deploy/lint.py runs/ptq/int8/model.fused.onnx --for jetpack-6
python deploy/lint.py exported/*.onnx --for tensorrt-10.16 --format json --fail-on warning

Finds what keeps it from loading, what costs accuracy, and what costs speed. Nothing is run (docs/lint.md).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from illama.cli import run_command
from deploy.opset_options import TargetName
from illama.errors import UserError
from illama.options import Existing


@dataclass(frozen=True)
class LintOptions:
    """Check ONNX files for faults that cost accuracy or speed, or keep a runtime from loading them.

    Exits with 1 if there is a finding of the severity of --fail-on.

    Attributes:
        files: paths to ONNX files, or to bundles, whose graphs are checked.
        load_in: check what the runtimes of jetpack-5, jetpack-6.0, jetpack-6 (6.1 and 6.2), jetpack-7.0 or jetpack-7
            (7.2) load, or one runtime, such as tensorrt-10.16, onnxruntime-1.23 or openvino-2026.3.
        format: text for people, or json.
        fail_on: severity from which the exit status is 1.
    """

    files: Annotated[tuple[Existing, ...], tyro.conf.Positional] = ()
    load_in: Annotated[TargetName | None, tyro.conf.arg(name="for")] = None
    format: Literal["text", "json"] = "text"
    fail_on: Literal["error", "warning", "never"] = "error"

    def __post_init__(self) -> None:
        if not self.files:
            raise UserError("no file given: python deploy/lint.py vit.onnx")


def main(options: LintOptions) -> None:
    # Imported here, so that --help does not wait for ONNX.
    from deploy.findings.finding import SEVERITIES
    from deploy.findings.show import lint_files, to_json, to_text

    results = lint_files(options.files, options.load_in)
    print(to_json(results) if options.format == "json" else to_text(results))
    failing = () if options.fail_on == "never" else SEVERITIES[: SEVERITIES.index(options.fail_on) + 1]
    if any(each.severity in failing for findings in results.values() for each in findings):
        sys.exit(1)


if __name__ == "__main__":
    run_command(LintOptions, main)
