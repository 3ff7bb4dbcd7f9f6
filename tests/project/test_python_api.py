"""The toolkit from Python: a network in memory to a bundle, an engine and a report."""

import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from support import ROOT, SMALL, write_images

from deploy import build
from deploy.runtimes.open_engine import open_engine
from eval import benchmark
from illama import ILLaMA
from illama.errors import UserError
from illama.manifest import Manifest
from quant import quantize


def _batches(size=32, count=2):
    return list(torch.randn(count, 8, 3, size, size, generator=torch.Generator().manual_seed(0)))


def test_the_example(tmp_path):
    """As it is, but for the time that its report takes to time the files."""
    write_images(tmp_path / "pictures")
    example = ROOT / "examples" / "python" / "quantize_in_memory.py"
    script = (
        "import functools, runpy, sys, eval; eval.benchmark = functools.partial(eval.benchmark, seconds=0.1);"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", script, str(example), "pictures"]
    result = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
    assert (tmp_path / "runs" / "example-report" / "report.html").exists()


def test_a_network_in_memory_becomes_a_bundle_that_runs(tmp_path):
    torch.manual_seed(0)
    model = ILLaMA(SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bundle = quantize(model, [(batch, None) for batch in _batches()], "int8", tmp_path / "out", classes="abc")
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    manifest = Manifest.read(bundle)
    assert (manifest.classes, manifest.quantization.scheme) == (("a", "b", "c"), "int8")
    assert {path.name for path in bundle.parent.iterdir()} == {"fp32", "fp16", "int8"}
    images = _batches()[0].numpy()
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(images)).numpy()
    actual = open_engine(bundle.parent / "fp32").infer(images)
    np.testing.assert_allclose(actual, expected, atol=0.05 * np.abs(expected).max())


def test_a_timm_network_keeps_its_preprocessing(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32, depth=2)
    bundle = quantize(model, _batches(), out=tmp_path / "out")
    config = timm.data.resolve_model_data_config(model)
    assert Manifest.read(bundle).preprocessing.mean == config["mean"]
    engine = build(bundle, ["sm89"], (1, 1, 2))
    assert engine == build(bundle, ["sm89"], (1, 1, 2)) and engine.exists()


def test_an_interrupted_call_continues_and_another_network_does_not(tmp_path, monkeypatch, capsys):
    """It ends while the last bundle is written: the float references are kept, for the same network alone."""
    out, model = tmp_path / "out", ILLaMA(SMALL)
    with monkeypatch.context() as broken:
        broken.setattr("quant.export.write_bundle.write_scheme", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize(model, _batches(), out=out)
    with pytest.raises(UserError, match="digest"):
        quantize(ILLaMA(SMALL), _batches(), out=out)
    capsys.readouterr()
    bundle = quantize(model, _batches(), out=out)
    assert (
        "fp16, fp32 done" in capsys.readouterr().out and bundle.exists() and not out.with_name("out.partial").exists()
    )


@pytest.mark.parametrize(
    ("loader", "word"),
    [
        ([], "no images"),
        ([torch.zeros(2, 3, 16, 16)], "(2, 3, 16, 16)"),
        ([torch.zeros(2, 3, 32, 32, dtype=torch.uint8)], "uint8"),
        (["text"], "str"),
    ],
)
def test_loaders_that_do_not_fit(loader, word, tmp_path):
    with pytest.raises(UserError, match=word.replace("(", r"\(").replace(")", r"\)")):
        quantize(ILLaMA(SMALL), loader, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_networks_and_bundles_that_are_not_supported(tmp_path):
    with pytest.raises(UserError, match="Linear"):
        quantize(torch.nn.Linear(2, 2), _batches(), out=tmp_path / "out")
    with pytest.raises(UserError):
        build(tmp_path, ["sm89"])
    with pytest.raises(UserError):
        benchmark([tmp_path / "nowhere"])
