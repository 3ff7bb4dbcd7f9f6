"""TensorRT's engines on a GPU: pinned buffers, one stream, and the whole call as a CUDA graph."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from deploy.library import TITLES, Library, find_library
from deploy.record import EngineRecord
from illama.bundle import FUSED_ONNX, sha256, write_file
from illama.errors import UserError

if TYPE_CHECKING:
    import tensorrt


class TensorRTEngine:
    """An engine of TensorRT or TensorRT for RTX, whose record has been checked against it.

    Args:
        path: the engine.
        record: :meth:`deploy.record.EngineRecord.read` of it; nothing is deserialized without.
        cuda_graphs: capture one for each batch size that comes, and replay it.

    Raises:
        UserError: no GPU, no such library, or an engine that the library will not load.
    """

    def __init__(self, path: Path, record: EngineRecord, cuda_graphs: bool = True) -> None:
        if not torch.cuda.is_available():
            raise UserError(
                f"{path} runs on an NVIDIA GPU, and there is none here: open the bundle's model.onnx instead"
            )
        library = find_library(record.library)  # type: ignore[arg-type]
        assert library is not None  # find_library raises for a name
        self.runtime = f"{TITLES[record.library]} {library.version} {torch.cuda.get_device_name()}"
        self._engine = _deserialize(library, path)
        if record.options["weight_stripped"]:
            _refit(library, self._engine, path.parent.parent / FUSED_ONNX, record)
        self._config, self._cache = library.runtime_cache_of(self._engine)
        self._cache_path = path.with_suffix(".runtime-cache")
        if self._cache is not None:
            self._load_runtime_cache()
        arguments = (self._config,) if self._config is not None else ()
        self._context: tensorrt.IExecutionContext = self._engine.create_execution_context(*arguments)
        self._stream = torch.cuda.Stream()
        self._names = next(iter(record.inputs)), next(iter(record.outputs))
        self._classes, self._batch = record.outputs[self._names[1]][1][-1], record.batch
        self._graphs: dict[tuple[int, ...], Any] = {}
        self._buffers: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self._use_graphs = cuda_graphs

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Images, of the shape and type the engine takes -> logits (B, classes) float32.

        Raises:
            UserError: for a batch outside the engine's profile.
        """
        if not self._batch[0] <= len(images) <= self._batch[2]:
            raise UserError(f"the engine takes {self._batch[0]} to {self._batch[2]} images at once, not {len(images)}")
        shape = images.shape
        if shape not in self._buffers:
            self._prepare(images)
        pinned_in, _, _, pinned_out = self._buffers[shape]
        pinned_in.copy_(torch.from_numpy(images))
        with torch.cuda.stream(self._stream):
            if shape in self._graphs:
                self._graphs[shape].replay()
            else:
                self._enqueue(shape)
        self._stream.synchronize()
        return pinned_out.numpy().copy()

    def close(self) -> None:
        """Write TensorRT-RTX's cache of compiled kernels beside the engine, with its SHA-256."""
        if self._cache is not None:
            data = bytes(self._cache.serialize())
            with write_file(self._cache_path) as draft:
                draft.write_bytes(data)
            with write_file(_pin(self._cache_path)) as draft:
                draft.write_text(hashlib.sha256(data).hexdigest() + "\n")

    def _load_runtime_cache(self) -> None:
        """Take up the kernels of an earlier run, if the file is the one that was written; else they are compiled."""
        path, pin = self._cache_path, _pin(self._cache_path)
        if path.exists() and pin.exists() and pin.read_text().strip() == sha256(path):
            self._cache.deserialize(path.read_bytes())

    def _prepare(self, images: np.ndarray) -> None:
        """Buffers for one batch size, a warm-up call, and a CUDA graph of it."""
        host = torch.from_numpy(images)
        pinned_in = torch.empty_like(host).pin_memory()
        pinned_out = torch.empty(len(images), self._classes).pin_memory()
        device_in, device_out = pinned_in.cuda(), pinned_out.cuda()
        self._buffers[images.shape] = pinned_in, device_in, device_out, pinned_out
        with torch.cuda.stream(self._stream):
            for _ in range(2):  # the first compiles kernels and allocates
                self._enqueue(images.shape)
            self._stream.synchronize()
            if self._use_graphs:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=self._stream):
                    self._enqueue(images.shape)
                self._graphs[images.shape] = graph

    def _enqueue(self, shape: tuple[int, ...]) -> None:
        pinned_in, device_in, device_out, pinned_out = self._buffers[shape]
        self._context.set_input_shape(self._names[0], shape)
        self._context.set_tensor_address(self._names[0], device_in.data_ptr())
        self._context.set_tensor_address(self._names[1], device_out.data_ptr())
        device_in.copy_(pinned_in, non_blocking=True)
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT could not run the engine")
        pinned_out.copy_(device_out, non_blocking=True)


def _pin(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _deserialize(library: Library, path: Path) -> tensorrt.ICudaEngine:
    runtime: tensorrt.Runtime = library.trt.Runtime(library.trt.Logger(library.trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise UserError(f"{library.name} {library.version} will not load {path} on this GPU: build it again here")
    return engine


def _refit(library: Library, engine: tensorrt.ICudaEngine, source: Path, record: EngineRecord) -> None:
    """Give a weight-stripped engine the weights of the very graph that it was built from."""
    if not source.exists() or sha256(source) != record.onnx_sha256:
        raise UserError(f"the engine has no weights, and {source} is not the graph that it was built from")
    logger = library.trt.Logger(library.trt.Logger.ERROR)
    refitter: tensorrt.Refitter = library.trt.Refitter(engine, logger)
    parser: tensorrt.OnnxParserRefitter = library.trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(source)) or not refitter.refit_cuda_engine():
        raise UserError(f"{library.name} could not put the weights of {source} into the engine: build it again")
