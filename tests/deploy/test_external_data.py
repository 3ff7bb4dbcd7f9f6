"""Networks whose weights lie beside their ONNX file, through everything that reads one; here from 1 MB."""

import hashlib
import shutil

import numpy as np
import onnx
import pytest
import torch
from step_difference import local_differences

from deploy.rewrites.camera_bundle import write_camera_bundle
from deploy.runtimes.onnxruntime_engine import OnnxRuntimeEngine
from deploy.runtimes.open_engine import open_engine
from deploy.runtimes.openvino_engine import OpenVinoEngine
from deploy.serving.repository import write_repository
from deploy.serving.serving_options import ServingOptions
from deploy.trt.builder import build_engine
from deploy.trt.library import find_library
from eval.cost_model.onnx_costs import product_costs
from eval.measure.targets import find_targets
from illama.bundle import CPU_ONNX, FUSED_ONNX, SHIPPED, data_file, sha256, size_of
from illama.checkpoints.load import load_checkpoint
from illama.errors import UserError
from illama.graph.reader import load_graph
from illama.graph.writer import has_external_data, save_graph
from quant.export.onnx_export import export_onnx
from quant.export.verify import first_mismatch
from quant.quantizers.calibrate import calibrate
from quant.schemes.scheme import resolve, shipped_scheme

MEGABYTE = 10**6
IMAGES = np.random.default_rng(0).normal(size=(4, 1, 28, 28)).astype(np.float32)
library = find_library()


@pytest.fixture(scope="module")
def network():
    model = load_checkpoint(SHIPPED).model
    return model, calibrate(model, resolve(shipped_scheme("int8"), model), [torch.randn(8, 1, 28, 28)])


@pytest.fixture(scope="module")
def bundles(network, tmp_path_factory):
    """Two bundles of one network: with the weights in the file, and beside it."""
    folders = [tmp_path_factory.mktemp(name) / name for name in ("inside", "beside")]
    for folder in folders:
        folder.mkdir()
        shutil.copyfile(SHIPPED / "manifest.json", folder / "manifest.json")
    export_onnx(network[1], folders[0] / CPU_ONNX, "plain")
    save_graph(load_graph(folders[0] / CPU_ONNX), folders[1] / CPU_ONNX, external_above=MEGABYTE)
    export_onnx(network[0], folders[1] / FUSED_ONNX, "fused", torch.float16, MEGABYTE)
    return folders


def test_the_data_is_part_of_the_file(bundles):
    inside, beside = (folder / CPU_ONNX for folder in bundles)
    assert not data_file(inside).exists() and data_file(beside).stat().st_size > MEGABYTE > beside.stat().st_size
    assert size_of(beside) == beside.stat().st_size + data_file(beside).stat().st_size
    assert size_of(beside) == pytest.approx(size_of(inside), rel=0.02)
    assert sha256(beside) == hashlib.sha256(beside.read_bytes() + data_file(beside).read_bytes()).hexdigest()
    assert sha256(inside) == hashlib.sha256(inside.read_bytes()).hexdigest()
    assert product_costs(inside) == product_costs(beside)


def test_every_cpu_runtime_computes_the_same(bundles):
    inside, beside = (folder / CPU_ONNX for folder in bundles)
    for runtime in (OnnxRuntimeEngine, OpenVinoEngine):
        np.testing.assert_array_equal(runtime(inside, 1).infer(IMAGES), runtime(beside, 1).infer(IMAGES))
    fused = OnnxRuntimeEngine(bundles[1] / FUSED_ONNX).infer(IMAGES)
    assert data_file(bundles[1] / FUSED_ONNX).exists() and np.isfinite(fused).all()


def test_the_comparison_with_pytorch(network, bundles):
    assert first_mismatch(local_differences(network[1], bundles[1] / CPU_ONNX, IMAGES)) is None


def test_a_graph_is_written_as_it_was_read(bundles, tmp_path):
    for folder, external in zip(bundles, (False, True), strict=True):
        path = tmp_path / "model.onnx"
        save_graph(load_graph(folder / CPU_ONNX), path)
        assert has_external_data(load_graph(path)) == data_file(path).exists() == external
        expected = OnnxRuntimeEngine(folder / CPU_ONNX, 1).infer(IMAGES)
        np.testing.assert_array_equal(OnnxRuntimeEngine(path, 1).infer(IMAGES), expected)
    save_graph(load_graph(bundles[0] / CPU_ONNX), path)
    assert not data_file(path).exists()  # of the larger file that was there


def test_frames_serving_and_the_benchmark(bundles, tmp_path):
    bundle = bundles[1]
    write_camera_bundle(bundle, (40, 40, 1), tmp_path / "camera")
    assert {data_file(tmp_path / "camera" / name).exists() for name in (CPU_ONNX, FUSED_ONNX)} == {True}
    frame = np.random.default_rng(0).integers(0, 256, (1, 40, 40, 1), dtype=np.uint8)
    assert np.isfinite(open_engine(tmp_path / "camera", "openvino").infer(frame)).all()
    write_repository(tmp_path / "models", {"nano": [bundle]}, ServingOptions())
    version = tmp_path / "models" / "nano-network" / "1"
    assert sha256(version / CPU_ONNX) == sha256(bundle / CPU_ONNX) and data_file(version / CPU_ONNX).exists()
    assert {target.path.name for target in find_targets([bundle])} == {CPU_ONNX, FUSED_ONNX}


@pytest.mark.skipif(library is None, reason="no TensorRT that can build is installed")
def test_an_engine_is_built(bundles):
    assert build_engine(library, bundles[1] / FUSED_ONNX).attentions == 6


def test_missing_and_truncated_data_is_one_error(bundles, tmp_path):
    for damage in ("missing", "truncated"):
        bundle = tmp_path / damage
        shutil.copytree(bundles[1], bundle)
        data = data_file(bundle / CPU_ONNX)
        data.unlink() if damage == "missing" else data.write_bytes(data.read_bytes()[:-1])
        for runtime in ("onnxruntime", "openvino"):
            with pytest.raises(UserError, match=r"model\.onnx\.data"):
                open_engine(bundle, runtime)


def test_one_changed_weight_changes_the_hash(bundles, tmp_path):
    shutil.copytree(bundles[1], tmp_path / "bundle")
    data = data_file(tmp_path / "bundle" / CPU_ONNX)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert sha256(tmp_path / "bundle" / CPU_ONNX) != sha256(bundles[1] / CPU_ONNX)
    assert onnx.load(tmp_path / "bundle" / CPU_ONNX, load_external_data=False).graph.node
