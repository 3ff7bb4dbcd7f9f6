"""Processes that torchrun starts: one per GPU, or several on CPUs. Without torchrun, there is a single process."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from illama.errors import UserError


@dataclass(frozen=True)
class Processes:
    """The processes that train or evaluate together.

    Attributes:
        rank: index of this process; process 0 writes files and shows progress.
        count: number of processes.
        device: device of this process.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Returns each value's sum over the processes, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.count > 1:
            dist.all_reduce(total)
        return total.tolist()

    def barrier(self) -> None:
        """Waits for the other processes; raises UserError if one ended or does not arrive within the timeout."""
        if self.count == 1:
            return
        try:
            dist.barrier()
        except RuntimeError as error:
            raise UserError(
                "another process ended or did not respond in time: see its own message, then start all "
                "processes again; finished work is kept"
            ) from error

    def share(self, total: int) -> tuple[list[int], int]:
        """Returns this process's indices out of ``total``, and how many of them count.

        Every process gets the same number of indices, since all must gather sharded weights at the same time. An index
        that was repeated for this purpose does not count.
        """
        positions = range(self.rank, -(-total // self.count) * self.count, self.count)
        return [position % total for position in positions], sum(position < total for position in positions)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Returns ``model``, wrapped so that its gradients are averaged over the processes."""
        if self.count == 1 or isinstance(model, FSDPModule):
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.11 does not have the option's new name
            return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)

    def shard(self, model: nn.Module, blocks: nn.ModuleList) -> None:
        """Shards the weights over the processes in place, block by block (FSDP2); raises UserError without torchrun."""
        if not dist.is_initialized():
            raise UserError("--fsdp needs the processes of torchrun: start with torchrun, or add --no-fsdp")
        mesh = init_device_mesh(self.device.type, (self.count,))
        for module in (*blocks, model):
            # The root is resharded after a forward pass, too: the moving average may be updated after an evaluation.
            fully_shard(module, mesh=mesh, reshard_after_forward=True)


ALONE = Processes(0, 1, torch.device("cpu"))


@contextmanager
def processes(apart: bool = False, timeout: timedelta | None = None) -> Iterator[Processes]:
    """Joins the processes that torchrun started; without torchrun, yields a single process.

    Args:
        apart: whether the processes compute independently; they then communicate on the CPU and may share a GPU.
        timeout: how long a process waits for another. Defaults to PyTorch's timeout.

    Raises:
        UserError: torchrun was told to restart workers, but its store would keep the addresses of dead workers
            (github.com/pytorch/pytorch/issues/135712).
    """
    launched = dist.is_torchelastic_launched()
    shared_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and shared_store:
        raise UserError(
            "restarted workers would not find each other: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "
            "for torchrun --max-restarts"
        )
    local = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local % torch.cuda.device_count() if apart else local)
    meet_on_gpu = cuda and not apart
    device = torch.device("cuda", local) if meet_on_gpu else torch.device("cpu")
    if not launched:
        yield Processes(0, 1, device)
        return
    dist.init_process_group("nccl" if meet_on_gpu else "gloo", timeout=timeout)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


@contextmanager
def gradient_sync(wrapped: nn.Module, now: bool) -> Iterator[None]:
    """Averages gradients over the processes in this backward pass if ``now``; otherwise they accumulate locally."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(now)
        yield
    elif isinstance(wrapped, DistributedDataParallel) and not now:
        with wrapped.no_sync():
            yield
    else:
        yield
