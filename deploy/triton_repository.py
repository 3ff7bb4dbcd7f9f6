"""A model repository for Triton Inference Server, written from bundles.

Each model NAME is three of Triton's:

    NAME               an ensemble of the two below: the bytes of JPEG or PNG files -> logits
    NAME-preprocess    the bundle's own preprocessing (Python backend)
    NAME-network       versions 1, 2, ...: ONNX Runtime (Python backend) on CPUs, a TensorRT engine on GPUs

Every config.pbtxt is printed from Triton's own protobuf messages, so that it is a valid ModelConfig.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from google.protobuf import text_format

from deploy.engines import OnnxRuntimeEngine
from deploy.record import EngineRecord, find_engines
from illama.atomic_write import write_folder
from illama.bundle import CPU_ONNX, MANIFEST, Manifest, command_line, package_versions
from illama.data import Preprocessing
from illama.errors import UserError
from quant.export import INPUT, OUTPUT

RECORD = "repository.json"  # in the repository's folder, where Triton looks at folders only
CONFIG, LABELS, PLAN = "config.pbtxt", "labels.txt", "model.plan"
ENCODED = "image"  # the ensemble's input: the bytes of an image file


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """How Triton runs each model.

    Attributes:
        device: cpu for ONNX Runtime, gpu for engines that the full TensorRT built on such a GPU.
        max_batch: most images that are computed together.
        preferred_batches: sizes that a batch is sent at before its delay is over; any size up to max_batch if none.
        queue_delay_us: microseconds that an image waits for others to be computed with it.
        instances: copies of the network, on each GPU or on the CPU, where they share out the cores.
        preprocess_instances: processes that decode images.
        live_versions: newest versions that are loaded; older ones stay in the folder.
    """

    device: Literal["cpu", "gpu"] = "cpu"
    max_batch: int = 32
    preferred_batches: tuple[int, ...] = ()
    queue_delay_us: int = 1000
    instances: int = 1
    preprocess_instances: int = 1
    live_versions: int = 2

    def __post_init__(self) -> None:
        counts = (
            self.max_batch,
            self.instances,
            self.preprocess_instances,
            self.live_versions,
            *self.preferred_batches,
        )
        if min(counts) < 1 or self.queue_delay_us < 0:
            raise UserError("batches, instances and versions are 1 or more, and a delay is not negative")
        if max(self.preferred_batches, default=1) > self.max_batch:
            raise UserError(f"a preferred batch is larger than --max-batch {self.max_batch}")


def is_repository(folder: Path) -> bool:
    """Whether a folder is a repository that this module wrote, and so may be replaced by a newer one."""
    return (folder / RECORD).is_file()


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
        facts = {"command": command_line(), "versions": package_versions()}
        (draft / RECORD).write_text(json.dumps(facts, indent=2) + "\n")


def add_versions(
    out: Path, models: Mapping[str, Sequence[Path]], options: ServingOptions, version: int | None = None
) -> dict[str, list[int]]:
    """Add the bundles as new versions of models that are there, each whole or not at all; their numbers.

    Raises:
        UserError: no such model, other options or another kind of model, a version that is there, or a bundle that
            cannot be served.
    """
    if not is_repository(out):
        raise UserError(f"{out} is no repository of this command: leave --add out to write one")
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
    with write_folder(out / f"{name}-network" / str(number), lambda _: False) as draft:
        if options.device == "gpu":
            shutil.copyfile(checked_engine(bundle, options.max_batch), draft / PLAN)
        else:
            shutil.copyfile(_checked_onnx(bundle), draft / CPU_ONNX)
            _write_code(draft, "OnnxNetwork")
        shutil.copyfile(bundle / MANIFEST, draft / MANIFEST)


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
    raise refused or UserError(f"{bundle} has no engine of the full TensorRT, and Triton runs no other: on a machine "
                               "with that GPU and Triton's TensorRT run python deploy/build.py")  # fmt: skip


def _check_engine(path: Path, manifest: Manifest, max_batch: int) -> None:
    record = EngineRecord.read(path)
    wanted = {INPUT: ["float", [-1, *_shape(Preprocessing.from_dict(manifest.preprocessing))]]}
    named = {OUTPUT: ["float", [-1, len(manifest.classes)]]}
    if (record.inputs, record.outputs) != (wanted, named):
        raise UserError(f"{path} takes {record.inputs} and gives {record.outputs}, and not {wanted} and {named}: "
                        "Triton serves classifiers that take preprocessed images")  # fmt: skip
    if record.options.get("weight_stripped"):
        raise UserError(f"{path} has no weights, and Triton does not refit it: build it without --weight-stripped")
    smallest, _, largest = record.batch
    if smallest > 1 or max_batch > largest:
        raise UserError(f"{path} was built for batches of {smallest} to {largest}, and 1 to {max_batch} are asked for: "
                        "lower --max-batch, or build with another --batch")  # fmt: skip


def _checked_onnx(bundle: Path) -> Path:
    """The bundle's graph for CPUs, once it has answered an image; UserError if it cannot."""
    path, manifest = bundle / CPU_ONNX, Manifest.read(bundle)
    if not path.exists():
        raise UserError(f"{bundle} has no {CPU_ONNX}: make one with python quant/ptq.py")
    shape = _shape(Preprocessing.from_dict(manifest.preprocessing))
    try:
        answer = OnnxRuntimeEngine(path).infer(np.zeros((1, *shape), np.float32))
    except UserError:
        raise
    except Exception as error:  # onnxruntime's exceptions share no base class but this one
        raise UserError(f"{path} takes no images of shape {shape}, as its manifest says: make it again") from error
    if answer.ndim != 2:
        raise UserError(f"{path} answers an image with {answer.shape[1:]}, and only a classifier can be served")
    if answer.shape != (1, len(manifest.classes)):
        raise UserError(f"{path} gives {answer.shape[1]} classes, its manifest names {len(manifest.classes)}")
    return path


def _shape(preprocessing: Preprocessing) -> tuple[int, int, int]:
    return preprocessing.in_channels, preprocessing.image_size, preprocessing.image_size


def _write_model(out: Path, name: str, bundle: Path, options: ServingOptions) -> None:
    """The three folders of a model, without a version of the network."""
    for path, text in _texts(name, Manifest.read(bundle), options).items():
        (out / path).parent.mkdir(exist_ok=True)
        (out / path).write_text(text)
    for part in ("", "-preprocess"):
        (out / f"{name}{part}" / "1").mkdir()
    (out / name / "1" / ".keep").touch()  # Triton wants a version of an ensemble too, and some storage no empty folder
    _write_code(out / f"{name}-preprocess" / "1", "Preprocess")


def _write_code(folder: Path, model: str) -> None:
    """The ``model.py`` of Triton's Python backend that names a class of :mod:`deploy.triton_models`.

    Python would keep it compiled in a folder beside it, whose time a polling server takes for that of a new model:
    it would load everything twice. An empty file in that folder's place prevents it.
    """
    (folder / "model.py").write_text(f"from deploy.triton_models import {model} as TritonPythonModel  # noqa: F401\n")
    (folder / "__pycache__").touch()


def _check_like(out: Path, name: str, bundle: Path, options: ServingOptions) -> None:
    """UserError unless the model's folders are what this bundle and these options would have written."""
    for path, text in _texts(name, Manifest.read(bundle), options).items():
        if not (out / path).is_file():
            raise UserError(f"{out} has no model {name!r}: give its --name, or write a new repository without --add")
        if (out / path).read_text() != text:
            raise UserError(f"{bundle} cannot be a version of {name!r}, whose {path} differs: versions have options, "
                            "preprocessing and classes in common; choose another --name")  # fmt: skip


def _texts(name: str, manifest: Manifest, options: ServingOptions) -> dict[str, str]:
    """By path, the text files that say what a model is: three configs, and the classes' names."""
    preprocessing, labels = (
        Preprocessing.from_dict(manifest.preprocessing),
        "".join(f"{label}\n" for label in manifest.classes),
    )
    shapes = _shape(preprocessing), (len(manifest.classes),)
    configs = {
        f"{name}-preprocess": _preprocess_config(preprocessing, shapes[0], options),
        f"{name}-network": _network_config(*shapes, options),
        name: _ensemble_config(name, *shapes, options),
    }
    texts = {f"{model}/{LABELS}": labels for model in (name, f"{name}-network")}
    for model, config in configs.items():
        texts[f"{model}/{CONFIG}"] = text_format.MessageToString(_messages().ModelConfig(name=model, **config))
    return texts


def _preprocess_config(preprocessing: Preprocessing, shape: Sequence[int], options: ServingOptions) -> dict[str, Any]:
    pb = _messages()
    values = pb.ModelParameter(string_value=json.dumps(asdict(preprocessing)))
    return {
        "backend": "python",
        "max_batch_size": options.max_batch,
        "input": [_encoded(allow_ragged_batch=True)],
        "output": [pb.ModelOutput(name=INPUT, data_type=pb.TYPE_FP32, dims=shape)],
        "dynamic_batching": pb.ModelDynamicBatching(),  # of what waits already; each request is answered by itself
        "parameters": {"preprocessing": values},
        "instance_group": [pb.ModelInstanceGroup(kind="KIND_CPU", count=options.preprocess_instances)],
    }


def _network_config(shape: Sequence[int], classes: Sequence[int], options: ServingOptions) -> dict[str, Any]:
    pb = _messages()
    cpu = options.device == "cpu"
    zeros = pb.ModelWarmup.Input(data_type=pb.TYPE_FP32, dims=shape, zero_data=True)
    return {
        **({"backend": "python"} if cpu else {"platform": "tensorrt_plan"}),
        "max_batch_size": options.max_batch,
        "input": [pb.ModelInput(name=INPUT, data_type=pb.TYPE_FP32, dims=shape)],
        "output": [_logits(classes)],
        "instance_group": [pb.ModelInstanceGroup(kind="KIND_CPU" if cpu else "KIND_GPU", count=options.instances)],
        "dynamic_batching": pb.ModelDynamicBatching(
            preferred_batch_size=options.preferred_batches, max_queue_delay_microseconds=options.queue_delay_us
        ),
        "version_policy": pb.ModelVersionPolicy(latest={"num_versions": options.live_versions}),
        "model_warmup": [
            pb.ModelWarmup(name=f"batch of {size}", batch_size=size, inputs={INPUT: zeros})
            for size in sorted({1, options.max_batch})
        ],
    }


def _ensemble_config(
    name: str, shape: Sequence[int], classes: Sequence[int], options: ServingOptions
) -> dict[str, Any]:
    pb = _messages()
    newest = -1
    steps = [
        pb.ModelEnsembling.Step(model_name=f"{name}-preprocess", model_version=newest,
                                input_map={ENCODED: ENCODED}, output_map={INPUT: INPUT}),
        pb.ModelEnsembling.Step(model_name=f"{name}-network", model_version=newest,
                                input_map={INPUT: INPUT}, output_map={OUTPUT: OUTPUT}),
    ]  # fmt: skip
    return {
        "platform": "ensemble",
        "max_batch_size": options.max_batch,
        "input": [_encoded()],
        "output": [_logits(classes)],
        "ensemble_scheduling": pb.ModelEnsembling(step=steps),
    }


def _encoded(**more: Any) -> Any:
    return _messages().ModelInput(name=ENCODED, data_type="TYPE_UINT8", dims=[-1], **more)


def _logits(classes: Sequence[int]) -> Any:
    return _messages().ModelOutput(name=OUTPUT, data_type="TYPE_FP32", dims=classes, label_filename=LABELS)


def _messages() -> Any:
    """Triton's protobuf messages of a model's config."""
    try:
        return importlib.import_module("tritonclient.grpc.model_config_pb2")
    except ImportError as error:
        raise UserError("no tritonclient here: pip install 'tritonclient[http,grpc]'") from error
