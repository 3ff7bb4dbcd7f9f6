"""Real TensorRT builds: fused attention, records that verify the engines, and graph rewrites."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from sample_report import make_report, make_row
from support import ROOT, SMALL, assert_one_line_error, run_command, write_bundle, write_made_up_engine

from deploy.rewrites.openvino_graph import (
    fold_factors,
    fold_zero_points,
    has_matrix_unit,
    keep_inputs_float,
    select_rewrites,
    split_products,
)
from deploy.runtimes.open_engine import open_engine
from deploy.trt.build_bundle import build_bundle, build_supported, expand_bundles
from deploy.trt.builder import _read_timing_cache, build_engine, trtexec_line
from deploy.trt.engine_options import EngineOptions, read_batch
from deploy.trt.fusion import fused_kernels, quantize_softmax_outputs
from deploy.trt.library import find_library
from deploy.trt.record import FORMAT, EngineRecord, find_engines
from illama import ILLaMA, ModelConfig
from illama.atomic_write import read_pinned, write_pinned
from illama.bundle import FUSED_ONNX, bundle_of, sha256
from illama.errors import UserError
from illama.graph.reader import SoftmaxOutput, array, load_graph, precisions, read_softmax_scales, to_bytes
from quant.export.onnx_export import export_onnx
from quant.quantizers.calibrate import calibrate
from quant.schemes.scheme import resolve, shipped_scheme

library = find_library()
needs_library = pytest.mark.skipif(library is None, reason="no TensorRT that can build is installed")
needs_rtx = pytest.mark.skipif(
    library is None or library.name != "tensorrt_rtx", reason="TensorRT for RTX is not installed"
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ILLaMA(SMALL).eval()


@pytest.fixture
def bundle(tmp_path, model):
    folder = write_bundle(tmp_path / "bundle", SMALL, model.state_dict())
    export_onnx(model, folder / FUSED_ONNX, "fused", torch.float16)
    return folder


def export_quantized(config, scheme, path, form="fused", dtype=torch.float16):
    torch.manual_seed(0)
    model = ILLaMA(config).eval()
    images = torch.randn(2, config.in_channels, config.image_size, config.image_size)
    export_onnx(
        calibrate(model, resolve(replace(shipped_scheme(scheme), reconstruction_iterations=0), model), [images]),
        path,
        form,
        dtype,
    )
    return model


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@needs_library
def test_an_engine_and_its_record(bundle, model):
    path = build_bundle(library, bundle, EngineOptions(batch=(1, 2, 4)))
    record = EngineRecord.read(path)
    assert (record.engine_sha256, record.onnx_sha256) == (sha256(path), sha256(bundle / FUSED_ONNX))
    assert record.engine_bytes == path.stat().st_size
    assert record.fused and record.attentions == model.config.depth
    assert record.batch == (1, 2, 4)
    assert record.inputs == {"images": ("float", (-1, 3, 32, 32))} and record.outputs == {"logits": ("float", (-1, 3))}
    assert record.preprocessing["mean"] and record.classes == ["class0", "class1", "class2"]
    assert record.precisions["blocks.0.attn.qkv"] == "fp16"
    assert "--optShapes=images:2x3x32x32" in record.trtexec
    assert f"--onnx={FUSED_ONNX} --saveEngine=engines/{path.parent.name}/model.engine " in record.trtexec
    assert names(path.parent) == ["model.engine", "record.json"] and names(bundle / "engines") == [path.parent.name]


@needs_library
def test_engines_with_different_options_are_kept(bundle):
    """Each has a folder named after its options; an engine of an earlier version, which is a file, is kept too."""
    portable = build_bundle(library, bundle)
    small = build_bundle(library, bundle, EngineOptions(batch=(1, 1, 1)))
    named = build_bundle(library, bundle, EngineOptions(refit=library.name == "tensorrt"), "mine")
    old = bundle / "engines" / f"{library.name}.engine"
    write_made_up_engine(old, library=library.name)
    assert len({portable, small, named, old}) == 4 and named.parent.name == "mine"
    assert set(find_engines(bundle)) == set(find_engines(bundle, library.name)) == {portable, small, named, old}
    if library.name == "tensorrt_rtx":
        assert portable.parent.name == "tensorrt_rtx-portable-1.8.64"
        both, again = (
            build_supported(library, bundle, EngineOptions(targets))[0]
            for targets in (("sm89,sm86",), ("sm86", "sm89", "sm89"))
        )
        assert both == again and both.parent.name == "tensorrt_rtx-sm86.sm89-1.8.64"
    assert {bundle_of(path) for path in (portable, portable.parent, old, bundle / FUSED_ONNX, bundle)} == {bundle}
    for path in find_engines(bundle):
        assert EngineRecord.read(path)


@needs_library
def test_an_engine_is_not_built_again_from_unchanged_inputs(bundle, capsys):
    path = build_bundle(library, bundle)
    written = path.stat().st_mtime_ns
    assert str(path) not in capsys.readouterr().out
    assert build_bundle(library, bundle) == path and path.stat().st_mtime_ns == written
    assert str(path) in capsys.readouterr().out
    old = bundle / "engines" / f"{library.name}.engine"  # as an earlier version wrote it
    path.rename(old)
    (path.parent / "record.json").rename(old.with_suffix(".json"))
    path.parent.rmdir()
    assert build_bundle(library, bundle) == old
    assert build_bundle(library, bundle, name="mine") == bundle / "engines" / "mine" / "model.engine"


@needs_library
def test_an_engine_is_not_replaced_by_one_with_other_options(bundle, capsys):
    path = build_bundle(library, bundle, name="mine")
    written = path.stat().st_mtime_ns
    with pytest.raises(UserError, match="--name"):
        build_bundle(library, bundle, EngineOptions(batch=(1, 1, 1)), "mine")
    export_quantized(SMALL, "int8", bundle / FUSED_ONNX)
    with pytest.raises(UserError, match="--name"):
        build_bundle(library, bundle, name="mine")
    assert path.stat().st_mtime_ns == written
    notes = bundle / "engines" / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="--name"):
        build_bundle(library, bundle, name="notes")
    assert (notes / "mine.txt").read_text() == "precious"


def damage_engine(path):
    path.write_bytes(path.read_bytes()[:-1])


def damage_record(path):
    path.with_name("record.json").write_text("{")


def lose_record(path):
    path.with_name("record.json").unlink()


def lose_engine(path):
    path.unlink()


def from_the_future(path):
    record = path.with_name("record.json")
    record.write_text(json.dumps({**json.loads(record.read_text()), "format": FORMAT + 1}))


DAMAGES = {
    damage_engine: r"SHA-256.*record\.json",
    damage_record: r"record\.json",
    lose_record: r"record\.json",
    lose_engine: r"model\.engine",
    from_the_future: rf"record\.json.* {FORMAT + 1}",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_engine_that_does_not_match_its_record_is_rejected(damage, tmp_path):
    path = tmp_path / "engines" / "mine" / "model.engine"
    write_made_up_engine(path)
    assert EngineRecord.read(path)
    damage(path)
    with pytest.raises(UserError, match=DAMAGES[damage]):
        EngineRecord.read(path)


@needs_library
def test_an_invalid_engine_is_built_again(bundle, capsys):
    path = build_bundle(library, bundle)
    for damage in DAMAGES:
        damage(path)
        capsys.readouterr()
        assert build_bundle(library, bundle) == path and EngineRecord.read(path)
        assert str(path.parent) in capsys.readouterr().out
    assert names(bundle / "engines") == [path.parent.name]


def test_the_engines_of_a_bundle(tmp_path):
    """Also of a bundle in a folder named engines, and without the drafts of killed processes."""
    bundle = write_bundle(tmp_path / "engines" / "bundle", SMALL)
    assert find_engines(bundle) == [] and bundle_of(bundle) == bundle_of(bundle / "model.safetensors") == bundle
    folder = bundle / "engines"
    rtx, full, old, unknown = (
        folder / name for name in ("b/model.engine", "c/model.engine", "a.engine", "d/model.engine")
    )
    for path in (rtx, old):
        write_made_up_engine(path, library="tensorrt_rtx")
    for path in (full, unknown, folder / ".b.draft-0123456789abcdef" / "model.engine"):
        write_made_up_engine(path)
    (folder / "labels.txt").write_text("class0")
    (folder / "empty").mkdir()
    damage_record(unknown)
    assert find_engines(bundle) == [old, rtx, full, unknown]
    assert find_engines(bundle, "tensorrt") == [full, unknown]
    assert find_engines(bundle, "tensorrt_rtx") == [old, rtx, unknown]
    assert {bundle_of(path) for path in (rtx, rtx.parent, old, folder)} == {bundle}


@pytest.mark.gpu
@needs_library
def test_weight_stripped_engines_are_smaller_and_are_refitted_when_they_are_loaded(bundle, model):
    images = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    whole = build_bundle(library, bundle)
    expected = open_engine(whole).infer(images)
    stripped = build_bundle(library, bundle, EngineOptions(weight_stripped=True), "stripped")
    assert stripped.stat().st_size < whole.stat().st_size - (bundle / FUSED_ONNX).stat().st_size / 2
    np.testing.assert_allclose(open_engine(stripped).infer(images), expected, atol=1e-2)


@needs_library
def test_workspace_and_verbosity_are_recorded(bundle):
    record = EngineRecord.read(build_bundle(library, bundle, EngineOptions(workspace_gib=0.5, verbosity="detailed")))
    assert record.options["workspace_gib"] == 0.5 and record.options["verbosity"] == "detailed"


@needs_library
@pytest.mark.parametrize("mask", ["post_softmax", "pre_softmax", "bidirectional"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_with_every_mask_is_fused_in_half_precision(mask, dtype, tmp_path):
    config = ModelConfig(**{**SMALL.to_dict(), "mask": mask})
    export_onnx(ILLaMA(config), tmp_path / "model.onnx", "fused", dtype)
    built = build_engine(library, tmp_path / "model.onnx")
    assert built.fused and built.attentions == config.depth


@needs_library
@pytest.mark.parametrize(
    ("size", "name"), [("nano", "int8"), ("nano", "w4a16"), ("tiny", "fp8"), ("tiny", "fp8-attention")]
)
def test_attention_of_quantized_networks_is_fused(size, name, tmp_path):
    config = ModelConfig.preset(size, depth=2)
    export_quantized(config, name, tmp_path / "model.onnx")
    targets = ("sm89", "sm120") if library.name == "tensorrt_rtx" else ()
    built = build_engine(library, tmp_path / "model.onnx", EngineOptions(targets))
    assert built.fused and built.attentions == 2 and len(built.data) > 100_000


@needs_rtx
@pytest.mark.parametrize("mask", ["post_softmax", "pre_softmax", "bidirectional"])
def test_fp8_attention_is_fused_and_int8_attention_is_rejected_by_rtx(mask, tmp_path):
    """TensorRT for RTX has no INT8 attention kernel, so the builder rejects the precision of the scheme."""
    config = ModelConfig.preset("tiny", depth=2, num_classes=3, mask=mask)
    export_quantized(config, "fp8-attention", tmp_path / "fp8.onnx")
    output = read_softmax_scales(load_graph(tmp_path / "fp8.onnx"))["blocks.0.attn.core"]
    assert output == SoftmaxOutput("fp8", pytest.approx(1 / 448))
    graph = load_graph(tmp_path / "fp8.onnx")
    quantize_softmax_outputs(graph)
    assert operators(graph)["TRT_QuantizedAttention"] == 2 and operators(graph)["Attention"] == 0
    assert build_engine(library, tmp_path / "fp8.onnx", EngineOptions(("sm89",))).fused
    export_quantized(config, "int8-attention", tmp_path / "int8.onnx")
    with pytest.raises(UserError, match=r"int8\.onnx"):
        build_engine(library, tmp_path / "int8.onnx", EngineOptions(("sm89",)))
    unfused = build_engine(library, tmp_path / "int8.onnx", EngineOptions(("sm89",), allow_unfused=True))
    assert not unfused.fused and unfused.attentions == 2


@needs_library
def test_attention_without_a_fused_kernel_fails_the_build(model, tmp_path):
    export_onnx(model, tmp_path / "model.onnx", "fused")  # float32: there is no fused kernel
    with pytest.raises(UserError, match=r"model\.onnx"):
        build_engine(library, tmp_path / "model.onnx")
    assert not build_engine(library, tmp_path / "model.onnx", EngineOptions(allow_unfused=True)).fused


@needs_library
def test_attention_as_separate_operators_fails_the_build(model, tmp_path):
    export_onnx(model, tmp_path / "model.onnx", "plain", torch.float16)
    with pytest.raises(UserError, match="--allow-unfused"):
        build_engine(library, tmp_path / "model.onnx")


@pytest.mark.parametrize(("text", "batch"), [("1:8:64", (1, 8, 64)), ("4", (4, 4, 4)), ("1:2", None), ("x", None)])
def test_a_batch_is_three_numbers_or_one(text, batch):
    if batch:
        assert read_batch(text) == batch
    else:
        with pytest.raises(UserError, match=text):
            read_batch(text)


def test_a_folder_of_bundles_stands_for_those_with_a_graph_for_tensorrt(bundle, tmp_path):
    folder = tmp_path / "all"
    for name in ("b", "a"):
        shutil.copytree(bundle, folder / name)
    shutil.copytree(bundle, folder / "cpu")
    (folder / "cpu" / FUSED_ONNX).unlink()
    assert expand_bundles([folder, bundle]) == [folder / "a", folder / "b", bundle]
    (tmp_path / "empty").mkdir()
    for wrong in ("nowhere", "empty"):
        with pytest.raises(UserError, match=wrong):
            expand_bundles([tmp_path / wrong])


@needs_rtx
def test_targets_and_options_that_are_rejected(bundle):
    with pytest.raises(UserError, match="sm12"):
        build_supported(library, bundle, EngineOptions(("sm12",)))
    for jetson in ("sm87", "orin", "Thor"):
        with pytest.raises(UserError, match="JetPack"):
            build_supported(library, bundle, EngineOptions((jetson,)))
    with pytest.raises(UserError, match="--timing-cache"):
        build_bundle(library, bundle, EngineOptions(timing_cache=bundle / "cache"))
    with pytest.raises(UserError, match="--hardware-compatible"):
        build_bundle(library, bundle, EngineOptions(hardware_compatible=True))
    with pytest.raises(UserError, match="--version-compatible"):
        build_bundle(library, bundle, EngineOptions(version_compatible=True))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--weight-stripped"):
            build_bundle(library, bundle, EngineOptions(weight_stripped=True))
    with pytest.raises(UserError, match="tensorrt"):
        find_library("tensorrt")
    wrong = {"timing_cache": bundle}, {"timing_cache": bundle / "no" / "cache"}
    for options in ({"batch": (4, 2, 8)}, {"batch": (0, 1, 1)}, {"workspace_gib": 0.0}, *wrong):
        with pytest.raises(UserError, match=r"--batch|--workspace-gib|--timing-cache"):
            EngineOptions(**options)
    export_quantized(SMALL, "fp8", bundle / FUSED_ONNX)
    path, reason = build_supported(library, bundle, EngineOptions(("sm86",)))
    assert path is None and "sm86" in reason and not (bundle / "engines").exists()
    path, reason = build_supported(library, bundle, EngineOptions(("sm86", "sm89")))
    assert EngineRecord.read(path).targets == ("sm89",) and "sm86" in reason and "FP8" in reason


@needs_rtx
@pytest.mark.parametrize("scheme", ["nvfp4", "nvfp4-weight-only", "mxfp8"])
def test_engines_with_block_scales(scheme, bundle):
    """Every attention is fused. By default, NVFP4 is built for the GPUs that have it."""
    export_quantized(SMALL, scheme, bundle / FUSED_ONNX)
    path, reason = build_supported(library, bundle)
    record = EngineRecord.read(path)
    first = {"mxfp8": ()}.get(scheme, ("sm120", "sm121"))
    assert record.fused and record.attentions == SMALL.depth and (record.targets, reason) == (first, "")
    path, reason = build_supported(library, bundle, EngineOptions(("sm86",)))
    assert path is None and "sm86" in reason


@needs_library
def test_a_timing_cache_that_was_changed_is_rejected(tmp_path):
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"other")
    with pytest.raises(UserError, match=r"timing\.cache"):
        _read_timing_cache(None, cache)
    for pin in ("", "0" * 64 + "  timing.cache\n"):
        (tmp_path / "timing.cache.sha256").write_text(pin)
        with pytest.raises(UserError, match=r"timing\.cache"):
            _read_timing_cache(None, cache)
    write_pinned(cache, b"what was written")
    assert read_pinned(cache) == b"what was written"


@needs_library
def test_the_trtexec_command(bundle):
    options = EngineOptions(("sm86", "sm120"), (1, 8, 64), 0.5, refit=True, verbosity="detailed")
    line = trtexec_line(library, bundle / FUSED_ONNX, bundle / "x.engine", options)
    assert "--minShapes=images:1x3x32x32" in line and "--maxShapes=images:64x3x32x32" in line
    assert "--memPoolSize=workspace:512" in line and "--refit" in line and "--profilingVerbosity=detailed" in line
    if library.name == "tensorrt_rtx":
        assert line.startswith("tensorrt_rtx ") and "--computeCapabilities=8.6,12.0" in line


@needs_library
def test_the_command(bundle, tmp_path, run_here):
    result = run_command("deploy/build.py", bundle, "--batch", "1:2:4")
    assert result.returncode == 0, result.stderr
    assert "2 fused attentions" in result.stdout and "--saveEngine=" in result.stdout
    assert names(bundle / "engines") == [f"{library.name}-portable-1.2.4"] or library.name == "tensorrt"
    (engine,) = (bundle / "engines").glob("*/model.engine")
    shown = os.path.relpath(engine.resolve(), bundle.resolve().parent)
    for measured, noted in ((sha256(engine), False), ("0f" * 32, True)):  # the report is of it, or of an earlier one
        row = make_row("int8, TensorRT", 93.0, None, engine=shown, engine_bytes=1, sha256={shown: measured})
        report = replace(make_report(), rows=[row]).to_json()
        (bundle.parent / "report.json").write_text(json.dumps(report))
        again = run_here("deploy/build.py", bundle, "--batch", "1:2:4")
        assert again.returncode == 0 and ("report.json" in again.stdout) == noted, again.stdout
    for name in (".hidden", "../up", "a/b", "-x", "a b", "", "x" * 101):
        assert_one_line_error(run_here("deploy/build.py", bundle, f"--name={name}"), "--name")
    assert_one_line_error(run_here("deploy/build.py", bundle, "--batch", "1:x"), "batch", "1:x")
    (bundle / FUSED_ONNX).write_bytes(b"not a graph")
    assert_one_line_error(run_here("deploy/build.py", bundle), "ONNX")
    assert_one_line_error(run_here("deploy/build.py", tmp_path / "nowhere"), "nowhere")


def test_fused_kernels_are_found_by_their_tactic():
    """In JSON as NVIDIA documents it, not of a real engine, which would need a GPU."""
    layers = [
        {"Name": "blocks.0.attn.core/Attention_softmax", "TacticName": "sm80_softmax"},
        {"Name": "__myl_x", "TacticName": "_gemm_mha_v2_0x1"},
        "a layer without detail",
    ]
    assert fused_kernels(json.dumps({"Layers": layers})) == ["_gemm_mha_v2_0x1"]
    assert fused_kernels("{}") == []


def test_precisions_are_those_of_the_graph(tmp_path):
    export_quantized(SMALL, "int8", tmp_path / "int8.onnx")
    found = precisions(load_graph(tmp_path / "int8.onnx"))
    assert found["blocks.0.attn.qkv"] == "int8" and found["blocks.0.attn.core"] == "fp16"
    assert found["patch_embed.proj"] == "fp16, int8 weights"
    export_quantized(SMALL, "fp8-attention", tmp_path / "fp8.onnx")
    assert precisions(load_graph(tmp_path / "fp8.onnx"))["blocks.0.attn.core"] == "fp8"


def in_onnxruntime(model, images):
    """Returns the output of a graph, without ONNX Runtime's own rewrites."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(to_bytes(model), options).run(None, {"images": images})[0]


def operators(model):
    return Counter(node.op_type for node in model.graph)


IMAGES = np.random.default_rng(0).normal(size=(16, 3, 32, 32)).astype(np.float32)


@pytest.mark.parametrize("scheme", ["int8", "int8-attention", "w4a8"])
def test_zero_point_folding_is_exact(scheme, tmp_path):
    path = tmp_path / "model.onnx"
    export_quantized(SMALL, scheme, path, "plain", torch.float32)
    model, folded = load_graph(path), load_graph(path)
    fold_zero_points(folded)
    onnx.checker.check_model(to_bytes(folded), full_check=True)
    quantizers = [node for node in folded.graph if node.op_type == "QuantizeLinear" and ".input" in node.name]
    assert quantizers and {array(node.inputs[2]).dtype for node in quantizers} == {np.dtype(np.int8)}
    difference = np.abs(in_onnxruntime(model, IMAGES) - in_onnxruntime(folded, IMAGES))
    # The integers are the same, except for ties, which the rounding of the shift can change.
    assert difference.max() < 0.02 * np.abs(in_onnxruntime(model, IMAGES)).max()
    assert np.median(difference) < 1e-6


@pytest.mark.parametrize("scheme", [None, "int8", "w4a8"])
def test_splitting_products_is_exact(scheme, tmp_path):
    path = tmp_path / "model.onnx"
    if scheme:
        export_quantized(SMALL, scheme, path, "plain", torch.float32)
    else:
        torch.manual_seed(0)
        export_onnx(ILLaMA(SMALL).eval(), path, "plain")
    model, split = load_graph(path), load_graph(path)
    split_products(split)
    onnx.checker.check_model(to_bytes(split), full_check=True)
    before, after = operators(model), operators(split)
    assert before["Split"] == SMALL.depth and after["Split"] == 0
    # q, k and v of each block; in the last block, q is computed for the class token alone, by a product of its own.
    assert after["MatMul"] == before["MatMul"] + 2 * (SMALL.depth - 1) + 1
    expected = in_onnxruntime(model, IMAGES)
    difference = np.abs(expected - in_onnxruntime(split, IMAGES))
    assert np.median(difference) < 1e-6 and difference.max() < (0.02 if scheme else 1e-5) * np.abs(expected).max()


@pytest.mark.parametrize("scheme", [None, "int8", "w4a8"])
def test_folding_factors_is_exact(scheme, tmp_path):
    path = tmp_path / "model.onnx"
    if scheme:
        export_quantized(SMALL, scheme, path, "plain", torch.float32)
    else:
        torch.manual_seed(0)
        export_onnx(ILLaMA(SMALL).eval(), path, "plain")
    model, folded = load_graph(path), load_graph(path)
    split_products(folded)
    before = operators(folded)["Mul"]
    fold_factors(folded)
    onnx.checker.check_model(to_bytes(folded), full_check=True)
    assert operators(folded)["Mul"] == before - SMALL.depth  # that of q in each block
    expected = in_onnxruntime(model, IMAGES)
    difference = np.abs(expected - in_onnxruntime(folded, IMAGES))
    assert np.median(difference) < 1e-6 and difference.max() < (0.02 if scheme else 1e-5) * np.abs(expected).max()


@pytest.mark.parametrize(
    ("flags", "allowed", "expected"),
    [
        ("amx_tile amx_int8", None, True),
        ("amx_int8", "avx512_core_amx", True),
        ("amx_int8", "DEFAULT", True),
        ("amx_int8", "AVX512_CORE_VNNI", False),
        ("avx512_vnni", None, False),
    ],
)
def test_zero_points_are_folded_for_a_matrix_unit(flags, allowed, expected, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"flags : fpu {flags}\n")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if allowed:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", allowed)
    assert has_matrix_unit(tmp_path / "cpuinfo") == expected
    assert (fold_zero_points in select_rewrites(False, expected)) == expected
    assert not has_matrix_unit(tmp_path / "no such file")


def test_inputs_of_small_products_are_not_quantized(tmp_path):
    path = tmp_path / "model.onnx"
    network = export_quantized(SMALL, "int8", path, "plain", torch.float32)
    left, all_left = load_graph(path), load_graph(path)
    # proj, q of the last block, the head, and fc2 of the rotated block. qkv has three times as many outputs, and the
    # other fc2 has an input from a Mul.
    keep_inputs_float(left, outputs=SMALL.width)
    keep_inputs_float(all_left, outputs=10**9)
    before = operators(load_graph(path))["QuantizeLinear"]
    assert operators(left)["QuantizeLinear"] == before - SMALL.depth - 3 > operators(all_left)["QuantizeLinear"] > 0
    with torch.no_grad():
        exact = network(torch.from_numpy(IMAGES)).numpy()
    errors = [np.linalg.norm(in_onnxruntime(each, IMAGES) - exact) for each in (all_left, left, load_graph(path))]
    assert errors[0] < errors[2] and errors[1] < 1.1 * errors[2]
    for rewrite in select_rewrites(bfloat16=True, matrix_unit=True):
        rewrite(left)
    onnx.checker.check_model(to_bytes(left), full_check=True)
    assert all(value.uses() for value in left.graph.initializers.values())  # no constant is unused


STUBS = next(Path(sys.prefix).glob("lib/*/site-packages/tensorrt_bindings/tensorrt.pyi"), None)


@pytest.mark.skipif(STUBS is None, reason="tensorrt-stubs is not installed")
def test_calls_match_tensorrts_signatures(tmp_path):
    """mypy with the stubs of TensorRT, made valid Python.

    The stubs are generated: they have parameters named ``in``, and parameters without a default after others with one.
    """
    shutil.copytree(STUBS.parent, tmp_path / "tensorrt_bindings")
    shutil.copytree(STUBS.parent.parent / "tensorrt", tmp_path / "tensorrt")
    stub = tmp_path / "tensorrt_bindings" / "tensorrt.pyi"
    stub.write_text(re.sub(r"(def \w+\()([^()]*)(\))", _parsable, re.sub(r"\bin: ", "inputs: ", stub.read_text())))
    stubs = [tmp_path / "tensorrt" / "__init__.pyi", tmp_path / "tensorrt_bindings" / "__init__.pyi", stub]
    files = ("trt/library.py", "trt/fusion.py", "trt/builder.py", "runtimes/tensorrt_engine.py")
    ours = [ROOT / "deploy" / name for name in files]
    options = ["--follow-imports=skip", "--cache-dir", tmp_path / "cache"]
    command = [sys.executable, "-m", "mypy", *map(str, [*options, *ours, *stubs])]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    errors = [
        line
        for line in result.stdout.splitlines()
        if line.startswith("deploy/") and "error:" in line and "Dims" not in line
    ]
    assert "checked 7 source files" in result.stdout and errors == []  # functions accept tuples as Dims


def _parsable(match):
    parts, has_default = [], False
    for part in re.split(r",\s*(?![^\[]*\])", match[2]):
        has_default |= "=" in part
        parts.append(f"{part} = ..." if has_default and "=" not in part and not part.startswith("*") else part)
    return match[1] + ", ".join(parts) + match[3]
