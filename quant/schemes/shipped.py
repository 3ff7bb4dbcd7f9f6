"""The shipped schemes: YAML files in this folder. Imports nothing slow, so that listing them is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import yaml

from illama.errors import UserError

_INT8 = ("int8", "int8-accurate", "int8-attention", "int8-weight-only")
_FEWER_BITS_OR_FP8 = ("fp8", "fp8-attention", "mixed", "w4a8", "w4a16", "w6a6", "w4a4")
_BLOCKS = ("mxfp8", "nvfp4", "nvfp4-weight-only")
_TORCHAO = ("int8-dynamic", "int8-weight-only-torchao", "fp8-weight-only-torchao", "w4a8-dynamic", "w4a16-torchao")
SHIPPED_SCHEMES = (*_INT8, *_FEWER_BITS_OR_FP8, *_BLOCKS, *_TORCHAO)  # in the order of python quant/list_schemes.py


def check_scheme(name: str) -> str:
    """Returns the name or file of a scheme; raises UserError if there is no such scheme."""
    if not (name.endswith((".yaml", ".yml")) and Path(name).exists()):
        shipped_path(name)
    return name


SchemeName = Annotated[str, check_scheme]  # of a shipped scheme, or a path to a YAML file


def shipped_path(name: str) -> Path:
    """Returns the path to the file of a shipped scheme; raises UserError if there is no such scheme."""
    if name not in SHIPPED_SCHEMES:
        raise UserError(
            f"unknown scheme {name!r}: give a YAML file that exists, or one of {', '.join(SHIPPED_SCHEMES)}"
        )
    return Path(__file__).parent / f"{name}.yaml"


def summaries() -> dict[str, str]:
    """Returns the summary of every shipped scheme, by name."""
    return {name: yaml.safe_load(shipped_path(name).read_text())["summary"] for name in SHIPPED_SCHEMES}
