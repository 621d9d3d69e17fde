"""Measure the cost of resuming late in an epoch, and of checkpoints and data while a run trains.

    python -m benchmarks.resume

Prints one JSON line:

1. Seconds from opening a data set to the first batch, at 0 % and at 99 % of an epoch, from disk and
   from loopback S3 with an empty cache. Medians of 9; the two positions alternate.
2. The shares of training time that checkpoints and waiting for data took, by the run's own account:
   300 steps of the small Conv-TasNet with a checkpoint every 100, run_dir and shards on loopback S3
   behind a proxy that delays every request by 50 ms. Waiting for data counts from the second epoch
   on, when the shards are in the cache.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.loader import start_s3, write
from sepdist.data.crops import Crops
from sepdist.data.dataset import Dataset
from sepdist.data.stream import TrainStream
from sepdist.reporting import read_metrics
from tests.support.s3server import FaultyProxy, S3Server

REPEATS, DELAY = 9, 0.05
NUM_STEPS, CHECKPOINT_EVERY, LOG_EVERY = 300, 100, 10
GLOBAL_BATCH = 16
ROOT = Path(__file__).parent.parent


def seconds_to_first_batch(url: str, share: float) -> float:
    with tempfile.TemporaryDirectory() as cache:
        began = time.perf_counter()
        dataset = Dataset(url, noise=True, cache_dir=cache)
        shape = {"num_virtual_shards": 4, "micro_batch": 4, "rank": 0, "world_size": 1}
        crops = Crops(dataset, seed=0, crop_seconds=3.0)
        stream = TrainStream({"main": crops}, seed=0, prefetch_steps=0, **shape)
        next(stream.steps(int(share * dataset.manifest.num_samples) // GLOBAL_BATCH))
        seconds = time.perf_counter() - began
        stream.close()
    return seconds


def first_batches(url: str) -> dict[str, float]:
    times: dict[float, list[float]] = {0.0: [], 0.99: []}
    for _ in range(REPEATS):
        for share, measured in times.items():
            measured.append(seconds_to_first_batch(url, share))
    start, end = (statistics.median(measured) for measured in times.values())
    return {
        "at_0_percent": round(start, 4),
        "at_99_percent": round(end, 4),
        "ratio": round(end / start, 3),
    }


def train(endpoint: str, folder: Path) -> dict[str, Any]:
    """Shares of time of a run behind a slow proxy."""
    run_dir = "s3://bench/run"
    arguments = [
        *(
            "-m",
            "sepdist",
            "train",
            "experiment=demo/pretrain",
            "engine.zero_stage=1",
            "objective=separation",
            "num_speakers=2",
        ),
        *(
            "data.num_sources=2",
            "data.noise=true",
            "data.train=s3://bench/set",
            "data.validation=s3://bench/set",
        ),
        *(
            f"run_dir={run_dir}",
            f"data.cache_dir={folder / 'cache'}",
            f"training.max_steps={NUM_STEPS}",
        ),
        *(f"training.checkpoint_every={CHECKPOINT_EVERY}", f"training.log_every={LOG_EVERY}"),
        *(
            "validation.every_steps=1000000",
            "validation.num_mixtures=2",
            "validation.num_listening=0",
        ),
    ]
    environment = {**os.environ, "AWS_ENDPOINT_URL": endpoint, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, check=True, stdout=sys.stderr
    )
    rows = [row for row in read_metrics(run_dir) if "goodput/step_seconds" in row]
    warm = next(
        row
        for row in rows
        if row["step"] * GLOBAL_BATCH > Dataset("s3://bench/set").manifest.num_samples
    )
    last = rows[-1]
    steps = last["goodput/step_seconds"]
    return {
        "steps": last["step"],
        "checkpoints": NUM_STEPS // CHECKPOINT_EVERY,
        "steps_per_second": round(last["step"] / steps, 2),
        "checkpoint_percent": round(100 * last["goodput/checkpoint_seconds"] / steps, 3),
        "data_wait_percent_warm": round(
            100
            * (last["goodput/data_wait_seconds"] - warm["goodput/data_wait_seconds"])
            / (steps - warm["goodput/step_seconds"]),
            3,
        ),
        "data_wait_percent": round(100 * last["goodput/data_wait_seconds"] / steps, 3),
    }


def measure(folder: Path) -> dict[str, Any]:
    local = str(folder / "set")
    write(local)
    server: S3Server | None
    server, reason = start_s3(folder / "server")
    result: dict[str, Any] = {"first_batch_seconds": {"local": first_batches(local)}}
    if server is None:
        return result | {"skipped": f"all that needs S3: {reason}"}
    try:
        write("s3://bench/set")
        result["first_batch_seconds"]["s3_cold"] = first_batches("s3://bench/set")
        proxy = FaultyProxy(server.ports["s3"], lambda number, request: f"delay:{DELAY}")
        result["run_behind_50_ms"] = train(proxy.endpoint, folder)
        proxy.close()
    finally:
        server.kill()
    return result


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"benchmark": "resume", **measure(Path(folder))}))


if __name__ == "__main__":
    main()
