"""Measures numerics and latency on a GPU: bash benchmarks/gpu/run.sh

The most important measurements come first; those for which there is no time are reported as not run. With --device cpu
and small sizes, the script can be tested without a GPU; then engines are built but not run.
"""

from __future__ import annotations

import copy
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from gpu_report import Report, add_latency, note_failure, relative_error
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from illama.cli import run_command
from deploy.runtimes.names import TITLES
from deploy.runtimes.tensorrt_engine import TensorRTEngine
from deploy.trt.build_bundle import write_engine
from deploy.trt.builder import build_engine
from deploy.trt.engine_options import EngineOptions, LibraryName
from deploy.trt.fusion import fused_kernels
from deploy.trt.library import Library, find_library
from deploy.trt.record import EngineRecord
from illama import ILLaMA, ModelConfig
from illama.bundle import FUSED_ONNX, command_line, package_versions
from illama.data.preprocessing import Preprocessing
from illama.errors import UserError
from illama.hardware import describe_machine
from illama.manifest import Manifest
from illama.models.attention import AttentionMask, MaskedAttention
from quant.export.onnx_export import export_onnx
from quant.quantizers.calibrate import calibrate
from quant.schemes.scheme import resolve, shipped_scheme

LIBRARIES: tuple[LibraryName, ...] = ("tensorrt", "tensorrt_rtx")
SCHEMES = ("fp16", "int8", "fp8", "fp8-attention", "int8-attention")
SIZES = ("nano", "tiny", "small", "base", "large")
MASKS = ("post_softmax", "pre_softmax", "bidirectional")


@dataclass(frozen=True)
class GpuOptions:
    """Measure iLLaMA on a GPU.

    Attributes:
        name: name of the results. If not given, the GPU's.
        device: cuda, or cpu to test the script.
        networks: networks as SIZE@PIXELS.
        batches: batch sizes.
        seconds: time in seconds after which no measurement is started.
        calls: number of timed calls of each variant.
        tests: path to the output of pytest, to include in the results.
        out: folder of the results.
    """

    name: str | None = None
    device: Literal["cuda", "cpu"] = "cuda"
    networks: tuple[str, ...] = ("tiny@224", "small@224", "base@224", "base@384")
    batches: tuple[int, ...] = (1, 8, 64)
    seconds: float = 390
    calls: int = 50
    tests: Path | None = None
    out: Path = Path("results/gpu")

    def __post_init__(self) -> None:
        for name in self.networks:
            size, _, pixels = name.partition("@")
            if size not in SIZES or not pixels.isdigit():
                raise UserError(f"--networks must be SIZE@PIXELS, such as tiny@224, not {name!r}")
        if min(self.batches, default=0) < 1 or self.calls < 1:
            raise UserError("--batches and --calls must be at least 1")


class Clock:
    """Times calls, by CUDA events on a GPU and by the wall clock on a CPU, and has the time limit."""

    def __init__(self, options: GpuOptions) -> None:
        self.on_gpu, self.calls = options.device == "cuda", options.calls
        self.end = time.monotonic() + options.seconds

    @property
    def over(self) -> bool:
        return time.monotonic() > self.end

    def milliseconds(self, call: Callable[[], Any]) -> list[float]:
        """Returns the milliseconds of each of ``calls`` calls, after a warm-up."""
        for _ in range(5):
            call()
        found = []
        for _ in range(self.calls):
            if self.on_gpu:
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                call()
                last.record()
                torch.cuda.synchronize()
                found.append(first.elapsed_time(last))
            else:
                start = time.perf_counter()
                call()
                found.append((time.perf_counter() - start) * 1e3)
        return found


def network(name: str, mask: str = "post_softmax") -> ILLaMA:
    """Returns the network SIZE@PIXELS with random weights."""
    size, pixels = name.split("@")
    torch.manual_seed(0)
    return ILLaMA(ModelConfig.preset(size, image_size=int(pixels), mask=mask)).eval()


@torch.no_grad()
def check_attention(report: Report, options: GpuOptions) -> None:
    """Compares both forms of every mask in every dtype with float64, at 197 tokens."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 197, 64, generator=generator).to(options.device) for _ in range(3))
    causal = torch.ones(197, 197, dtype=torch.bool, device=options.device).tril()
    for kind in MASKS:
        core, mask = MaskedAttention(), AttentionMask(cast(Any, kind), causal)
        core.form = "plain"
        exact = core(q.double(), k.double(), v.double(), mask)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for form in ("plain", "fused"):
                core.form = cast(Any, form)
                error = relative_error(core(*(x.to(dtype) for x in (q, k, v)), mask), exact)
                what = f"attention, {kind}, {form}, {str(dtype)[6:]}"
                report.numerics.append({"what": what, "relative error": f"{error:.1e}"})


def attention_variants(n: int, device: str) -> Iterator[tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]]:
    """Yields kernels for the post-softmax mask that do different amounts of work, see docs/fusion.md."""
    causal = torch.ones(n, n, dtype=torch.bool, device=device).tril()
    for form in ("plain", "fused"):
        core = MaskedAttention()
        core.form = cast(Any, form)
        mask = AttentionMask("post_softmax", causal)
        yield f"{form} form", partial(core, mask=mask)

    # Future keys come first, with values of zero: row i attends to the window i + 1 .. i + N of 2N keys, so that blocks
    # can be skipped.
    def window(b: Any, h: Any, row: Tensor, key: Tensor) -> Tensor:
        return (key > row) & (key <= row + n)

    blocks = create_block_mask(window, None, None, n, 2 * n, device=device)
    compiled = torch.compile(flex_attention)

    def banded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        doubled = torch.cat([torch.zeros_like(v), v], 2)
        return compiled(q, torch.cat([k, k], 2), doubled, block_mask=blocks)

    yield "window over doubled keys (FlexAttention)", banded
    yield "pre-softmax mask (another function)", partial(F.scaled_dot_product_attention, attn_mask=causal)


@torch.no_grad()
def time_attention(report: Report, options: GpuOptions, clock: Clock) -> None:
    """Times attention alone, in float16, at 197 and 577 tokens."""
    for n, batch in ((197, 64), (577, 16)):
        q, k, v = (torch.randn(batch, 12, n, 64, device=options.device, dtype=torch.float16) for _ in range(3))
        _, exact = next(attention_variants(n, options.device))
        expected = exact(q[:1].double(), k[:1].double(), v[:1].double())
        for name, attend in attention_variants(n, options.device):
            with note_failure(report, f"attention of {n} tokens, {name}"):
                error = relative_error(attend(q[:1], k[:1], v[:1]), expected)
                if "another" not in name:
                    report.numerics.append({"what": f"{name}, {n} tokens, float16", "relative error": f"{error:.1e}"})
                add_latency(
                    report,
                    f"attention of {n} tokens, 12 heads",
                    name,
                    batch,
                    clock.milliseconds(partial(attend, q, k, v)),
                )


def torch_contestants(model: ILLaMA, device: str) -> Iterator[tuple[str, Callable[[], nn.Module], torch.dtype]]:
    """Yields (name, function that creates it, dtype of its input), the important ones first."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        quantize_,
    )

    def copy_in(dtype: torch.dtype) -> nn.Module:
        return copy.deepcopy(model).to(device, dtype)

    def compiled(module: nn.Module) -> nn.Module:
        torch._dynamo.reset()  # else earlier compilations count toward the recompile limit
        mode = "max-autotune-no-cudagraphs" if device == "cuda" else None
        return cast(nn.Module, torch.compile(module, mode=mode, dynamic=False))

    def quantized(config: Any) -> nn.Module:
        module = copy_in(torch.bfloat16)
        quantize_(module, config)
        return compiled(module)

    yield "PyTorch eager, FP16", lambda: copy_in(torch.float16), torch.float16
    yield "torch.compile, FP16", lambda: compiled(copy_in(torch.float16)), torch.float16
    yield "PyTorch eager, FP32", lambda: copy_in(torch.float32), torch.float32
    yield "torchao FP8, compiled", lambda: quantized(Float8DynamicActivationFloat8WeightConfig()), torch.bfloat16
    yield "torchao INT8, compiled", lambda: quantized(Int8DynamicActivationInt8WeightConfig()), torch.bfloat16


@torch.no_grad()
def time_torch(report: Report, options: GpuOptions, clock: Clock, name: str) -> None:
    model = network(name)
    for contestant, make, dtype in torch_contestants(model, options.device):
        if clock.over:
            report.not_run.append(f"{name}, {contestant}: out of time")
            continue
        with note_failure(report, f"{name}, {contestant}"):
            module = make()
            for batch in options.batches:
                images = random_images(model, batch).to(options.device, dtype)
                add_latency(report, name, contestant, batch, clock.milliseconds(partial(module, images)))


class Exports:
    """Bundles of fused graphs, and float64 logits of each network; created once for all libraries and schemes."""

    def __init__(self, folder: Path, options: GpuOptions) -> None:
        self.folder, self.options = folder, options
        self.exact: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    def bundle(self, name: str, scheme: str, mask: str) -> Path:
        """Returns the bundle of a network, quantized or in half precision."""
        folder = self.folder / f"{name}-{scheme}-{mask}"
        if not folder.exists():
            model = network(name, mask)
            quantized = (
                model
                if scheme == "fp16"
                else calibrate(model, resolve(shipped_scheme(scheme), model), [random_images(model, 4)])
            )
            folder.mkdir()
            export_onnx(quantized, folder / FUSED_ONNX, "fused", torch.float16)
            preprocessing = Preprocessing.imagenet(model.config.image_size, model.config.in_channels)
            classes = [str(index) for index in range(model.config.num_classes)]
            Manifest(model.config.kind, model.config.to_dict(), preprocessing, tuple(classes)).write(folder)
        return folder

    @torch.no_grad()
    def reference(self, name: str, mask: str) -> tuple[Tensor, Tensor]:
        """Returns (images, logits in float64)."""
        if (name, mask) not in self.exact:
            model = network(name, mask).double().to(self.options.device)
            images = random_images(model, min(8, max(self.options.batches)))
            self.exact[name, mask] = images, model(images.double().to(self.options.device)).cpu()
        return self.exact[name, mask]


def random_images(model: ILLaMA, batch: int) -> Tensor:
    """Returns normal noise (batch, C, H, W)."""
    config = model.config
    return torch.randn(batch, config.in_channels, config.image_size, config.image_size)


def measure_engine(
    report: Report, clock: Clock, exports: Exports, library: Library, case: tuple[str, str, str]
) -> None:
    """Builds an engine, counts its fused kernels, compares it with float64, and times it without and with copies."""
    name, scheme, mask = case
    row = {"network": name, "library": TITLES[library.name], "scheme": scheme, "mask": mask, "outcome": "not built"}
    report.engines.append(row)
    batches, contestant = exports.options.batches, f"{TITLES[library.name]}, {scheme}"
    with note_failure(report, f"{name}, {contestant}, {mask}"):
        bundle, largest = exports.bundle(name, scheme, mask), max(batches)
        wanted = EngineOptions(library.resolve_targets(()), (1, min(8, largest), largest), verbosity="detailed")
        built = build_engine(library, bundle / FUSED_ONNX, wanted)
        path = write_engine(library, bundle, built, wanted)
        row["outcome"] = f"built, {built.attentions} attentions fused, {len(built.data) / 1e6:.1f} MB; not run"
        engine = TensorRTEngine(path, EngineRecord.read(path))
        kernels = fused_kernels(engine.layers())
        images, exact = exports.reference(name, mask)
        error = relative_error(torch.from_numpy(engine.infer(images.numpy())), exact)
        row["outcome"] = f"ran; inspector names {len(kernels)} fused kernels for {built.attentions} attentions"
        report.numerics.append({"what": f"{name}, {contestant}, {mask}", "relative error": f"{error:.1e}"})
        for batch in batches if mask == "post_softmax" else ():
            fed = images[:1].repeat(batch, 1, 1, 1).numpy()
            engine.infer(fed)
            add_latency(report, name, contestant, batch, clock.milliseconds(partial(engine.run_on_device, batch)))
            add_latency(
                report,
                name,
                f"{contestant}, from and to the CPU's memory",
                batch,
                clock.milliseconds(partial(engine.infer, fed)),
            )


def main(options: GpuOptions) -> None:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no NVIDIA GPU found: add --device cpu to test the script")
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU, to try the script"
    report, clock = Report(device), Clock(options)
    report.facts = {
        "command": command_line(),
        "machine": describe_machine(),
        "versions": package_versions(),
        "tests": options.tests.read_text().splitlines()[-8:] if options.tests else "not run",
    }
    name = options.name or re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    with tempfile.TemporaryDirectory() as folder:
        steps = plan(report, clock, Exports(Path(folder), options))
        for index, step in enumerate(steps):
            if clock.over:
                report.not_run.append(f"{len(steps) - index} of {len(steps)} steps: out of time")
                break
            step()
            report.write(options.out, name)
    report.write(options.out, name)
    print(report.table())


def plan(report: Report, clock: Clock, exports: Exports) -> list[Callable[[], None]]:
    """Returns all measurements, the most important ones first."""
    options = exports.options
    steps: list[Callable[[], None]] = [partial(check_attention, report, options)]
    libraries = [library for each in LIBRARIES if (library := _found(each, report))]
    engine = partial(measure_engine, report, clock, exports)
    for net in options.networks:
        steps += [partial(engine, library, (net, scheme, MASKS[0])) for library in libraries for scheme in SCHEMES]
        steps.append(partial(time_torch, report, options, clock, net))
    steps.append(partial(time_attention, report, options, clock))
    steps += [
        partial(engine, library, (options.networks[0], scheme, mask))
        for library in libraries
        for mask in MASKS[1:]
        for scheme in SCHEMES[:3]
    ]
    return steps


def _found(name: LibraryName, report: Report) -> Library | None:
    try:
        return find_library(name)
    except UserError as error:
        report.not_run.append(f"{name}: {error}")
        return None


if __name__ == "__main__":
    run_command(GpuOptions, main)
