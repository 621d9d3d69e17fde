"""Measure the overhead of the engine's training step over a bare PyTorch loop.

    python -m benchmarks.step_overhead

One Ray Train worker alternates between blocks of steps of a bare loop (forward, backward, clip,
Adam) and of the engine at ZeRO 0 and 1, canonical and native; the main process runs the bare loop
outside Ray. Prints one JSON line: medians in milliseconds, and each engine's overhead over the bare
loop in the same worker, as the median of paired blocks.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sepdist import slots
from sepdist.config import ClusterConfig, TrainConfig
from sepdist.data.records import Batch
from sepdist.objectives.separation import Separation
from sepdist.training.engine import DeepSpeedEngine
from sepdist.training.world import join_world

NUM_SHARDS, MICRO_BATCH, SECONDS = 4, 4, 2.0
NUM_BLOCKS, BLOCK_STEPS = 9, 4
MODEL = {
    "_target_": "sepdist.models.conv_tasnet.ConvTasNet",
    "num_speakers": 2,
    "num_filters": 128,
    "kernel_size": 32,
    "stride": 16,
    "num_bottleneck": 48,
    "num_hidden": 96,
    "num_skip": 48,
    "num_blocks": 6,
    "num_repeats": 2,
}


def batches(micro_batch: int = MICRO_BATCH, seconds: float = SECONDS) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for shard in range(NUM_SHARDS):
        sources = torch.randn(micro_batch, 2, int(seconds * 8000), generator=generator) * 0.05
        positions = torch.arange(micro_batch) + shard * micro_batch
        ids = [str(int(position)) for position in positions]
        lengths = torch.full((micro_batch,), sources.shape[-1])
        made.append(Batch(ids, positions, sources.sum(1), sources, None, lengths))
    return made


def bare_step() -> Callable[[list[Batch]], Any]:
    torch.manual_seed(0)
    model = slots.build("model", MODEL).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    objective = Separation()

    def step(given: list[Batch]) -> None:
        optimizer.zero_grad()
        for batch in given:
            loss, _ = objective(model, batch)
            (loss / len(given)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()

    return step


def engine_step(zero_stage: int, reduction: str) -> Callable[[list[Batch]], Any]:
    torch.manual_seed(0)
    return DeepSpeedEngine(
        slots.build("model", MODEL),
        Separation(),
        lambda params: torch.optim.Adam(params, lr=1e-3),
        join_world(),
        seed=0,
        num_virtual_shards=NUM_SHARDS,
        micro_batch=MICRO_BATCH,
        zero_stage=zero_stage,
        reduction=reduction,
    ).step


def measure(output: str, with_engines: bool) -> None:
    torch.set_num_threads(1)
    steps = {"bare": bare_step()}
    if with_engines:
        for stage, reduction in ((0, "canonical"), (1, "canonical"), (0, "native"), (1, "native")):
            steps[f"zero{stage}_{reduction}"] = engine_step(stage, reduction)
    given = batches()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for block in range(-1, NUM_BLOCKS):  # the first block compiles and is not counted
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(BLOCK_STEPS):
                step(given)
            if block >= 0:
                times[name].append((time.perf_counter() - began) / BLOCK_STEPS)
    Path(output).write_text(json.dumps(times))


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from sepdist.cluster import connected
    from sepdist.training.launch import worker_environment

    with tempfile.TemporaryDirectory() as folder:
        measure(f"{folder}/outside.json", with_engines=False)
        cfg = TrainConfig(cluster=ClusterConfig())
        with connected(1):
            TorchTrainer(
                lambda: measure(f"{folder}/inside.json", with_engines=True),
                scaling_config=ScalingConfig(num_workers=1),
                torch_config=TorchConfig(backend="gloo"),
                run_config=RunConfig(
                    name="bench",
                    storage_path=folder,
                    worker_runtime_env={"env_vars": worker_environment(cfg)},
                ),
            ).fit()
        outside = json.loads(Path(f"{folder}/outside.json").read_text())["bare"]
        inside = json.loads(Path(f"{folder}/inside.json").read_text())
    result: dict[str, Any] = {
        "benchmark": "step_overhead",
        "global_batch": NUM_SHARDS * MICRO_BATCH,
        "crop_seconds": SECONDS,
        "blocks": NUM_BLOCKS,
        "milliseconds": {"bare_outside_ray": round(statistics.median(outside) * 1e3, 2)},
        "overhead_percent": {},
    }
    for name, values in inside.items():
        result["milliseconds"][name] = round(statistics.median(values) * 1e3, 2)
        if name != "bare":
            ratios = [value / bare for value, bare in zip(values, inside["bare"], strict=True)]
            result["overhead_percent"][name] = round((statistics.median(ratios) - 1) * 100, 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
