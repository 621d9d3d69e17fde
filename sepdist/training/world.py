"""Who this process is among the workers of a run. In: a process group or torchrun's environment; out: a World."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """Rank and size of the process group, and the device this worker computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this worker writes the metrics and the checkpoints."""
        return self.rank == 0


def join_world() -> World:
    """The World of this process: of the group that Ray made, of torchrun's, or of one process alone.

    The back end is nccl where a GPU is used and gloo elsewhere.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if on_gpu else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)


def sum_over_world(values: torch.Tensor, world: World) -> torch.Tensor:
    """Element-wise sum over ranks; exact, and the same at every world size, where ranks fill disjoint elements."""
    if world.size > 1:
        values = values.to(world.device)
        dist.all_reduce(values)
    return values.cpu()


def gather_objects(value: object, world: World) -> list:
    """Every rank's `value` (picklable), in rank order, on every rank."""
    if world.size == 1:
        return [value]
    gathered: list = [None] * world.size
    dist.all_gather_object(gathered, value)
    return gathered
