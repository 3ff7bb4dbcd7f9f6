"""Runs timm's own tests of models with this project's networks: python benchmarks/timm_model_tests.py --fetch

The tests are in timm's source package, of the installed version, which ``--fetch`` downloads with pip. They choose by
names and modules which models have tokens instead of feature maps, so the networks are registered once more under names
that they take for those of vision transformers. Left out are the tests of TorchScript, which PyTorch has deprecated and
these networks do not support: export them with torch.export.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import types
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from timm.models import generate_default_cfgs, register_model

from illama.cli import run_command
from illama.errors import UserError
from illama.models.config import SIZES
from illama.models.registry import create_for_timm, pretrained_config

_LEFT_OUT = "torchscript"


@dataclass(frozen=True)
class Options:
    """Run timm's tests of models with this project's networks.

    Attributes:
        fetch: download timm's source package with pip if it is not in --out (3 MB).
        sizes: sizes of the networks: nano, tiny, small, base and large.
        out: folder of the source package.
    """

    fetch: bool = False
    sizes: tuple[str, ...] = ("nano", "tiny", "small")
    out: Path = Path("runs/timm-tests")


def pytest_configure() -> None:
    """Registers the networks as ``vit_illama_SIZE``, in a module with the name of timm's vision transformers.

    pytest calls it, with this file as its plugin, before it reads the tests.
    """
    module: Any = types.ModuleType(f"{__name__}.vision_transformer")
    sys.modules[module.__name__] = module
    module.default_cfgs = generate_default_cfgs({f"vit_illama_{size}": pretrained_config(size) for size in SIZES})

    def register(size: str) -> None:
        def create(pretrained: bool = False, **options: Any) -> Any:
            return create_for_timm(size, f"vit_illama_{size}", pretrained, **options)

        create.__name__, create.__module__ = f"vit_illama_{size}", module.__name__
        register_model(create)

    for size in SIZES:
        register(size)


def source_package(options: Options) -> Path:
    """Returns the folder of timm's source package."""
    name = f"timm-{version('timm')}"
    archive = options.out / f"{name}.tar.gz"
    if not archive.exists():
        if not options.fetch:
            raise UserError(f"no {archive}: download it (3 MB) with --fetch")
        command = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(options.out)]
        if subprocess.run([sys.executable, "-m", "pip", *command, name.replace("-", "==")]).returncode:
            raise UserError(f"pip could not download the source package of {name}")
    with tarfile.open(archive) as file:
        wanted = (f"{name}/tests/", f"{name}/pyproject.toml")
        file.extractall(options.out, [each for each in file if each.name.startswith(wanted)], filter="data")
    return options.out / name


def main(options: Options) -> None:
    folder = source_package(options)
    chosen = " or ".join(f"vit_illama_{size}" for size in options.sizes)
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", Path(__file__).stem, "tests/test_models.py"]
    environment = {"PYTHONPATH": f"{Path(__file__).parent.resolve()}:{Path.cwd()}"}
    status = subprocess.run(
        [*command, "-k", f"({chosen}) and not {_LEFT_OUT}"], cwd=folder, env={**os.environ, **environment}
    ).returncode
    if status:
        raise UserError("not all of timm's tests pass")


if __name__ == "__main__":
    run_command(Options, main)
