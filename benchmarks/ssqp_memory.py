"""How much memory and time does SSQP-Net at base size take at ZeRO 0, 1, 2 and 3, for two workers?

    python -m benchmarks.ssqp_memory [seconds of a crop, default 1.0]

Two processes fine-tune SSQP-Net (OTFP) on a wav2vec 2.0 of 768 features and 12 layers, random weights, over gloo on
this machine: two virtual shards of one item, Adam, at each ZeRO stage, at 0 and 3 also with gradient checkpointing,
each in processes of its own, and twice: as it is, and with the C library told to give every large block back at once
(MALLOC_MMAP_THRESHOLD_), which is slower. Without that it keeps freed blocks, as much as a GB, and the peak tells
nothing of what is needed. One JSON line for each way, and a last one with all: of a worker's resident memory in GB what
the imports take, the peak until the engine stands and the peak of the steps, all of the second kind, the peak of the
steps and the median step in seconds as it is. Linux with glibc.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sepdist.data.records import Batch
from sepdist.models.speech_encoders import speech_encoder
from sepdist.models.ssqp import SSQPNet
from sepdist.objectives.quality import Quality
from sepdist.training.engine import DeepSpeedEngine
from sepdist.training.world import World

BASE = {"model_type": "wav2vec2"}
NUM_STEPS = 4  # the first, in which the optimizer's state comes to be, is not timed
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # bytes; unset, it grows up to 32 MB
WAYS = [
    (0, "canonical", False),
    (0, "native", False),
    (1, "canonical", False),
    (1, "native", False),
]
WAYS += [
    (2, "canonical", False),
    (2, "native", False),
    (3, "native", False),
    (0, "native", True),
    (3, "native", True),
]


def take_peak() -> float:
    """The most resident memory, in GB, since this was last called."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    Path("/proc/self/clear_refs").write_text("5")
    return int(status["VmHWM"].split()[0]) * 1024 / 1e9


def batch_at(position: int, seconds: float) -> Batch:
    length = int(seconds * 8000)
    sources = 0.05 * torch.randn(1, 2, length, generator=torch.Generator().manual_seed(position))
    estimates = sources + 0.3 * sources.flip(1)
    where, lengths = torch.tensor([position]), torch.tensor([length])
    return Batch(
        [str(position)], where, sources.sum(1), sources, None, lengths, estimates=estimates
    )


def measure(rank: int, folder: str, way: tuple[int, str, bool], seconds: float) -> None:
    stage, reduction, checkpointed = way
    torch.set_num_threads(1)
    import deepspeed  # noqa: F401

    speech_encoder(None, BASE | {"num_hidden_layers": 1, "hidden_size": 48})  # imports transformers
    peaks = [take_peak()]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    engine = DeepSpeedEngine(
        SSQPNet(encoder=BASE, gradient_checkpointing=checkpointed),
        Quality(),
        lambda params: torch.optim.Adam(params, lr=1e-4),
        World(rank, 2, torch.device("cpu")),
        seed=0,
        num_virtual_shards=2,
        micro_batch=1,
        zero_stage=stage,
        reduction=reduction,
    )
    peaks.append(take_peak())
    times = []
    for step in range(NUM_STEPS):
        dist.barrier()
        began = time.perf_counter()
        engine.step([batch_at(2 * step + rank, seconds)])
        times.append(time.perf_counter() - began)
    most = torch.tensor([*peaks, take_peak()], dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if rank == 0:
        found = {"zero": stage, "reduction": reduction, "gradient_checkpointing": checkpointed}
        names = ("imports_gigabytes", "start_gigabytes", "steps_gigabytes")
        found |= {name: round(value, 2) for name, value in zip(names, most.tolist(), strict=True)}
        found |= {"step_seconds": round(statistics.median(times[1:]), 2)}
        Path(folder, "result.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measured(
    way: tuple[int, str, bool], seconds: float, environment: dict[str, str]
) -> dict[str, Any]:
    """What `measure` writes, of two processes that begin with `environment`."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, environment):
        mp.spawn(measure, (folder, way, seconds), nprocs=2)
        return json.loads(Path(folder, "result.json").read_text())


def main() -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    rows = []
    for way in WAYS:
        row, as_it_is = (measured(way, seconds, environment) for environment in (GIVE_BACK, {}))
        row |= {
            "steps_gigabytes_as_it_is": as_it_is["steps_gigabytes"],
            "step_seconds": as_it_is["step_seconds"],
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in SSQPNet(encoder=BASE).parameters())
    head = {
        "benchmark": "ssqp_memory",
        "workers": 2,
        "parameters": parameters,
        "crop_seconds": seconds,
    }
    print(json.dumps(head | {"ways": rows}))


if __name__ == "__main__":
    main()
