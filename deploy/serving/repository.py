"""A model repository for Triton Inference Server, written from bundles.

Each model NAME is three of Triton's:

    NAME               an ensemble of the two below: the bytes of image files -> logits
    NAME-preprocess    the bundle's own preprocessing (Python backend)
    NAME-network       versions 1, 2, ...: a runtime of this toolkit (Python backend) on CPUs, a TensorRT engine on GPUs

Each version holds a known answer (:mod:`deploy.serving.known_answer`), by which a server is checked.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from deploy.runtimes.image_input import ImageInput
from deploy.runtimes.names import RuntimeName
from deploy.runtimes.open_engine import open_engine
from deploy.runtimes.recommended_runtime import RuntimeChoice, recommend_runtime
from deploy.serving.health import KNOWN_ANSWER
from deploy.serving.known_answer import KnownAnswer
from deploy.serving.model_config import config_texts
from deploy.serving.options import ServingOptions
from deploy.trt.record import EngineRecord, find_engines
from illama.atomic_write import sweep, write_folder
from illama.bundle import CPU_ONNX, FUSED_ONNX, INPUT, MANIFEST, OUTPUT, Manifest, command_line, package_versions
from illama.errors import UserError

RECORD = "repository.json"  # in the repository's folder, where Triton looks at folders only
FORMAT = 2
PLAN = "model.plan"


def is_repository(folder: Path) -> bool:
    """Whether a folder is a repository that this module wrote, and so may be replaced by a newer one."""
    return (folder / RECORD).is_file()


def check_repository(folder: Path) -> None:
    """UserError unless a folder is a repository as this module writes it now."""
    try:
        found = json.loads((folder / RECORD).read_text()).get("format", 1)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder} is no repository of this command: give it bundles to write one") from error
    if found != FORMAT:
        raise UserError(f"{folder} was written by another version of this toolkit: write it again from its bundles")


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
    """Write a repository, whole or not at all; an earlier one in its place is replaced.

    Args:
        models: by name, the bundles that become versions ``version`` and on of it.

    Raises:
        UserError: a bundle that cannot be served as asked, or two of one model that differ in more than weights.
    """
    with write_folder(out, is_repository) as draft:
        for name, bundles in models.items():
            _write_model(draft, name, bundles[0], options)
            for number, bundle in enumerate(bundles, version):
                _check_like(draft, name, bundle, options)
                write_version(draft, name, bundle, number, options)
        facts = {"format": FORMAT, "command": command_line(), "versions": package_versions()}
        (draft / RECORD).write_text(json.dumps(facts, indent=2) + "\n")


def add_versions(
    out: Path, models: Mapping[str, Sequence[Path]], options: ServingOptions, version: int | None = None
) -> dict[str, list[int]]:
    """Add the bundles as new versions of models that are there, each whole or not at all; their numbers.

    Raises:
        UserError: no such repository or model, other options or another kind of model, a version that is there, or a
            bundle that cannot be served.
    """
    check_repository(out)
    for name, bundles in models.items():
        for bundle in bundles:
            _check_like(out, name, bundle, options)
    added = {}
    for name, bundles in models.items():
        there = versions(out, name)
        first = version or max(there, default=0) + 1
        added[name] = list(range(first, first + len(bundles)))
        if taken := set(added[name]) & set(there):
            raise UserError(f"{out} has version {min(taken)} of {name}: choose another --version, or none for the next")
    for name, bundles in models.items():
        for number, bundle in zip(added[name], bundles, strict=True):
            write_version(out, name, bundle, number, options)
    return added


def versions(out: Path, name: str) -> list[int]:
    """The numbers of the versions of a model, in order."""
    return sorted(int(path.name) for path in (out / f"{name}-network").iterdir() if path.name.isdigit())


def write_version(out: Path, name: str, bundle: Path, number: int, options: ServingOptions) -> None:
    """Put one bundle's network into the repository, by a rename that a running server sees whole or not at all.

    Raises:
        UserError: the bundle cannot be served, or that version is there: none is ever replaced.
    """
    sweep(out / f"{name}-network")  # of other versions, too
    with write_folder(out / f"{name}-network" / str(number), lambda _: False) as draft:
        if options.device == "gpu":
            shutil.copyfile(checked_engine(bundle, options.max_batch), draft / PLAN)
            graph = bundle / (FUSED_ONNX if (bundle / FUSED_ONNX).exists() else CPU_ONNX)
            known = known_answer(bundle, graph, "onnxruntime")  # this machine may have another GPU, or none
        else:
            choice = recommend_runtime(bundle, options.runtime)
            known = known_answer(bundle, choice.file, choice.runtime)
            shutil.copyfile(choice.file, draft / choice.file.name)
            choice.write(draft)
            _write_code(draft, "Network")
        known.write(draft / KNOWN_ANSWER)
        shutil.copyfile(bundle / MANIFEST, draft / MANIFEST)


def known_answer(bundle: Path, file: Path, runtime: RuntimeName) -> KnownAnswer:
    """What a file of a bundle answers to a known picture.

    Raises:
        UserError: the file cannot be run, takes other images than its manifest says, or does not classify them into
            its classes.
    """
    manifest = Manifest.read(bundle)
    takes, classes, engine = ImageInput.of(manifest), len(manifest.classes), open_engine(file, runtime)

    def infer(images: np.ndarray) -> np.ndarray:
        try:
            logits = engine.infer(images)
        except Exception as error:  # a runtime's exceptions share no other base class
            raise UserError(
                f"{file} takes no images of shape {takes.shape}, as its manifest says: make it again"
            ) from error
        if logits.ndim != 2:
            raise UserError(f"{file} answers an image with {logits.shape[1:]}, and only a classifier can be served")
        if logits.shape[1] != classes:
            raise UserError(f"{file} gives {logits.shape[1]} classes, its manifest names {classes}")
        if not np.isfinite(logits).all():
            raise UserError(f"the logits of {file} are not finite: make it again, and see python quant/debug_layers.py")
        return logits

    size = takes.preprocessing.image_size
    picture = takes.frame[:2] if takes.frame else (size, size)
    return KnownAnswer.ask(infer, lambda png: takes.read(png, lambda: "of the known answer"), picture)


def checked_engine(bundle: Path, max_batch: int) -> Path:
    """The bundle's first TensorRT engine that Triton can run, the very file that its record describes.

    Raises:
        UserError: there is none, or the first is not that file, has no weights, other inputs or outputs than the
            model's config, or was built for other batches.
    """
    refused = None
    for path in find_engines(bundle, "tensorrt"):
        try:
            _check_engine(path, Manifest.read(bundle), max_batch)
            return path
        except UserError as error:
            refused = refused or error
    raise refused or UserError(
        f"{bundle} has no engine of the full TensorRT, and Triton runs no other: on a machine "
        "with that GPU and Triton's TensorRT run python deploy/build.py"
    )


def _check_engine(path: Path, manifest: Manifest, max_batch: int) -> None:
    record = EngineRecord.read(path)
    takes = ImageInput.of(manifest)
    wanted = {INPUT: ["uint8" if takes.frame else "float", [-1, *takes.shape]]}
    named = {OUTPUT: ["float", [-1, len(manifest.classes)]]}
    if (record.inputs, record.outputs) != (wanted, named):
        raise UserError(
            f"{path} takes {record.inputs} and gives {record.outputs}, and not {wanted} and {named}: "
            "Triton serves classifiers that take what their manifest says"
        )
    if record.options.get("weight_stripped"):
        raise UserError(f"{path} has no weights, and Triton does not refit it: build it without --weight-stripped")
    smallest, _, largest = record.batch
    if smallest > 1 or max_batch > largest:
        raise UserError(
            f"{path} was built for batches of {smallest} to {largest}, and 1 to {max_batch} are asked for: "
            "lower --max-batch, or build with another --batch"
        )


def _write_model(out: Path, name: str, bundle: Path, options: ServingOptions) -> None:
    """The three folders of a model, without a version of the network."""
    for path, text in config_texts(name, Manifest.read(bundle), options).items():
        (out / path).parent.mkdir(exist_ok=True)
        (out / path).write_text(text)
    for part in ("", "-preprocess"):
        (out / f"{name}{part}" / "1").mkdir()
    (out / name / "1" / ".keep").touch()  # Triton wants a version of an ensemble too, and some storage no empty folder
    _write_code(out / f"{name}-preprocess" / "1", "Preprocess")


def _write_code(folder: Path, model: str) -> None:
    """The ``model.py`` of Triton's Python backend that names a class of :mod:`deploy.serving.backend`.

    Python would keep it compiled in a folder beside it, whose time a polling server takes for that of a new model:
    it would load everything twice. An empty file in that folder's place prevents it.
    """
    (folder / "model.py").write_text(f"from deploy.serving.backend import {model} as TritonPythonModel  # noqa: F401\n")
    (folder / "__pycache__").touch()


def _check_like(out: Path, name: str, bundle: Path, options: ServingOptions) -> None:
    """UserError unless the model's folders are what this bundle and these options would have written."""
    for path, text in config_texts(name, Manifest.read(bundle), options).items():
        if not (out / path).is_file():
            raise UserError(f"{out} has no model {name!r}: give its --name, or write a new repository without --add")
        if (out / path).read_text() != text:
            raise UserError(
                f"{bundle} cannot be a version of {name!r}, whose {path} differs: versions have options, "
                "preprocessing and classes in common; choose another --name"
            )
