"""TensorRT engines on a GPU, with pinned buffers, one stream, and one CUDA graph for each batch size."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from deploy.runtimes.engine import Engine
from deploy.runtimes.least_recently_used import LeastRecentlyUsed
from deploy.runtimes.names import TITLES
from deploy.trt.library import Library, find_library
from deploy.trt.record import ENGINE, RUNTIME_CACHE, EngineRecord
from illama.atomic_write import read_pinned, write_pinned
from illama.bundle import FUSED_ONNX, bundle_of, sha256
from illama.errors import UserError
from illama.graph.check_graph import check_graph

if TYPE_CHECKING:
    import tensorrt

MAX_CONTEXTS = 4  # a context can take more than a gigabyte
_TYPES = {"float": torch.float32, "uint8": torch.uint8}


@dataclass
class _Call:
    """The execution context of one batch size, whose state its CUDA graph uses, and its buffers."""

    context: tensorrt.IExecutionContext
    pinned_in: Tensor
    device_in: Tensor
    device_out: Tensor
    pinned_out: Tensor
    graph: torch.cuda.CUDAGraph | None = None


class TensorRTEngine(Engine):
    """An engine of TensorRT or TensorRT-RTX.

    Args:
        path: path to the engine.
        record: result of :meth:`deploy.trt.record.EngineRecord.read`, which verifies the engine before it is loaded.
        max_contexts: number of batch sizes whose execution context is kept. Another batch size takes the place of the
            least recently used one, which must be prepared again when it returns.

    Raises:
        UserError: there is no GPU, the library is not installed, or the library cannot load the engine on this GPU.
    """

    def __init__(self, path: Path, record: EngineRecord, max_contexts: int = MAX_CONTEXTS) -> None:
        if not torch.cuda.is_available():
            raise UserError(f"{path} needs an NVIDIA GPU, and none is available: use the bundle's model.onnx")
        library = find_library(record.library)
        assert library is not None  # find_library raises if a name is given
        self.runtime = f"{TITLES[record.library]} {library.version} {torch.cuda.get_device_name()}"
        self.arithmetic, self.batches = "tensorrt", (record.batch[0], record.batch[2])
        self._library, self._record = library, record
        self._engine = library.deserialize(path.read_bytes(), bool(record.options.get("version_compatible")))
        if record.options.get("weight_stripped"):
            _refit(library, self._engine, bundle_of(path) / FUSED_ONNX, record)
        self._cache_path = path.with_name(RUNTIME_CACHE) if path.name == ENGINE else path.with_suffix(".runtime-cache")
        self._config, self._cache = library.runtime_config(self._engine)
        if self._cache is not None and (kept := read_pinned(self._cache_path)):
            self._cache.deserialize(kept)
        self._stream = torch.cuda.Stream()
        (self._input, (kind, shape)), (self._output, (_, out)) = (
            next(iter(each.items())) for each in (record.inputs, record.outputs)
        )
        self._dtype, self._shape, self._out = _TYPES[kind], tuple(shape[1:]), tuple(out[1:])
        self._calls = LeastRecentlyUsed(max_contexts, self._prepare, _free)

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Images of the shape and dtype in the record -> logits (B, classes, ...) float32.

        Raises:
            UserError: another shape or dtype, or a batch outside the optimization profile.
        """
        given = torch.from_numpy(np.ascontiguousarray(images))
        if tuple(given.shape[1:]) != self._shape or given.dtype != self._dtype:
            raise UserError(
                f"the engine takes images {self._shape} {self._dtype}, not {tuple(given.shape[1:])} {given.dtype}"
            )
        call = self._call(len(given))
        call.pinned_in.copy_(given)
        with torch.cuda.stream(self._stream):
            call.device_in.copy_(call.pinned_in, non_blocking=True)
            self._run(call)
            call.pinned_out.copy_(call.device_out, non_blocking=True)
        self._stream.synchronize()
        return call.pinned_out.numpy().copy()

    def run_on_device(self, batch: int) -> None:
        """Runs the network on the last input of :meth:`infer`, without copies, on the current stream; for timing."""
        self._run(self._call(batch))

    def layers(self) -> str:
        """Returns the engine inspector's JSON of the layers."""
        inspector = self._engine.create_engine_inspector()
        return str(inspector.get_engine_information(self._library.trt.LayerInformationFormat.JSON))

    def close(self) -> None:
        """Writes TensorRT-RTX's cache of compiled kernels beside the engine, with its SHA-256; warns on failure."""
        if self._cache is not None:
            try:
                write_pinned(self._cache_path, bytes(self._cache.serialize()))
            except OSError as error:
                print(f"warning: {self._cache_path} cannot be written: {error.strerror}", file=sys.stderr)

    def _call(self, batch: int) -> _Call:
        min_batch, _, max_batch = self._record.batch
        if not min_batch <= batch <= max_batch:
            raise UserError(f"the engine takes batches of {min_batch} to {max_batch} images, not {batch}")
        return self._calls[batch]

    def _prepare(self, batch: int) -> _Call:
        """Creates the context and the buffers of one batch size, warms up, and captures a CUDA graph for TensorRT."""
        arguments = (self._config,) if self._config is not None else ()
        pinned_in = torch.zeros((batch, *self._shape), dtype=self._dtype).pin_memory()
        pinned_out = torch.zeros((batch, *self._out)).pin_memory()
        context = self._engine.create_execution_context(*arguments)
        call = _Call(context, pinned_in, pinned_in.cuda(), pinned_out.cuda(), pinned_out)
        ready = (
            context.set_input_shape(self._input, tuple(pinned_in.shape)),
            context.set_tensor_address(self._input, call.device_in.data_ptr()),
            context.set_tensor_address(self._output, call.device_out.data_ptr()),
        )
        if not all(ready):
            raise RuntimeError("TensorRT rejects the shapes in the engine's record")
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            for _ in range(2):  # the first call compiles kernels and allocates memory
                self._run(call)
        self._stream.synchronize()
        if self._library.name == "tensorrt":  # TensorRT-RTX captures by itself (Library.runtime_config)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                self._run(call)
            call.graph = graph
        return call

    def _run(self, call: _Call) -> None:
        if call.graph is not None:
            call.graph.replay()
        elif not call.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT failed to run the engine")


def _free(call: _Call) -> None:
    """Frees the context and the buffers of a batch size, for TensorRT too, which does not use PyTorch's allocator."""
    torch.cuda.synchronize()  # run_on_device may still use them, on any stream
    if call.graph is not None:
        call.graph.reset()
    vars(call).clear()
    torch.cuda.empty_cache()


def _refit(library: Library, engine: tensorrt.ICudaEngine, source: Path, record: EngineRecord) -> None:
    """Refits a weight-stripped engine with the weights of the graph that it was built from."""
    if not source.exists() or sha256(source) != record.onnx_sha256:
        raise UserError(f"{source} is not the graph of the weight-stripped engine: build the engine again")
    check_graph(source)
    logger = library.trt.Logger(library.trt.Logger.ERROR)
    refitter: tensorrt.Refitter = library.trt.Refitter(engine, logger)
    parser: tensorrt.OnnxParserRefitter = library.trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(source)) or not refitter.refit_cuda_engine():
        raise UserError(f"{library.name} could not refit the engine with the weights of {source}: build it again")
