"""Run a model, whatever it was exported to: ``open_engine(path).infer(images) -> logits``.

| path                              | runtime                                                            |
|-----------------------------------|--------------------------------------------------------------------|
| a bundle                          | the best here: an engine that this GPU runs, else its CPU file      |
| an engine's folder, ``*.engine``  | ``tensorrt`` or ``tensorrt_rtx``, as the record beside it says      |
| ``*.onnx``                        | ``openvino`` or ``onnxruntime``, or one of its GPU providers        |
| ``*.safetensors`` or its bundle   | ``torch``, ``torch.compile``                                        |
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any, Protocol, cast, get_args

import numpy as np
import onnxruntime
import torch

from deploy.rewrites.openvino_graph import fitting_rewrites, has_matrix_unit
from deploy.runtimes.names import TITLES, RuntimeName
from deploy.runtimes.tensorrt_engine import TensorRTEngine
from deploy.trt.library import fits_this_gpu
from deploy.trt.record import ENGINE, EngineRecord, find_engines
from illama.bundle import CPU_ONNX, FUSED_ONNX, TORCHAO, WEIGHTS, bundle_of, is_bundle
from illama.checkpoints.load import load_network
from illama.errors import UserError
from illama.graph.reader import has_fp8, load_graph
from illama.graph.session import cpu_session
from illama.inference import torch_infer, usable_cores

_PROVIDERS = {
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
    "onnxruntime-nv-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}


class Engine(Protocol):
    """Whatever runs a model.

    Attributes:
        runtime: what it is, with its version, device and precision.
    """

    runtime: str

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Images, (B, C, H, W) float32 or whatever else the model takes -> logits (B, classes) float32."""

    def close(self) -> None:
        """Keep what makes the next start quicker, where a runtime has such a thing."""
        return None


class OnnxRuntimeEngine(Engine):
    """An ONNX file in ONNX Runtime.

    Args:
        path: the ONNX file.
        threads: within an operator on the CPU; 0 for one a core.
        provider: an execution provider for GPUs; the CPU's if not given.

    Raises:
        UserError: if ONNX Runtime cannot load the file, or has no such provider here.
    """

    def __init__(self, path: Path, threads: int = 0, provider: str | None = None) -> None:
        self.runtime = f"onnxruntime {onnxruntime.__version__} {provider or 'CPU'}"
        if provider and provider not in onnxruntime.get_available_providers():
            raise UserError(
                f"this ONNX Runtime has no {provider}: install onnxruntime-gpu, or choose another --runtime"
            )
        try:
            self._session = (
                gpu_session(path, provider) if provider else cpu_session(path, threads, fused=path.name == FUSED_ONNX)
            )
        except Exception as error:  # its exceptions share no base class but this one
            raise UserError(f"ONNX Runtime cannot load {path}: {' '.join(str(error).split())}") from error
        self._input = self._session.get_inputs()[0].name

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Images (B, C, H, W) float32 -> logits (B, classes) float32."""
        return self._session.run(None, {self._input: images})[0]


def gpu_session(path: Path, provider: str) -> onnxruntime.InferenceSession:
    """A session on a GPU; ONNX Runtime leaves arithmetic with shapes to the CPU.

    Raises:
        UserError: if the provider did not start and everything would run on the CPU.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=[provider, "CPUExecutionProvider"])
    if provider not in session.get_providers():
        raise UserError(f"{provider} does not start here: see that its CUDA libraries are installed")
    return session


@cache
def openvino_core() -> Any:
    """OpenVINO's core, one for the whole process.

    A core's CPU plugin gives the thread a stack for signals with room for AMX's registers, and puts back the one before
    it when the core goes. If that was another core's, it may be freed by then, and the next signal that Python handles
    (Ctrl-C, the end of a data loader's worker) is a segmentation fault.

    Raises:
        ImportError: if OpenVINO is not installed.
    """
    import openvino

    return openvino.Core()


class OpenVinoEngine(Engine):
    """An ONNX file in OpenVINO on the CPU.

    Where the CPU multiplies bfloat16 (AMX), OpenVINO computes in that what the graph has in float32; ``precision``
    "f32" keeps to the graph, at half the speed. Integers stay integers.

    Attributes:
        floats: the type that it computes in where the graph has float32.

    Args:
        path: the ONNX file.
        threads: in all; 0 for one a core.
        precision: "f32", "bf16" or "f16" for what the graph has in floating point; OpenVINO's choice if not given.

    Raises:
        UserError: if OpenVINO is not installed or cannot load the file.
    """

    def __init__(self, path: Path, threads: int = 0, precision: str | None = None) -> None:
        try:
            import openvino
        except ImportError as error:
            raise UserError("OpenVINO is not installed: pip install openvino, or --runtime onnxruntime") from error
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads or usable_cores()}
        if precision:
            settings["INFERENCE_PRECISION_HINT"] = precision
        model, core = load_graph(path), openvino_core()
        floats = precision or core.get_property("CPU", "INFERENCE_PRECISION_HINT").to_string()
        for rewrite in fitting_rewrites(floats == "bf16", has_matrix_unit()):
            rewrite(model)
        try:
            compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", settings)
        except RuntimeError as error:
            raise UserError(f"OpenVINO cannot load {path}: {' '.join(str(error).split())[:300]}") from error
        self.floats = str(compiled.get_property("INFERENCE_PRECISION_HINT").to_string())
        self.runtime = f"openvino {openvino.__version__.split('-')[0]} CPU, {self.floats}"
        self._request = compiled.create_infer_request()

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Images (B, C, H, W) float32 -> logits (B, classes) float32."""
        return np.array(self._request.infer({0: images}, share_inputs=True)[0])


class TorchEngine(Engine):
    """A network in PyTorch, on the GPU if there is one: the float reference, or one quantized by torchao.

    Args:
        device: cuda or cpu; a GPU if there is one, if not given. The network is moved there.
        compiled: by torch.compile.
    """

    def __init__(self, network: torch.nn.Module, device: str | None = None, compiled: bool = False) -> None:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        network = network.eval().to(device)
        self.runtime = f"torch {torch.__version__} {device}{', compiled' * compiled}"
        self._infer = torch_infer(cast(torch.nn.Module, torch.compile(network)) if compiled else network)

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Images (B, C, H, W) float32 -> logits (B, classes) float32."""
        return self._infer(images)


def open_engine(path: Path, runtime: RuntimeName | None = None, threads: int = 0) -> Engine:
    """The engine, file or bundle at ``path``, ready to infer.

    An engine of a bundle that cannot be opened is passed over, with a line on stderr that says why.

    Args:
        runtime: which one; the best for the path, if not given (the table above, and docs/cpu.md).
        threads: on a CPU; 0 for one a core.

    Raises:
        UserError: nothing there, a damaged or refused file, or a runtime that is not here or does not take it.
    """
    return open_file(path, runtime, threads)[0]


def open_file(path: Path, runtime: RuntimeName | None = None, threads: int = 0) -> tuple[Engine, Path]:
    """As :func:`open_engine`, and the file that was opened."""
    if runtime is not None and runtime not in get_args(RuntimeName):
        raise UserError(f"unknown runtime {runtime!r}: choose from {', '.join(get_args(RuntimeName))}")
    if not path.exists():
        raise UserError(f"there is no {path}")
    paths = files_of(path, runtime)
    for each in paths[:-1]:
        try:
            return _open(each, runtime, threads), each
        except UserError as error:
            print(f"warning: {each} is left out: {error}", file=sys.stderr)
    return _open(paths[-1], runtime, threads), paths[-1]


def _open(path: Path, runtime: RuntimeName | None, threads: int) -> Engine:
    if path.suffix == ".engine":
        record = EngineRecord.read(path)
        if runtime not in (None, record.library):
            raise UserError(f"{path} was built by {record.library}: it does not run in {runtime}")
        return TensorRTEngine(path, record)
    if path.suffix == ".onnx":
        return _open_onnx(path, runtime or cpu_runtime(path), threads)
    if runtime not in (None, "torch", "torch-compile"):
        raise UserError(
            f"{path} holds weights for PyTorch: it does not run in {runtime}; make graphs of it with "
            "python quant/ptq.py"
        )
    return TorchEngine(load_network(path), compiled=runtime == "torch-compile")


def cpu_runtime(path: Path) -> RuntimeName:
    """The fastest runtime here for an ONNX file on a CPU (docs/cpu.md); FP8 has but one that knows it."""
    try:
        import openvino  # noqa: F401
    except ImportError:
        return "onnxruntime"
    return "onnxruntime" if has_fp8(load_graph(path)) else "openvino"


def _open_onnx(path: Path, runtime: RuntimeName, threads: int) -> Engine:
    if runtime == "openvino":
        return OpenVinoEngine(path, threads)
    if runtime == "onnxruntime" or runtime in _PROVIDERS:
        return OnnxRuntimeEngine(path, threads, _PROVIDERS.get(runtime))
    raise UserError(
        f"{path} is an ONNX file: it does not run in {runtime}; build an engine with python deploy/build.py"
    )


def files_of(path: Path, runtime: RuntimeName | None) -> list[Path]:
    """The file at ``path``, or those of a bundle that ``runtime`` takes, the best first; UserError if it is none."""
    if not path.is_dir() or bundle_of(path) != path:
        return [path / ENGINE if path.is_dir() else path]
    if not is_bundle(path):
        raise UserError(f"{path} is not a bundle: name one, or a file of one")
    weights = path / (TORCHAO if (path / TORCHAO).exists() else WEIGHTS)
    if runtime in ("torch", "torch-compile"):
        return [weights]
    engines = find_engines(path, runtime) if runtime in (None, *TITLES) else []
    if engines and runtime:
        return sorted(engines, key=lambda engine: not _may_run(engine))
    return [*filter(_may_run, engines), path / CPU_ONNX if (path / CPU_ONNX).exists() else weights]


def _may_run(engine: Path) -> bool:
    """Whether an engine is for the GPU here; True for one that will be refused, whose opening says why."""
    try:
        record = EngineRecord.read(engine)
    except UserError:
        return True
    return fits_this_gpu(record.targets, bool(record.options.get("hardware_compatible")))
