"""Fixtures: the released code's own outputs, a small trained-shape bundle, small image folders, real commands."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side; one thread each is fastest

import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support import ROOT, SMALL, write_bundle, write_images, write_linear_bundle

from illama import ILLaMA, ModelConfig
from illama.data.datasets import open_data

PARITY = sorted((ROOT / "tests" / "data").glob("official_*.safetensors"))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and there is none here"))


class Parity:
    """One file of the released code's outputs: its network, input, logits and features."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            facts = {name: int(value) for name, value in file.metadata().items()}
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.config = ModelConfig(
            image_size=facts["image_size"],
            patch_size=facts["patch_size"],
            width=facts["dim"],
            depth=facts["depth"],
            heads=facts["heads"],
            num_classes=facts["num_classes"],
        )
        self.state = {name[6:]: t for name, t in self.tensors.items() if name.startswith("state.")}
        self.input = self.tensors["input"]

    def model(self) -> ILLaMA:
        model = ILLaMA(self.config).eval()
        model.load_state_dict(self.state)
        return model


@pytest.fixture(params=PARITY, ids=lambda path: path.stem)
def parity(request):
    return Parity(request.param)


@pytest.fixture
def wide_parity():
    return Parity(ROOT / "tests" / "data" / "official_wide.safetensors")


@pytest.fixture
def small_bundle(tmp_path):
    return write_bundle(tmp_path / "bundle", SMALL)


@pytest.fixture
def overflow(tmp_path):
    """A bundle whose every logit is infinite or no number."""
    return write_linear_bundle(tmp_path / "overflow", np.full((768, 3), np.inf), 16, ["class0", "class1", "class2"])


@pytest.fixture
def image_folder(tmp_path):
    return write_images(tmp_path / "images")


@pytest.fixture
def run_here(monkeypatch, capfd):
    """A real command in this process, for the many that would only wait for torch to be imported again."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
        status = 0
        try:
            runpy.run_path(str(ROOT / str(arguments[0])), run_name="__main__")
        except SystemExit as end:
            status = int(end.code or 0)
        return subprocess.CompletedProcess(arguments, status, *capfd.readouterr())

    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="session")
def real_images():
    """300 real test images, as the shipped checkpoint takes them, and their labels."""
    from illama.inference import load_images

    data = open_data("fashion-mnist")
    subset = torch.utils.data.Subset(data.test(), range(300))
    return load_images(subset, data.preprocessing(28, 1).transform())
