"""The workers of a run: this process's rank and device, and small collective operations."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


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


def choose_kernels(tf32: bool, determinism: bool) -> None:
    """Choose this process's kernels on a GPU: TF32 where not autocast, or ones that repeat bits.

    Of the attentions the plain one does; cuBLAS and cuDNN's LSTM do with a workspace of fixed size.
    """
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    if determinism:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"  # read when cuBLAS is first used
        os.environ["CUBLASLT_WORKSPACE_SIZE"] = "128"  # KiB, as much; for more torch warns
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        for attention in ("flash", "mem_efficient", "cudnn"):
            getattr(torch.backends.cuda, f"enable_{attention}_sdp")(False)


def sum_over_world(values: torch.Tensor, world: World) -> torch.Tensor:
    """Sum over ranks, on CPU; exact at every world size if ranks fill disjoint elements."""
    if world.size > 1:
        values = values.to(world.device)
        dist.all_reduce(values)
    return values.cpu()


def to_host(values: Any) -> Any:
    """Return nested lists, tuples and dictionaries with their tensors on CPU, copied at once."""
    leaves, shape = tree_flatten(values)
    tensors = [x for x in leaves if torch.is_tensor(x)]
    numbers = torch.cat([x.reshape(-1).double() for x in tensors]).cpu()  # the only wait
    pieces = iter(numbers.split([x.numel() for x in tensors]))
    copied = [next(pieces).view(x.shape).to(x.dtype) if torch.is_tensor(x) else x for x in leaves]
    return tree_unflatten(copied, shape)


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
