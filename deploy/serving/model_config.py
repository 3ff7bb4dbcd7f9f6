"""Configuration files of a served model, printed from Triton's own protobuf messages."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from google.protobuf import text_format

from deploy.runtimes.image_input import ImageInput
from deploy.serving.health import CONFIG
from deploy.serving.serving_options import ServingOptions
from illama.bundle import INPUT
from illama.errors import UserError
from illama.manifest import Manifest

LABELS = "labels.txt"
ENCODED = "image"  # input of the ensemble: the bytes of an image file


@dataclass(frozen=True)
class PreprocessParameters:
    """Parameters of :class:`deploy.serving.backend.Preprocess`: limits on the bytes and pixels of an image file."""

    input: ImageInput
    max_bytes: int
    max_pixels: int


def config_texts(name: str, manifest: Manifest, options: ServingOptions) -> dict[str, str]:
    """Returns path -> content of the text files of a model: three configurations, and the names of the classes."""
    image_input, output = ImageInput.of(manifest), _output(manifest)
    configs = {
        f"{name}-preprocess": _preprocess_config(image_input, options),
        f"{name}-network": _network_config(image_input, output, options),
        name: _ensemble_config(name, output, options),
    }
    labels = "".join(f"{' '.join(label.split())}\n" for label in manifest.classes)  # one line for each class
    texts = {f"{model}/{LABELS}": labels for model in (name, f"{name}-network") if labels}
    for model, config in configs.items():
        texts[f"{model}/{CONFIG}"] = text_format.MessageToString(_messages().ModelConfig(name=model, **config))
    return texts


def _preprocess_config(image_input: ImageInput, options: ServingOptions) -> dict[str, Any]:
    pb = _messages()
    parameters = PreprocessParameters(image_input, int(options.max_file_mb * 1e6), int(options.max_megapixels * 1e6))
    return {
        "backend": "python",
        "max_batch_size": options.max_batch,
        "input": [_encoded(allow_ragged_batch=True)],
        "output": [pb.ModelOutput(name=INPUT, data_type=_data_type(image_input), dims=image_input.shape)],
        "dynamic_batching": pb.ModelDynamicBatching(),  # of requests that wait already; each is answered on its own
        "parameters": {"preprocessing": pb.ModelParameter(string_value=json.dumps(asdict(parameters)))},
        "instance_group": [pb.ModelInstanceGroup(kind="KIND_CPU", count=options.preprocess_instances)],
    }


def _network_config(image_input: ImageInput, output: Any, options: ServingOptions) -> dict[str, Any]:
    pb = _messages()
    cpu = options.device == "cpu"
    zeros = pb.ModelWarmup.Input(data_type=_data_type(image_input), dims=image_input.shape, zero_data=True)
    return {
        **({"backend": "python"} if cpu else {"platform": "tensorrt_plan"}),
        "max_batch_size": options.max_batch,
        "input": [pb.ModelInput(name=INPUT, data_type=_data_type(image_input), dims=image_input.shape)],
        "output": [output],
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


def _ensemble_config(name: str, output: Any, options: ServingOptions) -> dict[str, Any]:
    pb, newest = _messages(), -1
    steps = [
        pb.ModelEnsembling.Step(
            model_name=f"{name}-{part}", model_version=newest, input_map={given: given}, output_map={made: made}
        )
        for part, given, made in (("preprocess", ENCODED, INPUT), ("network", INPUT, output.name))
    ]
    return {
        "platform": "ensemble",
        "max_batch_size": options.max_batch,
        "input": [_encoded()],
        "output": [output],
        "ensemble_scheduling": pb.ModelEnsembling(step=steps),
    }


def _encoded(**more: Any) -> Any:
    return _messages().ModelInput(name=ENCODED, data_type="TYPE_UINT8", dims=[-1], **more)


def _output(manifest: Manifest) -> Any:
    labels = {} if manifest.features else {"label_filename": LABELS}
    dims = manifest.output_shape
    return _messages().ModelOutput(name=manifest.output, data_type="TYPE_FP32", dims=dims, **labels)


def _data_type(image_input: ImageInput) -> Any:
    return _messages().TYPE_UINT8 if image_input.frame else _messages().TYPE_FP32


def _messages() -> Any:
    """Returns the module of Triton's protobuf messages for model configurations."""
    try:
        return importlib.import_module("tritonclient.grpc.model_config_pb2")
    except ImportError as error:
        raise UserError("tritonclient is not installed: pip install 'tritonclient[http,grpc]'") from error
