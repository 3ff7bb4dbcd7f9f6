"""Sends every kind of timm's ViTs through the whole toolkit: python benchmarks/timm_sweep.py

timm's names that share their class and every option but sizes are one kind. Of each, a small network with random
weights is converted, made causal, rotated, quantized, exported and built, and every step is compared with timm's own
network, or with the step before it. It writes ``timm-sweep.json`` and ``timm-sweep.md``: which names passed, which are
refused and why, and what failed. An interrupted run continues with the kinds that it has not finished.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import deploy
import quant
from illama.cli import run_command
from deploy.runtimes.onnxruntime_engine import OnnxRuntimeEngine
from deploy.runtimes.verification import verify
from deploy.trt.library import find_library
from eval.report.store import write_results
from illama.atomic_write import write_file
from illama.bundle import CPU_ONNX, package_versions
from illama.errors import UserError
from illama.models.timm_vit import to_causal, to_quantizable
from illama.partial_work import claim, sources_digest
from illama.progress import track
from quant.export.onnx_export import export_onnx
from quant.export.verify import compare_with_trace, first_mismatch, trace_onnx
from quant.quantizers.calibrate import calibrate
from quant.quantizers.rotation import rotate
from quant.schemes.scheme import Rotations, resolve, shipped_scheme

PATCH, WIDTH, SIDE = 16, 128, 4  # pixels, channels, patches
SCHEMES = ("int8", "int8-attention", "fp8")


@dataclass(frozen=True)
class SweepOptions:
    """Send every kind of timm's ViTs through the whole toolkit.

    Attributes:
        names: patterns of names, such as ``*dinov3*``. If not given, all.
        engines: also build engines, which takes most of the time.
        out: folder of the results.
        work: folder of the kinds that are finished.
    """

    names: tuple[str, ...] = ("*",)
    engines: bool = True
    out: Path = Path("results/timm-sweep")
    work: Path = Path("runs/timm-sweep")


def is_ours(name: str) -> bool:
    """Returns whether timm's name is of a class that the toolkit supports."""
    with torch.device("meta"):
        return isinstance(timm.create_model(name), VisionTransformer | Eva)


def shrunk(name: str) -> Any:
    """Returns timm's network with two small blocks and random weights, of which norms and scales are not 1 or 0."""
    with torch.device("meta"):
        whole: Any = timm.create_model(name)
    patch = whole.patch_embed.patch_size[0] * (whole.patch_embed.feat_ratio() // whole.patch_embed.patch_size[0])
    square = len(set(whole.patch_embed.img_size)) == 1
    side = SIDE * patch
    options: dict[str, Any] = {"img_size": side if square else (side, 2 * side), "depth": 2, "num_classes": 5}
    if "sapiens2" in name:  # its names list the key heads of every block
        options["num_kv_heads"] = (1 if any(block.attn.num_kv_groups > 1 for block in whole.blocks) else 2, 2)
    if isinstance(whole, Eva) and whole.attn_pool is not None:
        options["attn_pool_num_heads"] = 2
    if isinstance(whole.patch_embed.proj, nn.Conv2d):  # without it, what is in front decides the width
        options |= {"embed_dim": WIDTH, "num_heads": 2}
    torch.manual_seed(0)
    network = timm.create_model(name, **options).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_((0.3 if parameter.ndim == 1 else 0.05) * torch.randn_like(parameter))
    return network


def kind_of(network: Any) -> str:
    """Returns a text that is equal for networks which differ in sizes of images and patches only."""
    text = str(network).replace(str(network.patch_embed.proj), "")
    names = ("global_pool", "num_prefix_tokens", "no_embed_class", "pool_include_prefix", "rope_mixed")
    facts = [getattr(network, name, None) for name in names]
    tables = [getattr(network, name, None) is None for name in ("pos_embed", "cls_token", "reg_token", "rope")]
    return f"{type(network).__name__} {facts} {tables} {text}"


def error_of(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def steps(network: Any, engines: bool, folder: Path) -> Iterator[tuple[str, float, float]]:
    """Yields each step's name, its error and the largest error that is allowed; UserError if a step is refused."""
    size = network.patch_embed.img_size
    images = torch.randn(8, 3, *size)
    with torch.no_grad():
        expected, model = network(images), to_quantizable(network)
        yield "converted", error_of(model(images), expected), 1e-5
        causal = to_causal(network)
        causal.soft_mask = 1.0
        yield "causal", error_of(causal(images), expected), 1e-5
        double = to_quantizable(network).double()
        exact = double(images.double())
        rotate(double, Rotations("auto", "auto"))
        yield "rotated", error_of(double(images.double()), exact), 1e-9
        for name in SCHEMES:
            yield from _file_steps(model, name, images, folder)
    bundle = quant.quantize(network, [images], "int8", folder / "bundles")
    for part, file in ((bundle, CPU_ONNX), (bundle.with_name("fp32"), CPU_ONNX)):
        engine = OnnxRuntimeEngine(part / file, threads=1)
        yield f"golden answers of {part.name}", float(not verify(engine, part / file, remember=False)), 0.5
    if engines:
        deploy.build(bundle, ["sm89"], (1, 1, 1))  # fails if an attention is not fused
        yield "engine with fused attention", 0.0, 0.5


def _file_steps(model: Any, name: str, images: Tensor, folder: Path) -> Iterator[tuple[str, float, float]]:
    """Yields the steps of one scheme: its file against the network that rounds as the file does, and against float."""
    scheme = replace(shipped_scheme(name), reconstruction_iterations=0)
    quantized = calibrate(model, resolve(scheme, model), [images])
    export_onnx(quantized, folder / f"{name}.onnx", "plain")
    trace = trace_onnx(folder / f"{name}.onnx", images.numpy(), quantized)
    mismatch = first_mismatch(compare_with_trace(quantized, trace, images.numpy()))
    yield f"{name}'s file, in {mismatch or 'every layer'}", float(mismatch is not None), 0.5
    yield f"{name} against float", error_of(quantized(images), model(images)), 0.25


def sweep(network: Any, engines: bool) -> dict[str, Any]:
    """Returns the outcome of one kind: ``passed`` with the error of each step, ``refused`` or ``failed`` with why."""
    errors: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, error, limit in steps(network, engines, Path(folder)):
                errors[name] = error
                if not error <= limit:
                    return {"outcome": "failed", "why": f"{name}: {error:.2g}, at most {limit:g}", "errors": errors}
        except UserError as error:
            return {"outcome": "failed" if errors else "refused", "why": str(error), "errors": errors}
        except Exception as error:  # reported in the table
            why = f"{type(error).__name__} after {list(errors)[-1:]}: {error}"
            return {"outcome": "failed", "why": " ".join(why.split())[:200], "errors": errors}
    return {"outcome": "passed", "why": "", "errors": errors}


def count_names(groups: list[dict[str, Any]]) -> dict[str, int]:
    """Returns the number of names with each outcome."""
    outcomes = ("passed", "refused", "failed")
    return {each: sum(len(group["names"]) for group in groups if group["outcome"] == each) for each in outcomes}


def table(groups: list[dict[str, Any]]) -> str:
    """Returns the outcomes as Markdown: counts, then a row for each kind."""
    names = count_names(groups)
    lines = [
        f"Of {sum(names.values())} names in {len(groups)} kinds, {names['passed']} passed, {names['refused']} are "
        f"refused, {names['failed']} failed. timm {timm.__version__}.",
        "",
        "| names | outcome | why |",
        "|---|---|---|",
    ]
    for group in sorted(groups, key=lambda group: (group["outcome"], group["names"])):
        more = f" and {len(group['names']) - 2} more" if len(group["names"]) > 2 else ""
        lines.append(
            f"| {', '.join(group['names'][:2])}{more} | {group['outcome']} | {group['why'].replace('|', '/')} |"
        )
    return "\n".join(lines) + "\n"


def main(options: SweepOptions) -> None:
    if options.engines and find_library(None) is None:
        raise UserError("no TensorRT to build engines with: install tensorrt-rtx, or give --no-engines")
    kinds: dict[str, list[str]] = defaultdict(list)
    networks: dict[str, nn.Module] = {}
    names = [name for pattern in options.names for name in timm.list_models(pattern) if is_ours(name)]
    for name in track(dict.fromkeys(names), "make small networks", "name"):
        network = shrunk(name)
        kinds[kind_of(network)].append(name)
        networks.setdefault(kind_of(network), network)
    facts = {"code": sources_digest(), "versions": package_versions(), "engines": options.engines}
    claim(options.work, facts, restart=True)
    groups = []
    for kind, found in track(kinds.items(), "sweep", "kind"):
        finished = options.work / f"{found[0]}.json"
        if not finished.exists():
            with write_file(finished) as draft:
                draft.write_text(json.dumps(sweep(networks[kind], options.engines)))
        groups.append({"names": found, **json.loads(finished.read_text())})
    facts = {"timm": timm.__version__, "names": count_names(groups), "number_of_kinds": len(groups), "kinds": groups}
    write_results(options.out, "timm-sweep", facts, table(groups))


if __name__ == "__main__":
    run_command(SweepOptions, main)
