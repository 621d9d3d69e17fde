"""Measure memory and step time of SSQP-Net at base size with two workers, at ZeRO 0, 1, 2 and 3.

    python -m benchmarks.ssqp_memory [seconds of a crop, default 1.0]

Two processes fine-tune SSQP-Net (OTFP) on a wav2vec 2.0 with 768 features, 12 layers and random
weights, over gloo on this machine: two virtual shards of one item, Adam, at each ZeRO stage, at 0
and 3 also with gradient checkpointing. Each configuration runs in processes of its own, twice: with
glibc's defaults, and with glibc told to return every large block at once (MALLOC_MMAP_THRESHOLD_),
which is slower. By default glibc keeps up to a GB of freed blocks, so that the peak does not show
how much memory is needed.

Prints one JSON line per configuration and a last one with all: resident memory of a worker in GB
after the imports, its peak until the engine is built and its peak in the steps, all three with
blocks returned at once; then the peak in the steps and the median step in seconds with the
defaults. Needs Linux with glibc.
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
NUM_STEPS = 4  # the first, which creates the optimizer's state, is not timed
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # bytes; unset, it grows up to 32 MB
WAYS = [(stage, kind, False) for stage in (0, 1, 2) for kind in ("canonical", "native")]
WAYS += [(3, "native", False), (0, "native", True), (3, "native", True)]


def take_peak() -> float:
    """Peak resident memory in GB since the last call."""
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
    """Result of `measure` in two processes started with `environment`."""
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
