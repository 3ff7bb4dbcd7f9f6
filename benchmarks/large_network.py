"""Sends a network over 2 GB through export and every runtime of this machine: python benchmarks/large_network.py

timm's ViT-H/14 with random weights, in float32. Its weights, 2.5 GB, are more than a protobuf message can hold, so they
lie beside the ONNX file. Each runtime's logits are compared with PyTorch's. Takes about 15 GB of memory.
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from timm.models import VisionTransformer

from illama.cli import run_command
from deploy.runtimes.onnxruntime_engine import OnnxRuntimeEngine
from deploy.runtimes.openvino_engine import OpenVinoEngine
from deploy.trt.builder import build_engine
from deploy.trt.engine_options import EngineOptions
from deploy.trt.library import find_library
from eval.report.store import write_results
from illama.bundle import CPU_ONNX, FUSED_ONNX, sha256, size_of
from illama.markdown_table import markdown
from illama.models.timm_vit import to_quantizable
from quant.export.onnx_export import export_onnx


@dataclass(frozen=True)
class LargeNetworkOptions:
    """Export a network over 2 GB, and run it in every runtime.

    Attributes:
        model: name of a timm ViT.
        engine: whether TensorRT builds an engine too, of the graph in half precision.
        out: folder of the results and of the files.
    """

    model: str = "vit_huge_patch14_224"
    engine: bool = True
    out: Path = Path("runs/large_network")


def main(options: LargeNetworkOptions) -> None:
    torch.manual_seed(0)
    options.out.mkdir(parents=True, exist_ok=True)
    vit = cast(VisionTransformer, timm.create_model(options.model, pretrained=False).eval())
    size = vit.patch_embed.img_size
    images = np.random.default_rng(0).normal(size=(1, 3, *size)).astype(np.float32)
    with torch.inference_mode():
        expected = vit(torch.from_numpy(images)).numpy()
    network, results = to_quantizable(vit), dict[str, Any]()
    plain, fused = options.out / CPU_ONNX, options.out / FUSED_ONNX

    def step(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = work()
        gc.collect()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        results[name] = {"seconds": time.perf_counter() - start, "peak_gb": peak}
        print(f"{name}: {results[name]['seconds']:.1f} s, peak memory so far {peak:.1f} GB", flush=True)
        return found

    def compare(name: str, engine: Callable[[], Any]) -> None:
        logits = step(name, lambda: engine().infer(images))
        difference = float(np.abs(logits - expected).max() / np.abs(expected).max())
        results[name]["difference"] = difference
        print(f"  largest difference from PyTorch, over the largest logit: {difference:.1e}", flush=True)

    step("export", lambda: export_onnx(network, plain, "plain"))
    if options.engine:
        step("export in half precision", lambda: export_onnx(network, fused, "fused", torch.float16))
    digest = step("hash", lambda: sha256(plain))
    results["hash"] |= {"bytes": size_of(plain), "sha256": digest}
    compare("ONNX Runtime", lambda: OnnxRuntimeEngine(plain))
    compare("OpenVINO", lambda: OpenVinoEngine(plain, precision="f32"))
    library = find_library()
    if options.engine and library is not None:
        engine = EngineOptions(library.resolve_targets(()), allow_unfused=True)
        built = step(library.name, lambda: build_engine(library, fused, engine))
        results[library.name]["bytes"] = len(built.data)
    columns = {"seconds": ".1f", "peak_gb": ".1f", "difference": ".1e"}
    rows = [
        (name, *(format(each[key], digits) if key in each else "-" for key, digits in columns.items()))
        for name, each in results.items()
    ]
    table = markdown(("step", "seconds", "peak GB so far", "difference from PyTorch"), rows)
    write_results(options.out, "large_network", results, table)


if __name__ == "__main__":
    run_command(LargeNetworkOptions, main)
