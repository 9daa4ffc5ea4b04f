"""The processes that share a run: who am I, and the few collectives that the journeys use.

Nobody asks "is distributed on?": a world of one runs the same code with collectives that do nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """`rank` of `size` processes, computing on `device`."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def device_name(self) -> str:
        """What it computes on, for the record: `cpu` or the GPU's name."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; also returned."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Rows of all ranks, in rank order: (B, ...) -> (size*B, ...), equal B; gradients flow to this rank's rows.

        The gradient is summed over ranks, as each of them may use every row. Where all compute the same loss, that is
        `size` times the gradient, which the mean over ranks of data parallelism turns into the exact one.
        """
        return _Gather.apply(tensor, self) if self.size > 1 else tensor  # type: ignore[no-untyped-call]

    def exchange(self, parts: list[Tensor]) -> list[Tensor]:
        """parts[i] goes to rank i: what every rank sent here, in rank order; every rank must call it.

        Numbers of rows may differ and be 0; further dimensions, dtype and kind of device must agree over ranks.
        """
        if self.size == 1:
            return parts
        rows = torch.cat(parts)
        to_send = torch.tensor([len(part) for part in parts], device=rows.device)
        to_receive = torch.empty_like(to_send)
        dist.all_to_all_single(to_receive, to_send)
        counts = to_receive.tolist()
        received = rows.new_empty((sum(counts), *rows.shape[1:]))
        dist.all_to_all_single(received, rows, counts, to_send.tolist())
        return list(torch.split(received, counts))

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's picklable value, on every rank, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def collect(self, value: Any) -> list[Any]:
        """Every rank's picklable value in rank order on rank 0, an empty list elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size if self.rank == 0 else []
        dist.gather_object(value, values or None)
        return values

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, world: World) -> Tensor:
        ctx.world, ctx.rows = world, len(tensor)
        parts = [torch.empty_like(tensor) for _ in range(world.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = ctx.world.sum_(grad.clone())
        start = ctx.world.rank * ctx.rows
        return total[start : start + ctx.rows], None


@contextmanager
def joined_world(timeout_s: int = 600) -> Iterator[World]:
    """Adopt the process group that exists (Ray), else join torchrun's, else be a world of one.

    A group made here is destroyed on the way out; one that was found is left to its owner.
    """
    if dist.is_initialized():
        yield _world()
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(backend(torch.cuda.is_available()), timeout=timedelta(seconds=timeout_s))
        try:
            yield _world()
        finally:
            dist.destroy_process_group()
    else:
        yield World(device=_device())


def backend(cuda: bool) -> str:
    """Of process groups: tensors on either device can be shared where there are GPUs."""
    return "cpu:gloo,cuda:nccl" if cuda else "gloo"


def regroup(size: int, share: Callable[[Any], Any], timeout_s: int) -> bool:
    """Put a process group of the first `size` ranks in the place of the present one; False on the ranks left over.

    Every rank calls it. `share` gives rank 0's value to every rank by other means than the group.
    """
    rank, cuda = dist.get_rank(), torch.cuda.is_available()
    dist.destroy_process_group()
    host = os.environ["MASTER_ADDR"]
    TCPStore = dist.TCPStore  # type: ignore[attr-defined]
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    port = share(store.port if store else None)
    if rank >= size:
        return False
    store = store or TCPStore(host, port, is_master=False)
    os.environ["WORLD_SIZE"] = str(size)
    dist.init_process_group(
        backend(cuda), store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
    )
    return True


def _world() -> World:
    return World(dist.get_rank(), dist.get_world_size(), _device())


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
