"""Compares the latency of the runtimes on this CPU, in float and INT8: python benchmarks/cpu_latency.py

Networks are iLLaMA-T at 224 pixels (random weights: speed does not depend on them) and the shipped nano, at batch 1 and
8. All variants run alternately in one process, so that other load on the machine affects all alike. The goal is that
INT8 is 2.5 times as fast as ONNX Runtime in FP32 at batch 1, and 3 times at batch 8, and never slower than NNCF's INT8.
The gain of each rewrite of deploy/rewrites/openvino_graph.py is measured by running the same file without it.

NNCF is measured if it is installed (benchmarks/peers-requirements.txt); otherwise the report says so.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from tqdm import tqdm

from illama.cli import run_command
from deploy.rewrites.openvino_graph import has_matrix_unit, select_rewrites
from deploy.runtimes.onnxruntime_engine import OnnxRuntimeEngine
from deploy.runtimes.openvino_engine import OpenVinoEngine, openvino_core
from eval.measure.latency import TimingOptions, measure_latency
from eval.report.store import write_results
from illama import ILLaMA, ModelConfig
from illama.bundle import SHIPPED
from illama.checkpoints.load import load_checkpoint
from illama.graph.reader import load_graph, to_bytes
from illama.hardware import usable_cores
from illama.inference import Infer, torch_infer
from quant.export.onnx_export import export_onnx
from quant.quantizers.calibrate import calibrate
from quant.schemes.scheme import resolve, shipped_scheme

REFERENCE = "ONNX Runtime, FP32"
OURS = "OpenVINO, INT8 (ours, the default)"


@dataclass(frozen=True)
class LatencyOptions:
    """Compare the latency of the runtimes on this CPU.

    Attributes:
        networks: tiny (at 224 pixels) or nano (the shipped checkpoint).
        batches: batch sizes.
        repeats: number of medians per variant; their range is reported as the spread.
        rounds: number of timed rounds per median.
        threads: number of threads of each runtime; 0 for one per core.
        torch: also time PyTorch, eager and compiled.
        precision: dtype in which OpenVINO computes the float part of INT8 files, f32 or bf16. If not given, its own
            choice.
        out: folder of the results.
    """

    networks: tuple[str, ...] = ("tiny", "nano")
    batches: tuple[int, ...] = (1, 8)
    repeats: int = 5
    rounds: int = 5
    threads: int = 0
    torch: bool = True
    precision: str | None = None
    out: Path = Path("results/cpu-latency")


def open_network(name: str) -> ILLaMA:
    """Returns an iLLaMA of a size with random weights, or the shipped nano."""
    if name == "nano":
        return load_checkpoint(SHIPPED).model
    torch.manual_seed(0)
    return ILLaMA(ModelConfig.preset(name)).eval()


def contestants(
    model: ILLaMA, images: torch.Tensor, folder: Path, options: LatencyOptions
) -> tuple[dict[str, Infer], list[str]]:
    """Returns (name -> function to time, what is missing and why)."""
    threads = options.threads
    fp32, int8, rounded = (folder / f"{name}.onnx" for name in ("fp32", "int8", "int8-attention"))
    export_onnx(model, fp32, "plain")
    for path in (int8, rounded):
        export_onnx(calibrate(model, resolve(shipped_scheme(path.stem), model), [images[:16]]), path, "plain")
    ours = OpenVinoEngine(int8, threads, options.precision)
    found: dict[str, Infer] = {
        REFERENCE: OnnxRuntimeEngine(fp32, threads).infer,
        "ONNX Runtime, INT8 (ours)": OnnxRuntimeEngine(int8, threads).infer,
        "OpenVINO, FP32": OpenVinoEngine(fp32, threads, "f32").infer,
        **({} if options.precision else {"OpenVINO, its own choice of float": OpenVinoEngine(fp32, threads).infer}),
        OURS: ours.infer,
        **ablations(int8, ours.floats == "bf16", options),
        "OpenVINO, INT8 (ours), attention rounded too": OpenVinoEngine(rounded, threads, options.precision).infer,
    }
    found |= in_torch(model, threads) if options.torch else {}
    missing = []
    for kind in ("default", "transformer"):
        try:
            found[f"OpenVINO, INT8 (NNCF, {kind})"] = nncf_quantized(fp32, images, kind == "transformer", options)
        except ImportError:
            missing.append(f"NNCF, {kind}: nncf is not installed (benchmarks/peers-requirements.txt)")
    return found, missing


def in_torch(model: ILLaMA, threads: int) -> dict[str, Infer]:
    """Returns PyTorch's variants: eager, compiled, in half precision, and quantized by torchao."""
    torch.set_num_threads(threads or usable_cores())
    half = copy.deepcopy(model).to(torch.bfloat16)
    dynamic = copy.deepcopy(model)
    quantize_(dynamic, Int8DynamicActivationInt8WeightConfig())
    return {
        "PyTorch, FP32": torch_infer(model),
        "PyTorch, bfloat16": _infer_in(torch.bfloat16, half),
        "torch.compile, FP32": torch_infer(_compiled(copy.deepcopy(model))),
        "torch.compile, bfloat16": _infer_in(torch.bfloat16, _compiled(copy.deepcopy(half))),
        "torch.compile, torchao INT8 dynamic": _infer_in(torch.float32, _compiled(dynamic)),
    }


def _compiled(model: nn.Module) -> nn.Module:
    return cast(nn.Module, torch.compile(model, dynamic=False))


def _infer_in(dtype: torch.dtype, model: nn.Module) -> Infer:
    @torch.no_grad()  # torchao's weights cannot be sliced in inference mode
    def infer(images: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(images).to(dtype)).float().numpy()

    return infer


def ablations(path: Path, bfloat16: bool, options: LatencyOptions) -> dict[str, Infer]:
    """Returns a file in OpenVINO unchanged, and with each rewrite switched: omitted if it is used, else added."""
    done, every = select_rewrites(bfloat16, has_matrix_unit()), select_rewrites(bfloat16=True, matrix_unit=True)
    found = {}
    for toggled in (None, *every):
        name = f"{'without' if toggled in done else 'with'} {toggled.__name__}" if toggled else "as it is"
        rewrites = [each for each in every if toggled and (each in done) != (each is toggled)]
        model = load_graph(path)
        for rewrite in rewrites:
            rewrite(model)
        read = openvino_core().read_model(to_bytes(model))
        found[f"OpenVINO, INT8 (ours), {name}"] = _request(read, options.threads, options.precision)
    return found


def nncf_quantized(fp32: Path, images: torch.Tensor, transformer: bool, options: LatencyOptions) -> Infer:
    """Returns NNCF's INT8 of the same float file, in OpenVINO."""
    import nncf

    kind = nncf.ModelType.TRANSFORMER if transformer else None
    data = nncf.Dataset([image[None].numpy() for image in images])
    model = nncf.quantize(openvino_core().read_model(fp32), data, model_type=kind, subset_size=len(images))
    return _request(model, options.threads, options.precision)


def _request(model: object, threads: int, precision: str | None) -> Infer:
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads or usable_cores()}
    settings |= {"INFERENCE_PRECISION_HINT": precision} if precision else {}
    request = openvino_core().compile_model(model, "CPU", settings).create_infer_request()
    return lambda images: np.array(request.infer({0: images}, share_inputs=True)[0])


def medians(
    engines: dict[str, Infer], images: np.ndarray, options: LatencyOptions, tick: Callable[[], object]
) -> dict[str, list[float]]:
    """Returns name -> median milliseconds in each repeat."""
    found: dict[str, list[float]] = {name: [] for name in engines}
    for repeat in range(options.repeats + 1):
        measured = measure_latency(
            engines, images, (len(images),), TimingOptions(options.rounds, 4, 2, progress=False)
        ).latency
        if repeat:  # the first compiles and warms up
            for name, (latency,) in measured.items():
                found[name].append(latency.p50)
        tick()
    return found


def table(figures: dict[str, dict[str, list[float]]]) -> str:
    """Returns a Markdown table of milliseconds and speedup by batch size, with the ranges over the repeats."""
    batches = list(figures)
    heads = ["contestant", *(head for batch in batches for head in (f"{batch}, ms", "times as fast"))]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for name in figures[batches[0]]:
        cells = [name]
        for batch in batches:
            values, reference = figures[batch][name], figures[batch][REFERENCE]
            ratios = [base / value for base, value in zip(reference, values, strict=True)]
            cells += [_spread(values, ""), _spread(ratios, "x")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float], unit: str) -> str:
    return f"{np.median(values):.2f}{unit} ({min(values):.2f} to {max(values):.2f})"


def main(options: LatencyOptions) -> None:
    figures, texts = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for network in options.networks:
            torch._dynamo.reset()
            model = open_network(network)
            config, total = model.config, len(options.batches) * (options.repeats + 1)
            images = torch.randn(max(16, *options.batches), config.in_channels, config.image_size, config.image_size)
            engines, missing = contestants(model, images, Path(folder), options)
            with tqdm(total=total, desc=network, unit="repeat") as bar:
                figures[network] = {
                    f"batch {batch}": medians(engines, images[:batch].numpy(), options, bar.update)
                    for batch in options.batches
                }
            texts += [f"{network}, {config.image_size} pixels", "", table(figures[network]), "", *missing, ""]
    write_results(options.out, "latency", {"milliseconds": figures}, "\n".join(texts))


if __name__ == "__main__":
    run_command(LatencyOptions, main)
