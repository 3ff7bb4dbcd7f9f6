"""The configs of a served model: three ModelConfigs of Triton's, printed from its own protobuf messages."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from google.protobuf import text_format

from deploy.runtimes.image_input import ImageInput
from deploy.runtimes.open_engine import RuntimeName
from deploy.serving.health import CONFIG
from deploy.trt.library import TITLES
from illama.bundle import Manifest
from illama.errors import UserError
from quant.export.onnx_export import INPUT, OUTPUT

LABELS = "labels.txt"
MAX_FILE_MB = 2000  # a gRPC message has less than 2^31 bytes
MAX_MEGAPIXELS = 178  # Pillow itself refuses more than twice its MAX_IMAGE_PIXELS
ENCODED = "image"  # the ensemble's input: the bytes of an image file


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """How Triton runs each model.

    Attributes:
        device: cpu, or gpu for engines that the full TensorRT built on such a GPU.
        runtime: what runs the network on a CPU: onnxruntime, openvino, ...; if not given, the fastest of the report
            beside the bundle, where that was measured on a CPU like this one, else the usual choice (docs/cpu.md).
        max_batch: most images that are computed together, and most files in a request.
        preferred_batches: batch sizes that are sent at once, without waiting for queue_delay_us; none by default.
        queue_delay_us: microseconds that an image waits for others to be computed with it.
        instances: copies of the network, on each GPU or on the CPU, where they share out the cores.
        preprocess_instances: processes that decode images.
        live_versions: newest versions that are loaded; older ones stay in the folder.
        max_file_mb: maximum size of an image file, in 10^6 bytes.
        max_megapixels: maximum size of an image, in 10^6 pixels; a larger one is not decoded.
    """

    device: Literal["cpu", "gpu"] = "cpu"
    runtime: RuntimeName | None = None
    max_batch: int = 32
    preferred_batches: tuple[int, ...] = ()
    queue_delay_us: int = 1000
    instances: int = 1
    preprocess_instances: int = 1
    live_versions: int = 2
    max_file_mb: float = 20
    max_megapixels: float = 50

    def __post_init__(self) -> None:
        counts = (
            self.max_batch,
            self.instances,
            self.preprocess_instances,
            self.live_versions,
            *self.preferred_batches,
        )
        if min(counts) < 1 or self.queue_delay_us < 0 or max(*counts, self.queue_delay_us) >= 1 << 31:
            raise UserError(
                "batches, instances and versions are 1 or more, a delay is 0 or more, and all are below 2^31"
            )
        if self.runtime is not None and self.device == "gpu":
            raise UserError("Triton's own TensorRT runs what is served on a GPU: leave --runtime out")
        if self.device == "cpu" and self.runtime in TITLES:
            raise UserError(f"--runtime {self.runtime} is for a GPU: give --device gpu in its place")
        if not (1e-6 <= self.max_file_mb <= MAX_FILE_MB and 1e-6 <= self.max_megapixels <= MAX_MEGAPIXELS):
            raise UserError(f"--max-file-mb is 1e-6 to {MAX_FILE_MB}, and --max-megapixels 1e-6 to {MAX_MEGAPIXELS}")
        if max(self.preferred_batches, default=1) > self.max_batch:
            raise UserError(f"a preferred batch is larger than --max-batch {self.max_batch}")


def config_texts(name: str, manifest: Manifest, options: ServingOptions) -> dict[str, str]:
    """By path, the text files that say what a model is: three configs, and the classes' names."""
    takes, classes = ImageInput.of(manifest), len(manifest.classes)
    configs = {
        f"{name}-preprocess": _preprocess_config(takes, options),
        f"{name}-network": _network_config(takes, classes, options),
        name: _ensemble_config(name, classes, options),
    }
    labels = "".join(f"{' '.join(label.split())}\n" for label in manifest.classes)  # a line each
    texts = {f"{model}/{LABELS}": labels for model in (name, f"{name}-network")}
    for model, config in configs.items():
        texts[f"{model}/{CONFIG}"] = text_format.MessageToString(_messages().ModelConfig(name=model, **config))
    return texts


def _preprocess_config(takes: ImageInput, options: ServingOptions) -> dict[str, Any]:
    pb = _messages()
    facts = {
        "input": takes.to_dict(),
        "max_bytes": int(options.max_file_mb * 1e6),
        "max_pixels": int(options.max_megapixels * 1e6),
    }
    return {
        "backend": "python",
        "max_batch_size": options.max_batch,
        "input": [_encoded(allow_ragged_batch=True)],
        "output": [pb.ModelOutput(name=INPUT, data_type=_type_of(takes), dims=takes.shape)],
        "dynamic_batching": pb.ModelDynamicBatching(),  # of what waits already; each request is answered by itself
        "parameters": {"preprocessing": pb.ModelParameter(string_value=json.dumps(facts))},
        "instance_group": [pb.ModelInstanceGroup(kind="KIND_CPU", count=options.preprocess_instances)],
    }


def _network_config(takes: ImageInput, classes: int, options: ServingOptions) -> dict[str, Any]:
    pb = _messages()
    cpu = options.device == "cpu"
    zeros = pb.ModelWarmup.Input(data_type=_type_of(takes), dims=takes.shape, zero_data=True)
    return {
        **({"backend": "python"} if cpu else {"platform": "tensorrt_plan"}),
        "max_batch_size": options.max_batch,
        "input": [pb.ModelInput(name=INPUT, data_type=_type_of(takes), dims=takes.shape)],
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


def _ensemble_config(name: str, classes: int, options: ServingOptions) -> dict[str, Any]:
    pb = _messages()
    newest = -1
    steps = [
        pb.ModelEnsembling.Step(
            model_name=f"{name}-preprocess",
            model_version=newest,
            input_map={ENCODED: ENCODED},
            output_map={INPUT: INPUT},
        ),
        pb.ModelEnsembling.Step(
            model_name=f"{name}-network", model_version=newest, input_map={INPUT: INPUT}, output_map={OUTPUT: OUTPUT}
        ),
    ]
    return {
        "platform": "ensemble",
        "max_batch_size": options.max_batch,
        "input": [_encoded()],
        "output": [_logits(classes)],
        "ensemble_scheduling": pb.ModelEnsembling(step=steps),
    }


def _encoded(**more: Any) -> Any:
    return _messages().ModelInput(name=ENCODED, data_type="TYPE_UINT8", dims=[-1], **more)


def _logits(classes: int) -> Any:
    return _messages().ModelOutput(name=OUTPUT, data_type="TYPE_FP32", dims=[classes], label_filename=LABELS)


def _type_of(takes: ImageInput) -> Any:
    return _messages().TYPE_UINT8 if takes.frame else _messages().TYPE_FP32


def _messages() -> Any:
    """Triton's protobuf messages of a model's config."""
    try:
        return importlib.import_module("tritonclient.grpc.model_config_pb2")
    except ImportError as error:
        raise UserError("no tritonclient here: pip install 'tritonclient[http,grpc]'") from error
