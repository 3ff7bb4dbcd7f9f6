"""Classify images, or compute their features, with any engine:

python deploy/predict.py --engine runs/ptq/int8 photo.jpg
python deploy/predict.py --engine runs/ptq/int8/model.onnx --runtime onnxruntime --watch /data/line

Prints the five most probable classes of each image, or the shape and the length of its features. The engine can be a
bundle, a TensorRT engine or an ONNX file.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from illama.cli import run_command
from deploy.runtimes.names import RuntimeName
from illama.bundle import FEATURES, bundle_of
from illama.errors import UserError
from illama.options import Positive, ThreadsOrAll

if TYPE_CHECKING:
    from deploy.runtimes.classify import Infer


@dataclass(frozen=True)
class PredictOptions:
    """Print the five most probable classes of each image, or the shape of its features.

    Probabilities are calibrated if a temperature is stored with the engine (python eval/accuracy.py --store).

    Attributes:
        images: paths to image files, or to folders of them.
        engine: path to a bundle, to an engine (its folder or its .engine file), or to an .onnx file.
        runtime: openvino, onnxruntime, tensorrt, torch, ...; if not given, the preferred runtime for the engine.
        watch: path to a folder; every image that appears in it is classified.
        seconds: time after which --watch stops; if not given, it runs until Ctrl-C.
        threads: number of threads on a CPU; 0 for one per core.
        unverified: run an engine even if it computes other logits than its golden answers.
        save: path to a .npy file for the outputs of all images, (n, classes) or (n, ...) features, in the order of the
            lines.
        server: URL of a model of python deploy/serve.py, such as http://127.0.0.1:8000/v2/models/int8, to ask instead
            of --engine.
    """

    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    engine: Path = Path("runs/ptq/int8")
    runtime: RuntimeName | None = None
    watch: Path | None = None
    seconds: Positive | None = None
    threads: ThreadsOrAll = 0
    unverified: bool = False
    save: Path | None = None
    server: str | None = None

    def __post_init__(self) -> None:
        if bool(self.images) == bool(self.watch):
            raise UserError("give either images or --watch FOLDER")
        if self.watch and self.save:
            raise UserError("--save writes the outputs of given images: leave out --watch")
        if self.server and (self.runtime or self.unverified):
            raise UserError("--runtime and --unverified are for an engine here, not for --server: leave them out")


def main(options: PredictOptions) -> None:
    # Imported here, so that --help is fast.
    import numpy as np

    from deploy.runtimes.classify import classify, expand_images, new_images
    from illama.atomic_write import write_file

    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        infer, temperature = _on_server(options.server) if options.server else _in_engine(options, stack)
        until = time.monotonic() + options.seconds if options.seconds is not None else None
        paths = new_images(options.watch, until) if options.watch else expand_images(options.images)
        outputs = classify(infer, temperature, paths, skip_broken=bool(options.watch))
        kept = deque(outputs, maxlen=None if options.save else 0)  # prints the lines
    if options.save:
        with write_file(options.save) as draft, draft.open("wb") as file:
            np.save(file, np.stack(kept))


def _on_server(url: str) -> tuple[Infer, float]:
    from deploy.serving.client import ServedModel

    model = ServedModel(url)
    print(url if model.name == FEATURES else f"{url}; probabilities are not calibrated", flush=True)
    return model.infer, 1.0


def _in_engine(options: PredictOptions, stack: ExitStack) -> tuple[Infer, float]:
    from deploy.runtimes.classify import in_engine
    from deploy.runtimes.image_input import ImageInput
    from deploy.runtimes.open_engine import open_file
    from deploy.runtimes.temperature import read_temperature
    from illama.manifest import Manifest

    manifest = Manifest.read(bundle_of(options.engine))
    engine, file = open_file(options.engine, options.runtime, options.threads, options.unverified)
    stack.callback(engine.close)
    temperature = read_temperature(file)
    calibration = f"calibrated (temperature {temperature:.3f})" if temperature else "not calibrated"
    verified = "verified" if engine.verified else "NOT verified"
    probabilities = "" if manifest.features else f"; probabilities are {calibration}"
    print(f"{options.engine} in {engine.runtime}, {verified}{probabilities}", flush=True)
    return in_engine(engine, ImageInput.of(manifest), manifest.classes), temperature or 1.0


if __name__ == "__main__":
    run_command(PredictOptions, main)
