"""The workers of a run: this process's rank and device, and small collective operations."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """Rank in and size of the process group, and the device of this worker."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this worker writes the metrics and the checkpoints."""
        return self.rank == 0


def join_world() -> World:
    """Join Ray's process group, torchrun's, or one of this process alone: nccl on GPUs, or gloo."""
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if on_gpu else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)


def sum_over_world(values: torch.Tensor, world: World) -> torch.Tensor:
    """Sum over ranks, on CPU; exact at every world size if ranks fill disjoint elements."""
    if world.size > 1:
        values = values.to(world.device)
        dist.all_reduce(values)
    return values.cpu()


def gather_to_main(value: object, world: World) -> list:
    """Return every rank's `value` (picklable), in rank order, on the main rank; [] elsewhere."""
    if world.size == 1:
        return [value]
    gathered: list | None = [None] * world.size if world.is_main else None
    dist.gather_object(value, gathered)
    return gathered or []


def broadcast_object(value: Any, world: World) -> Any:
    """Return the main rank's `value` (picklable) on every rank."""
    box = [value]
    if world.size > 1:
        dist.broadcast_object_list(box)
    return box[0]


def broadcast_tensors(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Return the main rank's `tensors` (on CPU) on every rank, sent one by one."""
    layout = {name: (value.shape, value.dtype) for name, value in tensors.items()}
    received = {}
    for name, (shape, dtype) in broadcast_object(layout, world).items():
        value = tensors[name] if world.is_main else torch.empty(shape, dtype=dtype)
        sent = value.reshape(-1).view(torch.uint8).to(world.device)  # gloo knows few types
        if world.size > 1 and sent.numel():
            dist.broadcast(sent, src=0)
        received[name] = sent.cpu().view(dtype).view(shape)
    return received
