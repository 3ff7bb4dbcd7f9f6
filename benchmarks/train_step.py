"""Compares the time of a training step with the released code's computation: python benchmarks/train_step.py

Both networks have the same weights, images and labels, and must first give the same loss and gradients. Then each round
times a step (forward, backward, AdamW) of each. Ratios are taken within a round, so that other load on the machine
affects both, and their median and quartiles over the rounds are printed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from illama.cli import run_command
from eval.report.store import write_results
from illama import ILLaMA, ModelConfig
from illama.errors import UserError
from illama.markdown_table import markdown
from illama.models.illama import PatchEmbed, SwiGLU

Precision = Literal["float32", "bfloat16"]
Step = Callable[[float], None]
# Of float32 gradients with different orders of sums, relative to the largest gradient of the parameter.
TOLERANCE = 1e-4
_WARM_UP = 3
# Name of a ratio, its dividend and its divisor.
_RATIOS = (
    ("eager", "released", "ours"),
    ("compiled", "released compiled", "ours compiled"),
    ("ours compiled, released eager", "released", "ours compiled"),
)


@dataclass(frozen=True)
class BenchmarkOptions:
    """Compare the time of a training step of an iLLaMA with the released code's computation.

    Attributes:
        size: model size, at its default image size.
        batch: images per step.
        alphas: alphas of the soft mask: 0 is the hard mask, 1 masks nothing.
        precisions: float32, or bfloat16 for autocast.
        compile: also time both with torch.compile; compiling takes some minutes.
        rounds: number of timed steps of each variant.
        threads: number of PyTorch's threads on a CPU. If not given, PyTorch's default.
        out: folder of the results, train-step.json and train-step.md.
    """

    size: str = "tiny"
    batch: int = 8
    alphas: tuple[float, ...] = (0.0, 0.5, 1.0)
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    compile: bool = True
    rounds: int = 15
    threads: int | None = None
    out: Path = Path("results/train-step")

    def __post_init__(self) -> None:
        if self.batch < 1 or self.rounds < 1 or (self.threads is not None and self.threads < 1):
            raise UserError("--batch, --rounds and --threads must be at least 1")
        if not self.alphas or not all(0 <= alpha <= 1 for alpha in self.alphas):
            raise UserError("--alphas must be numbers in 0..1")


class ReleasedRMSNorm(nn.Module):
    """RMSNorm as in LLaMA's code: x / sqrt(mean(x^2) + eps), in float32, times a weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        mean_square = wide.pow(2).mean(dim=-1, keepdim=True)
        return (wide * torch.rsqrt(mean_square + 1e-6)).to(x.dtype) * self.weight


class ReleasedAttention(nn.Module):
    """Equation 2 step by step: scores, softmax, mask, values; RoPE in complex numbers, float32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, mask: Tensor, rotation: Tensor) -> Tensor:
        """(B, N, width) -> the same; mask (N, N); rotation (N, 1, head_dim / 2), complex."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, N, heads, head_dim) each
        q, k = self.rotate(q, rotation).transpose(1, 2), self.rotate(k, rotation).transpose(1, 2)
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        weights = scores.softmax(dim=-1) * mask
        return self.proj((weights @ v.transpose(1, 2)).transpose(1, 2).flatten(2))

    @staticmethod
    def rotate(x: Tensor, rotation: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


class ReleasedBlock(nn.Module):
    """A pre-norm block that computes every token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = ReleasedRMSNorm(config.width), ReleasedRMSNorm(config.width)
        self.attn = ReleasedAttention(config)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, mask: Tensor, rotation: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), mask, rotation)
        return x + self.mlp(self.norm2(x))


class Released(nn.Module):
    """iLLaMA as the released code computes it, written from the paper, with the same parameter names.

    It builds its mask in every forward pass and computes every token in every block. Patch embedding, MLP and head are
    those of :class:`ILLaMA`.
    """

    rotation: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.soft_mask = 0.0
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, config.width))
        self.blocks = nn.ModuleList(ReleasedBlock(config) for _ in range(config.depth))
        self.norm = ReleasedRMSNorm(config.width)
        self.head = nn.Linear(config.width, config.num_classes)
        frequencies = 10000.0 ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
        angles = torch.outer(torch.arange(config.tokens), frequencies).unsqueeze(1)
        self.register_buffer("rotation", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_classes)."""
        x = self.patch_embed(images)
        x = torch.cat([x, self.cls_token.expand(len(x), -1, -1)], dim=1) + self.pos_embed
        everything = torch.ones(x.shape[1], x.shape[1], device=x.device, dtype=x.dtype)
        mask = self.soft_mask * everything + (1 - self.soft_mask) * everything.tril()
        for block in self.blocks:
            x = block(x, mask, self.rotation)
        return self.head(self.norm(x)[:, -1])


def make_networks(config: ModelConfig, device: str) -> dict[str, ILLaMA | Released]:
    """Returns both networks, with the same random weights, in training mode."""
    torch.manual_seed(0)
    ours, released = ILLaMA(config).to(device), Released(config).to(device)
    released.load_state_dict(ours.state_dict())
    return {"ours": ours.train(), "released": released.train()}


def compare(config: ModelConfig, images: Tensor, labels: Tensor, alphas: tuple[float, ...]) -> float:
    """Returns the largest difference of a gradient in float32, relative to the largest of its parameter.

    Raises:
        AssertionError: losses or gradients differ by more than ``TOLERANCE``.
    """
    worst = 0.0
    for alpha in alphas:
        losses, gradients = [], []
        for network in make_networks(config, str(images.device)).values():
            network.soft_mask = alpha
            loss = F.cross_entropy(network(images), labels)
            losses.append(loss.item())
            parameters = dict(network.named_parameters())
            gradients.append(dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)))
        assert abs(losses[0] - losses[1]) < TOLERANCE, f"alpha {alpha}: losses {losses}"
        for name, one in gradients[0].items():
            deviation = ((one - gradients[1][name]).abs().max() / one.abs().max()).item()
            assert deviation < TOLERANCE, f"alpha {alpha}: gradient of {name} differs by {deviation:.1e}"
            worst = max(worst, deviation)
    return worst


def make_step(network: ILLaMA | Released, compiled: bool, precision: Precision, images: Tensor, labels: Tensor) -> Step:
    """Returns a function that runs a training step with a given alpha of the soft mask."""
    forward: Any = torch.compile(network) if compiled else network
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)

    def step(alpha: float) -> None:
        network.soft_mask = alpha
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = forward(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def milliseconds(step: Step, alpha: float, device: str) -> float:
    """Returns the duration of a step: by CUDA events on a GPU, by the wall clock on a CPU."""
    if device == "cpu":
        start = time.perf_counter()
        step(alpha)
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    step(alpha)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def time_steps(steps: dict[str, Step], options: BenchmarkOptions, device: str) -> dict[tuple[str, float], np.ndarray]:
    """Returns the milliseconds (rounds,) of each step with each alpha; every round runs them all."""
    turns = [(name, alpha) for alpha in options.alphas for name in steps]
    times: dict[tuple[str, float], list[float]] = {turn: [] for turn in turns}
    for index in tqdm(range(_WARM_UP + options.rounds), unit="round", leave=False, disable=None):
        # The order alternates, so that no variant always follows the same one.
        for name, alpha in turns if index % 2 else reversed(turns):
            elapsed = milliseconds(steps[name], alpha, device)
            if index >= _WARM_UP:
                times[name, alpha].append(elapsed)
    return {turn: np.array(values) for turn, values in times.items()}


def quartiles(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"q1": round(low, 3), "median": round(median, 3), "q3": round(high, 3)}


def summarize(times: dict[tuple[str, float], np.ndarray], precision: Precision) -> list[dict[str, Any]]:
    """Returns, per alpha, each variant's milliseconds, the ratios, and the time relative to the hard mask."""
    rows = []
    for alpha in dict.fromkeys(alpha for _, alpha in times):
        own = {name: values for (name, at), values in times.items() if at == alpha}
        ratios = {label: own[top] / own[bottom] for label, top, bottom in _RATIOS if {top, bottom} <= set(own)}
        against_hard = {name: values / times[name, 0.0] for name, values in own.items() if (name, 0.0) in times}
        rows.append(
            {
                "precision": precision,
                "alpha": alpha,
                "milliseconds": {name: quartiles(values) for name, values in own.items()},
                "speedup": {label: quartiles(values) for label, values in ratios.items()},
                "time_over_hard_mask": {name: quartiles(values) for name, values in against_hard.items()},
            }
        )
    return rows


def print_row(row: dict[str, Any]) -> None:
    print(f"\n{row['precision']}, alpha {row['alpha']}")
    for name, value in row["milliseconds"].items():
        over = row["time_over_hard_mask"].get(name)
        print(f"  {name:40}{_spread(value, 1)} ms" + (f"   {over['median']:.2f} of alpha 0" if over else ""))
    for label, value in row["speedup"].items():
        print(f"  faster, {label:32}{_spread(value, 2)}", flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a table of medians and quartiles, with a row per ratio and precision and a column per alpha."""
    alphas = list(dict.fromkeys(row["alpha"] for row in rows))
    cells = {
        (label, row["precision"], row["alpha"]): f"{value['median']:.2f} ({value['q1']:.2f} to {value['q3']:.2f})"
        for row in rows
        for label, value in row["speedup"].items()
    }
    lines = [
        (*place, *(cells[*place, alpha] for alpha in alphas))
        for place in dict.fromkeys((label, precision) for label, precision, _ in cells)
    ]
    return markdown(("times faster", "precision", *(f"alpha {alpha:g}" for alpha in alphas)), lines)


def _spread(value: dict[str, float], digits: int) -> str:
    return f"{value['median']:9.{digits}f}  [{value['q1']:.{digits}f}, {value['q3']:.{digits}f}]"


def main(options: BenchmarkOptions) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.threads:
        torch.set_num_threads(options.threads)
    config = ModelConfig.preset(options.size)
    torch.manual_seed(0)
    images = torch.randn(options.batch, config.in_channels, config.image_size, config.image_size, device=device)
    labels = torch.randint(config.num_classes, (options.batch,), device=device)
    deviation = compare(config, images, labels, options.alphas)
    print(f"same loss; gradients within {deviation:.1e} of each parameter's largest (allowed: {TOLERANCE:.0e})")
    results = []
    for precision in options.precisions:
        torch.compiler.reset()
        steps = {
            f"{name} compiled" if compiled else name: make_step(network, compiled, precision, images, labels)
            for compiled in ((False, True) if options.compile else (False,))
            for name, network in make_networks(config, device).items()
        }
        for row in summarize(time_steps(steps, options, device), precision):
            print_row(row)
            results.append(row)
    facts = {
        "threads": torch.get_num_threads(),
        "gradient_deviation": deviation,
        "results": results,
        "options": {name: value for name, value in asdict(options).items() if name != "out"},
    }
    print()
    write_results(options.out, "train-step", facts, table(results))


if __name__ == "__main__":
    run_command(BenchmarkOptions, main)
