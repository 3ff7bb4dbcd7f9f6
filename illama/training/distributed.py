"""Work over several processes: one per GPU under torchrun, or several on CPUs; a single one without it."""

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
    """This process among all that train or evaluate together.

    Attributes:
        rank: 0 for the one that writes files and shows progress.
        count: how many there are.
        device: where this one computes.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.count > 1:
            dist.all_reduce(total)
        return total.tolist()

    def barrier(self) -> None:
        """Wait for the other processes; UserError if one ended, or does not come within the timeout."""
        if self.count == 1:
            return
        try:
            dist.barrier()
        except RuntimeError as error:
            raise UserError(
                "another process ended, or did not answer in time: see its own message, then start all of "
                "them again; what is done is kept"
            ) from error

    def share(self, total: int) -> tuple[list[int], int]:
        """This process's indices of ``total`` things, and how many of them count.

        Every process gets equally many, since sharded weights are gathered by all at once; the last index of some
        is a repetition, which does not count.
        """
        positions = range(self.rank, -(-total // self.count) * self.count, self.count)
        return [position % total for position in positions], sum(position < total for position in positions)

    def wrap(self, model: nn.Module) -> nn.Module:
        """``model`` with its gradients averaged over the processes."""
        if self.count == 1 or isinstance(model, FSDPModule):
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.11 does not know the option's new name
            return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)

    def shard(self, model: nn.Module, blocks: nn.ModuleList) -> None:
        """Split the weights over the processes, block by block (FSDP2), in place; UserError without torchrun."""
        if not dist.is_initialized():
            raise UserError("--fsdp shards over torchrun's processes: start with torchrun, or add --no-fsdp")
        mesh = init_device_mesh(self.device.type, (self.count,))
        for module in (*blocks, model):
            # The root too is to be sharded again after a forward pass: an evaluation may come before an average.
            fully_shard(module, mesh=mesh, reshard_after_forward=True)


ALONE = Processes(0, 1, torch.device("cpu"))


@contextmanager
def processes(apart: bool = False, timeout: timedelta | None = None) -> Iterator[Processes]:
    """Join the processes that torchrun started; alone without torchrun.

    Args:
        apart: they compute each by itself, and only meet: on the CPU, so that several can share a GPU.
        timeout: how long one waits for another; the library's own if not given.

    Raises:
        UserError: torchrun is to restart workers but would give them a store that holds dead workers' addresses
            (github.com/pytorch/pytorch/issues/135712).
    """
    launched = dist.is_torchelastic_launched()
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and _shared_store():
        raise UserError(
            "restarted workers would not find each other: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "
            "before torchrun --max-restarts"
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


def _shared_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


@contextmanager
def gradients_synchronised(wrapped: nn.Module, now: bool) -> Iterator[None]:
    """Average the gradients over the processes in this backward pass only if ``now``: else they accumulate."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(now)
        yield
    elif isinstance(wrapped, DistributedDataParallel) and not now:
        with wrapped.no_sync():
            yield
    else:
        yield
