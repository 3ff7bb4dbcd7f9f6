"""Opens a model in any runtime: ``open_engine(path).infer(images) -> logits``.

| path                              | runtime                                                              |
|-----------------------------------|----------------------------------------------------------------------|
| a bundle                          | of its engine for this GPU, else of its model.onnx, else of its      |
|                                   | weights                                                              |
| an engine's folder, ``*.engine``  | ``tensorrt`` or ``tensorrt_rtx``, as its record says                 |
| ``*.onnx``                        | the faster of OpenVINO and ONNX Runtime, measured when it is opened  |
|                                   | on a CPU for the first time; ONNX Runtime for FP8, 4-bit activations |
|                                   | and half precision, which OpenVINO does not support                  |
| ``*.safetensors``                 | ``torch``                                                            |

``runtime`` chooses another one, such as ``torch-compile`` or one of ONNX Runtime's providers for GPUs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

from deploy.runtimes.cpu_runtime import cpu_runtime
from deploy.runtimes.engine import Engine
from deploy.runtimes.names import TITLES, RuntimeName
from deploy.runtimes.onnxruntime_engine import PROVIDERS, OnnxRuntimeEngine
from deploy.runtimes.openvino_engine import OpenVinoEngine
from deploy.runtimes.verification import verify
from deploy.trt.library import fits_this_gpu
from deploy.trt.record import ENGINE, EngineRecord, find_engines
from illama.bundle import CPU_ONNX, TORCHAO, bundle_of, weights_of
from illama.errors import UserError, check_exists
from illama.manifest import Manifest


def open_engine(path: Path, runtime: RuntimeName | None = None, threads: int = 0, unverified: bool = False) -> Engine:
    """Opens an engine, a file or a bundle, and verifies it by its golden answers, if it has any.

    If an engine of a bundle cannot be opened, a warning gives the reason and the next file of the bundle is tried.

    Args:
        path: see the table above.
        runtime: if not given, the preferred one for the path (the table above, and docs/cpu.md).
        threads: number of threads on a CPU; 0 for one per core.
        unverified: whether to open an engine whose answers are wrong, with a warning.

    Raises:
        UserError: the path does not exist, the file is damaged or rejected, its golden answers are wrong, or the
            runtime is not installed or cannot run the file.
    """
    return open_file(path, runtime, threads, unverified)[0]


def open_file(
    path: Path, runtime: RuntimeName | None = None, threads: int = 0, unverified: bool = False
) -> tuple[Engine, Path]:
    """Same as :func:`open_engine`; also returns the file that was opened."""
    if runtime is not None and runtime not in get_args(RuntimeName):
        raise UserError(f"unknown runtime {runtime!r}: choose from {', '.join(get_args(RuntimeName))}")
    paths = files_of(check_exists(path), runtime)
    if not paths[-1].exists():
        where = runtime or "this machine"
        raise UserError(f"{path} has no file for {where}: give another, or build an engine with python deploy/build.py")
    for each in paths[:-1]:
        try:
            return _open_verified(each, runtime, threads, unverified), each
        except UserError as error:
            print(f"warning: {each} is skipped: {error}", file=sys.stderr)
    return _open_verified(paths[-1], runtime, threads, unverified), paths[-1]


def _open_verified(path: Path, runtime: RuntimeName | None, threads: int, unverified: bool) -> Engine:
    engine = load_engine(path, runtime, threads)
    try:
        engine.verified = verify(engine, path)
    except UserError as error:
        if not unverified:
            raise
        print(f"warning: --unverified: {error}", file=sys.stderr)
    return engine


def load_engine(path: Path, runtime: RuntimeName | None = None, threads: int = 0) -> Engine:
    """Opens one file without verifying it; raises UserError as :func:`open_engine` does."""
    if path.suffix == ".engine":
        record = EngineRecord.read(path)
        if runtime not in (None, record.library):
            raise UserError(f"{path} does not run in {runtime}: it was built by {record.library}")
        from deploy.runtimes.tensorrt_engine import TensorRTEngine  # here, since the other runtimes need no PyTorch

        return TensorRTEngine(path, record)
    if path.suffix == ".onnx":
        runtime = runtime or cpu_runtime(path, threads)
        if runtime == "openvino":
            return OpenVinoEngine(path, threads)
        if runtime == "onnxruntime" or runtime in PROVIDERS:
            return OnnxRuntimeEngine(path, threads, PROVIDERS.get(runtime))
        raise UserError(
            f"{path} does not run in {runtime}: it is an ONNX file; build an engine with python deploy/build.py"
        )
    if runtime not in (None, "torch", "torch-compile"):
        raise UserError(
            f"{path} does not run in {runtime}: it holds weights for PyTorch; export it with python quant/ptq.py"
        )
    from deploy.runtimes.torch_engine import TorchEngine
    from illama.checkpoints.load import load_network

    return TorchEngine(load_network(path), compiled=runtime == "torch-compile")


def files_of(path: Path, runtime: RuntimeName | None) -> list[Path]:
    """Returns the file at ``path``, or the files of a bundle that ``runtime`` can open, the preferred one first.

    Raises:
        UserError: the path is a folder, but neither a bundle nor an engine.
    """
    if not path.is_dir() or bundle_of(path) != path:
        return [path / ENGINE if path.is_dir() else path]
    Manifest.read(path)
    weights = path / TORCHAO if (path / TORCHAO).exists() else weights_of(path)
    if runtime in ("torch", "torch-compile"):
        return [weights]
    engines = find_engines(path, runtime) if runtime in (None, *TITLES) else []
    if engines and runtime:
        return sorted(engines, key=lambda engine: not _may_run(engine))
    return [*filter(_may_run, engines), path / CPU_ONNX if (path / CPU_ONNX).exists() else weights]


def _may_run(engine: Path) -> bool:
    """Whether an engine was built for this GPU; True if its record cannot be read, so that opening it says why."""
    try:
        record = EngineRecord.read(engine)
    except UserError:
        return True
    return fits_this_gpu(record.targets, bool(record.options.get("hardware_compatible")))
