"""Engines: really built, proven fused, and refused when they cannot be."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from conftest import SMALL, assert_one_line_error, run_command, write_bundle

from deploy.build import build_bundle, build_engine, build_fitting
from deploy.engines import OnnxRuntimeEngine
from deploy.library import find_library
from illama import ILLaMA, ModelConfig
from illama.bundle import FUSED_ONNX
from illama.errors import UserError
from quant.calibrate import calibrate
from quant.export import export_onnx
from quant.schemes import SCHEMES

library = find_library()
needs_library = pytest.mark.skipif(library is None, reason="neither tensorrt nor tensorrt-rtx is installed")
pytestmark = needs_library
BATCH = (1, 8, 64)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ILLaMA(SMALL).eval()


@pytest.fixture
def bundle(tmp_path, model):
    folder = write_bundle(tmp_path / "bundle", SMALL, model.state_dict())
    export_onnx(model, folder / FUSED_ONNX, "fused", torch.float16)
    return folder


def test_an_engine_and_what_is_written_beside_it(bundle, model):
    record = build_bundle(library, bundle)
    path = bundle / "engines" / f"{library.name}.engine"
    written = json.loads(path.with_suffix(".json").read_text())
    assert written["engine_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert written["onnx_sha256"] == hashlib.sha256((bundle / FUSED_ONNX).read_bytes()).hexdigest()
    assert record.fused_attentions == model.config.depth
    assert written["input_shape"] == [3, 32, 32]
    assert written["preprocessing"]["mean"] and written["classes"] == ["class0", "class1", "class2"]


@pytest.mark.parametrize("mask", ["pre_softmax", "bidirectional"])
def test_the_other_masks_fuse_too(mask, tmp_path):
    config = ModelConfig.from_dict({**SMALL.to_dict(), "mask": mask})
    export_onnx(ILLaMA(config), tmp_path / "model.onnx", "fused", torch.float16)
    assert build_engine(library, tmp_path / "model.onnx", (), BATCH)[1] == config.depth


NANO = [("nano", name) for name in ("int8", "int8-attention", "fp8", "w4a16")]


@pytest.mark.parametrize(("size", "name"), [*NANO, ("tiny", "int8"), ("tiny", "fp8-attention")])
def test_quantized_attention_fuses(size, name, tmp_path):
    torch.manual_seed(0)
    config = ModelConfig.preset(size, depth=2)
    model = ILLaMA(config).eval()
    images = torch.randn(2, config.in_channels, config.image_size, config.image_size)
    export_onnx(
        calibrate(model, replace(SCHEMES[name], learned=0), [images]), tmp_path / "model.onnx", "fused", torch.float16
    )
    targets = ("sm89", "sm120") if library.name == "tensorrt_rtx" else ()
    engine, fused = build_engine(library, tmp_path / "model.onnx", targets, BATCH)
    assert fused == 2 and len(engine) > 100_000


def test_attention_that_no_kernel_fuses_fails_the_build(model, tmp_path):
    export_onnx(model, tmp_path / "model.onnx", "fused")  # float32: there is no fused kernel
    with pytest.raises(UserError, match="cannot build"):
        build_engine(library, tmp_path / "model.onnx", (), BATCH)


def test_attention_in_pieces_fails_the_build(model, tmp_path):
    export_onnx(model, tmp_path / "model.onnx", "plain", torch.float16)
    with pytest.raises(UserError, match="not one Attention operator"):
        build_engine(library, tmp_path / "model.onnx", (), BATCH)


@pytest.mark.skipif(library is None or library.name != "tensorrt_rtx", reason="targets are TensorRT for RTX's")
def test_targets_that_cannot_be(bundle, model, tmp_path):
    with pytest.raises(UserError, match="unknown target 'sm12'"):
        build_fitting(library, bundle, ("sm12",))
    export_onnx(
        calibrate(model, SCHEMES["fp8"], [torch.randn(2, 3, 32, 32)]), bundle / FUSED_ONNX, "fused", torch.float16
    )
    assert build_fitting(library, bundle, ("sm86",)) == (None, ("sm86",))
    assert not (bundle / "engines").exists()
    record, unfit = build_fitting(library, bundle, ("sm86", "sm89"))
    assert record.targets == ("sm89",) and unfit == ("sm86",)


def test_the_command(bundle, tmp_path):
    result = run_command("deploy/build.py", bundle)
    assert result.returncode == 0, result.stderr
    assert "2 fused attentions" in result.stdout
    (bundle / FUSED_ONNX).write_bytes(b"not a graph")
    assert_one_line_error(run_command("deploy/build.py", bundle), "ONNX")
    assert_one_line_error(run_command("deploy/build.py", tmp_path / "nowhere"), "has no model.fused.onnx")


def test_a_file_onnx_runtime_cannot_load(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(UserError, match="cannot load"):
        OnnxRuntimeEngine(tmp_path / "model.onnx")
