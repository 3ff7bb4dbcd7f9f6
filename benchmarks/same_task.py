"""The same task in this toolkit and others: an INT8 ONNX file of a timm ViT, with pictures of one's own.

    cd runs/same-task/venvs
    python -m venv modelopt && modelopt/bin/pip install 'nvidia-modelopt[onnx]' requests huggingface-hub timm
    python -m venv nncf && nncf/bin/pip install nncf onnx onnxruntime timm torch openvino
    python -m venv olive && olive/bin/pip install olive-ai requests onnxruntime timm torchvision
    python -m venv ultralytics && ultralytics/bin/pip install ultralytics nncf onnx onnxruntime onnxslim
    cd -; python benchmarks/same_task.py

Every tool runs as its documentation shows, in an environment of its own, by the commands of ``TOOLS`` and the scripts
in ``benchmarks/tools``. A tool that is not installed, or fails, has a row that says so. The network has random weights
and a linear head fitted to Fashion-MNIST: it tests the arithmetic. It writes ``same-task.json`` and ``same-task.md``
to ``results/same-task``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_pil_image

from illama.cli import run_command
from eval.report.store import write_results
from illama.data.datasets import Sample, open_data
from illama.errors import UserError
from illama.markdown_table import markdown
from illama.progress import track
from illama.randomness import isolated_randomness
from quant.mixed_precision.layer_effects import decibels

SCRIPTS = Path(__file__).parent.resolve() / "tools"
NETWORK = "vit_tiny_patch16_224"
HEAD = 1000  # images that the head is fitted to


@dataclass(frozen=True)
class Tool:
    """A tool's way to the task.

    Attributes:
        venv: folder of its environment; None for this one.
        command: for bash, in the working folder; PYTHON, BIN and SCRIPTS are set.
        file: the INT8 file that it writes.
        onnx: whether it starts from vit.onnx, whose export is timed by itself.
        same_network: whether it quantizes the network of the others.
    """

    title: str
    venv: str | None
    command: str
    file: str
    onnx: bool = False
    same_network: bool = True


OURS = (
    f"$BIN/illama quantize --model timm:{NETWORK} --checkpoint vit.safetensors --data pictures/flat --no-engines "
    "--no-report --restart --schemes {scheme} --out ours-{scheme}"
)
TOOLS = (
    Tool("this toolkit, int8", None, OURS.format(scheme="int8"), "ours-int8/int8/model.onnx"),
    Tool(
        "this toolkit, int8-accurate",
        None,
        OURS.format(scheme="int8-accurate"),
        "ours-int8-accurate/int8-accurate/model.onnx",
    ),
    Tool(
        "ModelOpt, PyTorch, SmoothQuant",
        "modelopt",
        "$PYTHON $SCRIPTS/modelopt_int8.py INT8_SMOOTHQUANT_CFG",
        "INT8_SMOOTHQUANT_CFG/modelopt.onnx",
    ),
    Tool(
        "ModelOpt, PyTorch, default",
        "modelopt",
        "$PYTHON $SCRIPTS/modelopt_int8.py INT8_DEFAULT_CFG",
        "INT8_DEFAULT_CFG/modelopt.onnx",
    ),
    Tool(
        "ModelOpt, ONNX, default",
        "modelopt",
        "cp vit.onnx input.onnx && $PYTHON -m modelopt.onnx.quantization --onnx_path input.onnx --quantize_mode int8 "
        "--calibration_data_path calibration.npy --calibration_eps cpu --output_path modelopt-int8.onnx",
        "modelopt-int8.onnx",
        onnx=True,
    ),
    Tool("NNCF, ONNX, TRANSFORMER", "nncf", "$PYTHON $SCRIPTS/nncf_int8.py", "nncf-int8.onnx", onnx=True),
    Tool(
        "Olive, static, products only",
        "olive",
        "rm -rf olive && cp $SCRIPTS/olive_pictures.py . && $PYTHON -m olive run --config $SCRIPTS/olive_int8.json",
        "olive/model.onnx",
        onnx=True,
    ),
    Tool(
        "Ultralytics, yolo26n-cls",
        "ultralytics",
        "$BIN/yolo export model=yolo26n-cls.yaml format=onnx quantize=8 data=$PWD/pictures imgsz=224 split=train",
        "yolo26n-cls_int8.onnx",
        same_network=False,
    ),
)


@dataclass(frozen=True)
class SameTaskOptions:
    """Quantize one timm ViT with several tools, and compare the files with float32.

    Attributes:
        work: folder of the pictures, the network, the files of the tools, and their environments in venvs/.
        calibration_images: number of calibration pictures.
        images: number of test pictures.
        seconds: how long a tool may take.
        again: run again the other tools that succeeded in an earlier run, whose rows are in the results.
        out: folder of the results.
    """

    work: Path = Path("runs/same-task")
    calibration_images: int = 128
    images: int = 200
    seconds: float = 1200.0
    again: bool = False
    out: Path = Path("results/same-task")


@dataclass(frozen=True)
class Row:
    """A tool's file, compared with float32.

    Attributes:
        megabytes: its size in 10^6 bytes.
        seconds: time of its command, without the export of vit.onnx.
        sqnr_db: SQNR of the logits in dB, as the file says: in ONNX Runtime without optimizations.
        agreement: percent of the test pictures with float32's class, likewise.
        optimized_sqnr_db: SQNR in ONNX Runtime with its default options, on this CPU.
        problem: why there are no figures.
    """

    title: str
    megabytes: float | None = None
    seconds: float | None = None
    sqnr_db: float | None = None
    agreement: float | None = None
    optimized_sqnr_db: float | None = None
    problem: str = ""


def write_pictures(images: Dataset[Sample], folders: list[Path]) -> None:
    """Writes images as 224-pixel PNG files into every folder; {} in its name is the class."""
    for number in range(len(images)):  # type: ignore[arg-type]
        image, label = images[number]
        picture = to_pil_image(image).resize((224, 224), Image.Resampling.BICUBIC).convert("RGB")
        for folder in (Path(str(each).format(label)) for each in folders):
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"{number:04}.png")


def read_pictures(folder: Path) -> torch.Tensor:
    """Returns the pictures under a folder as the network takes them, (B, 3, 224, 224)."""
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=timm.create_model(NETWORK)))
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in sorted(folder.rglob("*.png"))])


def prepare(options: SameTaskOptions) -> float:
    """Writes the pictures, the network and vit.onnx; returns the seconds of the export."""
    work, data = options.work, open_data("fashion-mnist")
    shutil.rmtree(work / "pictures", ignore_errors=True)
    flat = work / "pictures" / "flat"
    write_pictures(data.calibration(options.calibration_images), [flat, work / "pictures" / "train" / "{}"])
    step = len(data.test()) // options.images  # type: ignore[arg-type]
    test = torch.utils.data.Subset(data.test(), range(0, step * options.images, step))
    write_pictures(test, [work / "pictures" / "val" / "{}"])
    head, labels = data.calibration(HEAD), [data.calibration(HEAD)[i][1] for i in range(HEAD)]
    with isolated_randomness(0):
        model: Any = timm.create_model(NETWORK, num_classes=10).eval()
    write_pictures(head, [work / "head"])
    with torch.inference_mode():
        features = torch.cat(
            [
                model.forward_head(model.forward_features(each), pre_logits=True)
                for each in track(read_pictures(work / "head").split(50), "fit the head", "batch")
            ]
        )
    fit_head(model.head, features, torch.tensor(labels))
    save_file(model.state_dict(), work / "vit.safetensors")
    np.save(work / "calibration.npy", read_pictures(flat).numpy())
    start, batch = time.monotonic(), torch.export.Dim("batch")
    torch.onnx.export(
        model,
        (torch.zeros(2, 3, 224, 224),),
        work / "vit.onnx",
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: batch},),
        external_data=False,
        verbose=False,
    )
    return time.monotonic() - start


def fit_head(head: torch.nn.Linear, features: torch.Tensor, labels: torch.Tensor) -> None:
    """Fits a linear head by ridge regression to one-hot labels; logits are scaled to a spread of 10."""
    mean, spread = features.double().mean(0), features.double().std(0) + 1e-6
    inputs = (features.double() - mean) / spread
    targets = torch.eye(head.out_features, dtype=torch.float64)[labels] - 1 / head.out_features
    gram = inputs.T @ inputs + len(inputs) * torch.eye(inputs.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, inputs.T @ targets).T / spread * 10
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(-weight @ mean)


def logits(path: Path, images: np.ndarray, optimized: bool) -> np.ndarray:
    """Returns the logits (n, classes) of an ONNX file in ONNX Runtime, float64."""
    settings = onnxruntime.SessionOptions()
    if not optimized:
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    kind = np.float16 if "float16" in given.type else np.float32
    answers = [session.run(None, {given.name: each[None].astype(kind)})[0] for each in images]
    return np.concatenate(answers).astype(np.float64)


def run_tool(tool: Tool, options: SameTaskOptions) -> tuple[float, str]:
    """Runs a tool; returns its seconds and, if it failed, why."""
    binaries = options.work.resolve() / "venvs" / tool.venv / "bin" if tool.venv else Path(sys.executable).parent
    if not (binaries / "python").exists():
        return 0.0, "not installed"
    names = {"BIN": str(binaries), "PYTHON": str(binaries / "python"), "SCRIPTS": str(SCRIPTS)}
    quiet = {"OLIVE_DISABLE_TELEMETRY": "1", "YOLO_OFFLINE": "1"}
    start, log = time.monotonic(), options.work / f"{tool.title}.log"
    with log.open("w") as file:
        try:
            status = subprocess.run(
                ["bash", "-ec", tool.command],
                cwd=options.work,
                env={**os.environ, **names, **quiet},
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=options.seconds,
            ).returncode
        except subprocess.TimeoutExpired:
            return 0.0, f"not finished in {options.seconds:g} s"
    last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
    return time.monotonic() - start, f"status {status}: {last[:150]}" if status else ""


def measure(tool: Tool, options: SameTaskOptions, images: np.ndarray, exact: np.ndarray) -> Row:
    """Returns the row of a tool."""
    seconds, problem = run_tool(tool, options)
    path = options.work / tool.file
    if problem or not path.exists():
        return Row(tool.title, problem=problem or f"wrote no {tool.file}")
    row = Row(tool.title, sum(each.stat().st_size for each in path.parent.glob(f"{path.name}*")) / 1e6, seconds)
    if not tool.same_network:
        return row
    try:
        plain, fast = (logits(path, images, optimized) for optimized in (False, True))
    except Exception as error:  # of ONNX Runtime, whose errors share no base class
        return Row(row.title, row.megabytes, seconds, problem=f"ONNX Runtime: {str(error).splitlines()[0][:150]}")
    noise = [decibels((exact**2).sum(), ((each - exact) ** 2).sum()) for each in (plain, fast)]
    same = float((plain.argmax(1) == exact.argmax(1)).mean() * 100)
    return Row(row.title, row.megabytes, seconds, noise[0], same, noise[1])


def main(options: SameTaskOptions) -> None:
    if options.images < 1 or options.calibration_images < 1:
        raise UserError("--images and --calibration-images must be at least 1")
    options.work.mkdir(parents=True, exist_ok=True)
    export_seconds = prepare(options)
    images = read_pictures(options.work / "pictures" / "val").numpy()
    exact = logits(options.work / "vit.onnx", images, optimized=False)
    earlier = {} if options.again else earlier_run(options)
    known = earlier_rows(earlier)
    rows = [known.get(tool.title) or measure(tool, options, images, exact) for tool in track(TOOLS, "quantize", "tool")]
    facts = {
        "network": NETWORK,
        "images": options.images,
        "calibration_images": options.calibration_images,
        "export_seconds": export_seconds,
        "float32_megabytes": (options.work / "vit.onnx").stat().st_size / 1e6,
        "tools": [{**asdict(row), **asdict(tool)} for row, tool in zip(rows, TOOLS, strict=True)],
        "installed": {
            tool.venv: installed(options.work / "venvs" / tool.venv) or earlier.get("installed", {}).get(tool.venv, {})
            for tool in TOOLS
            if tool.venv
        },
    }
    write_results(options.out, "same-task", facts, table(rows))


def earlier_run(options: SameTaskOptions) -> dict[str, Any]:
    """Returns the results of an earlier run with as many images; nothing if there is none."""
    path = options.out / "same-task.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    same = all(found.get(name) == getattr(options, name) for name in ("images", "calibration_images"))
    return found if same else {}


def earlier_rows(earlier: dict[str, Any]) -> dict[str, Row]:
    """Returns the rows of an earlier run, of the other tools that succeeded."""
    rows = [Row(**{each.name: row[each.name] for each in fields(Row)}) for row in earlier.get("tools", ())]
    others = {tool.title for tool in TOOLS if tool.venv}
    return {row.title: row for row in rows if row.title in others and not row.problem}


def installed(venv: Path) -> dict[str, str]:
    """Returns the packages of an environment, with their versions."""
    python = venv / "bin" / "python"
    if not python.exists():
        return {}
    code = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    found = json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
    shown = ("nvidia-modelopt", "nncf", "olive-ai", "ultralytics", "onnxruntime", "openvino", "torch", "timm")
    return {name: found[name] for name in shown if name in found}


def table(rows: list[Row]) -> str:
    """Returns the results in Markdown."""
    heads = ("file", "MB", "SQNR dB", "agrees %", "SQNR dB, optimized", "seconds")
    lines = []
    for row in rows:
        values = (row.megabytes, row.sqnr_db, row.agreement, row.optimized_sqnr_db)
        texts = [
            "-" if each is None else f"{each:.{digits}f}" for each, digits in zip(values, (2, 1, 1, 1), strict=True)
        ]
        lines.append((row.title, *texts, row.problem or f"{row.seconds:.0f}"))
    return markdown(heads, lines)


if __name__ == "__main__":
    run_command(SameTaskOptions, main)
