"""Options of serving. Imports nothing slow, so that ``--help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deploy.runtimes.names import TITLES, RuntimeName
from illama.errors import UserError
from illama.options import Count, CountOrZero, Port, check_bounds

MAX_FILE_MB = 2000  # a gRPC message is smaller than 2^31 bytes
MAX_MEGAPIXELS = 178  # Pillow rejects more than twice its MAX_IMAGE_PIXELS


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """How Triton runs each model.

    Attributes:
        device: cpu, or gpu for engines that the full TensorRT built on the same kind of GPU.
        runtime: runtime, with --device cpu. Defaults to the fastest in the report beside the bundle if the report was
            measured on this kind of CPU, else to OpenVINO or ONNX Runtime (docs/cpu.md).
        max_batch: maximum number of images in a batch and in a request.
        preferred_batches: batch sizes that run at once, without waiting for --queue-delay-us.
        queue_delay_us: maximum time that an image waits for others to form a batch, in microseconds.
        instances: number of copies of the network on each GPU or on the CPU; on the CPU they share the cores.
        preprocess_instances: number of processes that decode images.
        live_versions: number of newest versions to load; older versions stay in the folder.
        max_file_mb: maximum size of an image file, in 10^6 bytes.
        max_megapixels: maximum size of an image, in 10^6 pixels; a larger one is not decoded.
        unverified: serve a network even if it computes other logits than its golden answers.
    """

    device: Literal["cpu", "gpu"] = "cpu"
    runtime: RuntimeName | None = None
    max_batch: Count = 32
    preferred_batches: tuple[Count, ...] = ()
    queue_delay_us: CountOrZero = 1000
    instances: Count = 1
    preprocess_instances: Count = 1
    live_versions: Count = 2
    max_file_mb: float = 20
    max_megapixels: float = 50
    unverified: bool = False

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.runtime is not None and self.device == "gpu":
            raise UserError("on a GPU, Triton's own TensorRT is the runtime: omit --runtime")
        if self.device == "cpu" and self.runtime in TITLES:
            raise UserError(f"--runtime {self.runtime} runs on a GPU only: use --device gpu instead")
        if not (1e-6 <= self.max_file_mb <= MAX_FILE_MB and 1e-6 <= self.max_megapixels <= MAX_MEGAPIXELS):
            raise UserError(f"--max-file-mb must be 1e-6 to {MAX_FILE_MB}, --max-megapixels 1e-6 to {MAX_MEGAPIXELS}")
        if max(self.preferred_batches, default=1) > self.max_batch:
            raise UserError(f"--preferred-batches must not exceed --max-batch {self.max_batch}")


@dataclass(frozen=True, kw_only=True)
class ListenOptions:
    """Where the server listens.

    Attributes:
        address: IPv4 address; 127.0.0.1 for this machine only, 0.0.0.0 for all. Triton has no authentication.
        http_port: port of the HTTP protocol.
        grpc_port: port of the gRPC protocol.
        metrics_port: port of the Prometheus metrics.
        poll_seconds: interval at which the server looks for new versions; 0 for never.
    """

    address: str = "127.0.0.1"
    http_port: Port = 8000
    grpc_port: Port = 8001
    metrics_port: Port = 8002
    poll_seconds: CountOrZero = 0

    @property
    def url(self) -> str:
        """URL of the HTTP protocol, from this machine."""
        return f"http://{'127.0.0.1' if self.address == '0.0.0.0' else self.address}:{self.http_port}"
