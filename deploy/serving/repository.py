"""Model repositories for Triton Inference Server, written from bundles.

Each model NAME consists of three Triton models:

    NAME               an ensemble of the two below: the bytes of image files -> logits or features
    NAME-preprocess    the bundle's preprocessing (Python backend)
    NAME-network       versions 1, 2, ...: on CPUs a runtime of this toolkit (Python backend), on GPUs a TensorRT engine

Each version has a known answer (:mod:`deploy.serving.known_answer`), by which a server is checked.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deploy.runtimes.image_input import ImageInput
from deploy.runtimes.names import RuntimeName
from deploy.runtimes.open_engine import open_engine
from deploy.runtimes.recommended_runtime import RuntimeChoice, recommend_runtime
from deploy.runtimes.verification import find_golden
from deploy.serving.health import KNOWN_ANSWER
from deploy.serving.known_answer import KnownAnswer, golden_file, pattern_file
from deploy.serving.model_config import config_texts
from deploy.serving.serving_options import ServingOptions
from deploy.trt.record import EngineRecord, find_engines
from illama.atomic_write import sweep, write_folder
from illama.bundle import CPU_ONNX, FUSED_ONNX, GOLDEN, INPUT, MANIFEST, command_line, package_versions
from illama.errors import UserError
from illama.golden_answers import GoldenAnswers
from illama.graph.writer import copy_graph
from illama.manifest import Manifest
from illama.structured_files import read_json

RECORD = "repository.json"  # Triton ignores files in the repository's folder
FORMAT = 4
PLAN = "model.plan"


def is_repository(folder: Path) -> bool:
    """Whether a folder is a repository that this module wrote, which may be replaced by a newer one."""
    return (folder / RECORD).is_file()


def check_repository(folder: Path) -> None:
    """Raises UserError unless a folder is a repository of this module in the current format."""
    try:
        found = read_json(folder / RECORD, dict[str, Any]).get("format", 1)  # the other fields are for people
    except UserError as error:
        raise UserError(f"{folder} is not a repository of python deploy/serve.py: give bundles to write one") from error
    if found != FORMAT:
        raise UserError(f"{folder} has format {found}, this version reads {FORMAT}: write it again from its bundles")


def name_models(bundles: Sequence[Path], name: str | None) -> dict[str, Sequence[Path]]:
    """Returns model name -> the bundles that become its versions.

    Args:
        name: name of one model for all bundles; if not given, each bundle becomes a model named after its folder.

    Raises:
        UserError: a name that Triton or a file system does not accept, or two models of the same name.
    """
    models: dict[str, Sequence[Path]] = {bundle.resolve().name: (bundle,) for bundle in bundles}
    if name and bundles:
        models = {name: bundles}
    elif len(models) < len(bundles):
        raise UserError("two bundles have the same folder name: give --name to make them versions of one model")
    folders = [f"{model}{part}" for model in models for part in ("", "-preprocess", "-network")]
    for folder in folders:
        if not re.fullmatch(r"\w[\w.-]{,199}", folder, re.ASCII) or folders.count(folder) > 1:
            raise UserError(
                f"{folder[:200]!r} is not a valid model name: rename the bundle, or give a --name of at most 180 "
                "letters, digits, '_', '-' and '.'"
            )
    return models


def describe_model(out: Path, name: str, options: ServingOptions) -> str:
    """Returns the versions of a model in a repository, and its runtime on a CPU, as text for the user."""
    numbers = versions(out, name)
    listed = ", ".join(map(str, numbers))
    lines = [f"{out}: {name}, versions {listed}; the newest {options.live_versions} are served"]
    if options.device == "cpu":
        choice = RuntimeChoice.read(out / f"{name}-network" / str(numbers[-1]))
        lines.append(f"{name} runs {choice.file.name} in {choice.runtime}, {choice.reason}")
    return "\n".join(lines)


def write_repository(
    out: Path, models: Mapping[str, Sequence[Path]], options: ServingOptions, version: int = 1
) -> None:
    """Writes a repository, or replaces an earlier one, as one atomic write.

    Args:
        models: model name -> the bundles that become its versions.
        version: number of the first version of each model.

    Raises:
        UserError: a bundle cannot be served with these options, or the bundles of a model differ in more than weights.
    """
    with write_folder(out, is_repository) as draft:
        for name, bundles in models.items():
            _write_model(draft, name, bundles[0], options)
            for number, bundle in enumerate(bundles, version):
                _check_same_config(draft, name, bundle, options)
                write_version(draft, name, bundle, number, options)
        record = {"format": FORMAT, "command": command_line(), "versions": package_versions()}
        (draft / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def add_versions(
    out: Path, models: Mapping[str, Sequence[Path]], options: ServingOptions, version: int | None = None
) -> dict[str, list[int]]:
    """Adds bundles as new versions of existing models, each in one atomic write; returns model name -> their numbers.

    Args:
        models: model name -> the bundles that become its new versions.
        version: number of the first new version. Defaults to the next number of each model.

    Raises:
        UserError: the repository or a model does not exist, a version exists already, a bundle or the options do not
            match the model, or a bundle cannot be served.
    """
    check_repository(out)
    for name, bundles in models.items():
        for bundle in bundles:
            _check_same_config(out, name, bundle, options)
    added = {}
    for name, bundles in models.items():
        existing = versions(out, name)
        first = version or max(existing, default=0) + 1
        added[name] = list(range(first, first + len(bundles)))
        if duplicate := set(added[name]) & set(existing):
            raise UserError(f"{out} has version {min(duplicate)} of {name} already: give another --version, or none")
    for name, bundles in models.items():
        for number, bundle in zip(added[name], bundles, strict=True):
            write_version(out, name, bundle, number, options)
    return added


def versions(out: Path, name: str) -> list[int]:
    """Returns the numbers of the versions of a model, in ascending order."""
    return sorted(int(path.name) for path in (out / f"{name}-network").iterdir() if path.name.isdigit())


def write_version(out: Path, name: str, bundle: Path, number: int, options: ServingOptions) -> None:
    """Writes one bundle's network into the repository, as one atomic write, so that a running server can load it.

    Raises:
        UserError: the bundle cannot be served, or the version exists already; versions are never replaced.
    """
    sweep(out / f"{name}-network")  # removes what killed commands left, also of other versions
    with write_folder(out / f"{name}-network" / str(number), lambda _: False) as draft:
        if options.device == "gpu":
            shutil.copyfile(find_servable_engine(bundle, options.max_batch), draft / PLAN)
            graph = bundle / (FUSED_ONNX if (bundle / FUSED_ONNX).exists() else CPU_ONNX)
            known = create_known_answer(graph, "onnxruntime", options.unverified)  # this machine may have no GPU
        else:
            choice = replace(recommend_runtime(bundle, options.runtime), unverified=options.unverified)
            known = create_known_answer(choice.file, choice.runtime, options.unverified)
            copy_graph(choice.file, draft)
            choice.write(draft)
            _write_code(draft, "Network")
        known.write(draft / KNOWN_ANSWER)
        for name in (MANIFEST, GOLDEN):
            if (bundle / name).exists():
                shutil.copyfile(bundle / name, draft / name)


def create_known_answer(file: Path, runtime: RuntimeName, unverified: bool = False) -> KnownAnswer:
    """Creates the known answer of a file of a bundle: a golden answer if it has any, else the engine's own.

    Args:
        unverified: see :func:`deploy.runtimes.open_engine.open_engine`.

    Raises:
        UserError: the file cannot be run, its golden answers are wrong, or its input or its output is not that of
            the bundle's manifest.
    """
    manifest, golden = Manifest.read(file.parent), find_golden(file)
    image_input = ImageInput.of(manifest)
    engine = open_engine(file, runtime, unverified=unverified)

    def infer(images: np.ndarray) -> np.ndarray:
        try:
            output = engine.infer(images)
        except Exception as error:  # the runtimes' exceptions have no other common base class
            raise UserError(
                f"{file} cannot run an image of shape {image_input.shape}, the shape in its manifest: export it again"
            ) from error
        if manifest.network == "segmentation":
            raise UserError(f"{file} is of a segmentation network: only classes and features can be served")
        if output.shape[1:] != manifest.output_shape:
            raise UserError(
                f"{file} has an output of shape {output.shape[1:]} per image, but its manifest has "
                f"{manifest.output_shape}: export it again"
            )
        if not np.isfinite(output).all():
            raise UserError(f"the output of {file} is not finite: find the layer with python quant/debug_layers.py")
        return output

    def prepare(png: io.BytesIO) -> np.ndarray:
        return image_input.read(png, lambda: "of the known answer")

    answers = GoldenAnswers.read(golden) if golden else None
    pattern = pattern_file(*(image_input.frame or manifest.preprocessing.size)[:2])
    png = golden_file(answers, manifest.preprocessing) if answers else pattern
    known = KnownAnswer.create(infer, prepare, png)
    return known.with_golden(answers, engine.arithmetic) if answers and engine.verified else known


def find_servable_engine(bundle: Path, max_batch: int) -> Path:
    """Returns the bundle's first TensorRT engine that Triton can serve.

    Raises:
        UserError: the bundle has no such engine; the message says why the first one cannot be served.
    """
    first_error = None
    for path in find_engines(bundle, "tensorrt"):
        try:
            _check_engine(path, Manifest.read(bundle), max_batch)
            return path
        except UserError as error:
            first_error = first_error or error
    raise first_error or UserError(
        f"{bundle} has no engine of the full TensorRT, the only kind that Triton runs: run python deploy/build.py on a "
        "machine with the server's GPU and TensorRT version"
    )


def _check_engine(path: Path, manifest: Manifest, max_batch: int) -> None:
    record = EngineRecord.read(path)
    image_input = ImageInput.of(manifest)
    inputs = {INPUT: ("uint8" if image_input.frame else "float", (-1, *image_input.shape))}
    outputs = {manifest.output: ("float", (-1, *manifest.output_shape))}
    if (record.inputs, record.outputs) != (inputs, outputs):
        raise UserError(
            f"{path} has the input {record.inputs} and the output {record.outputs}, but Triton can only serve {inputs} "
            f"and {outputs}, which are in the manifest: build it from this bundle"
        )
    if record.options.get("weight_stripped"):
        raise UserError(f"{path} has no weights, and Triton does not refit it: build it without --weight-stripped")
    min_batch, _, batch_limit = record.batch
    if min_batch > 1 or max_batch > batch_limit:
        raise UserError(
            f"{path} takes batches of {min_batch} to {batch_limit}, but the server needs 1 to {max_batch}: "
            "lower --max-batch, or build with another --batch"
        )


def _write_model(out: Path, name: str, bundle: Path, options: ServingOptions) -> None:
    """Writes the three folders of a model, without a version of the network."""
    for path, text in config_texts(name, Manifest.read(bundle), options).items():
        (out / path).parent.mkdir(exist_ok=True)
        (out / path).write_text(text)
    for part in ("", "-preprocess"):
        (out / f"{name}{part}" / "1").mkdir()
    (out / name / "1" / ".keep").touch()  # Triton requires a version of an ensemble; some storage has no empty folders
    _write_code(out / f"{name}-preprocess" / "1", "Preprocess")


def _write_code(folder: Path, model: str) -> None:
    """Writes the ``model.py`` for Triton's Python backend, which imports a class of :mod:`deploy.serving.backend`.

    An empty file named __pycache__ prevents Python from creating that folder, whose new modification time would make a
    polling server load the model again.
    """
    (folder / "model.py").write_text(f"from deploy.serving.backend import {model} as TritonPythonModel  # noqa: F401\n")
    (folder / "__pycache__").touch()


def _check_same_config(out: Path, name: str, bundle: Path, options: ServingOptions) -> None:
    """Raises UserError unless the model's files are those that this bundle and these options would write."""
    for path, text in config_texts(name, Manifest.read(bundle), options).items():
        if not (out / path).is_file():
            raise UserError(
                f"{out} has no model {name!r}: give the --name of a model, or omit --add to write a new repository"
            )
        if (out / path).read_text() != text:
            raise UserError(
                f"{bundle} cannot be a version of {name!r}, because {path} differs: versions must have equal options, "
                "preprocessing and classes; give another --name"
            )
