"""Measure what the canonical reduction costs over DeepSpeed's own, for two workers.

    python -m benchmarks.reduction

Two processes train Conv-TasNet (the small preset on 2 s, and the paper's size on 1 s) with 4
virtual shards, alternating between the canonical and the native reduction at ZeRO 0 and 1, over
gloo on this machine. Prints one JSON line: median milliseconds per step, and the cost of the
canonical reduction in percent (the median over paired blocks).
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.step_overhead import MODEL, batches
from sepdist import slots
from sepdist.objectives.separation import Separation
from sepdist.training.engine import DeepSpeedEngine
from sepdist.training.world import World

NUM_SHARDS, NUM_BLOCKS, BLOCK_STEPS = 4, 9, 2
PAPER = {"_target_": MODEL["_target_"], "num_speakers": 2}
SIZES: dict[str, tuple[dict[str, Any], int, float]] = {  # model, micro-batch, crop in seconds
    "conv_tasnet_small": (MODEL, 4, 2.0),
    "conv_tasnet": (PAPER, 1, 1.0),
}
WAYS = [(0, "canonical"), (0, "native"), (1, "canonical"), (1, "native")]


def measure(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    world = World(rank, 2, torch.device("cpu"))
    result: dict[str, Any] = {}
    for size, (node, micro_batch, seconds) in SIZES.items():
        engines = {}
        for stage, reduction in WAYS:
            torch.manual_seed(0)
            engines[stage, reduction] = DeepSpeedEngine(
                slots.build("model", node),
                Separation(),
                lambda params: torch.optim.Adam(params, lr=1e-3),
                world,
                seed=0,
                num_virtual_shards=NUM_SHARDS,
                micro_batch=micro_batch,
                zero_stage=stage,
                reduction=reduction,
            )
        given = batches(micro_batch, seconds)[2 * rank : 2 * rank + 2]
        times: dict[tuple[int, str], list[float]] = {way: [] for way in WAYS}
        for block in range(-1, NUM_BLOCKS):  # the first, which compiles, is not counted
            for way in WAYS:
                dist.barrier()
                began = time.perf_counter()
                for _ in range(BLOCK_STEPS):
                    engines[way].step(given)
                if block >= 0:
                    times[way].append((time.perf_counter() - began) / BLOCK_STEPS)
        result[size] = {
            "parameters": sum(p.numel() for p in engines[WAYS[0]].model.parameters()),
            "milliseconds": {
                f"zero{stage}_{reduction}": round(
                    statistics.median(times[stage, reduction]) * 1e3, 1
                )
                for stage, reduction in WAYS
            },
            "canonical_cost_percent": {
                f"zero{stage}": round(
                    100
                    * (
                        statistics.median(
                            mine / its
                            for mine, its in zip(
                                times[stage, "canonical"], times[stage, "native"], strict=True
                            )
                        )
                        - 1
                    ),
                    1,
                )
                for stage in (0, 1)
            },
        }
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (folder,), nprocs=2)
        result = json.loads(Path(folder, "result.json").read_text())
    print(
        json.dumps({"benchmark": "reduction", "workers": 2, "virtual_shards": NUM_SHARDS} | result)
    )


if __name__ == "__main__":
    main()
