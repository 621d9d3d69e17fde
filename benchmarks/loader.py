"""Measure the speed of training batches: TrainStream from disk and loopback S3, and WebDataset.

    python -m benchmarks.loader

Prints one JSON line. All ways read the same generated tars (8 kHz; s1, s2 and noise of 3 to 6 s),
decode the three members, crop 3 s at random, add them up and stack 8. Every run is one epoch from a
cold start: it includes reading manifest and indices, hashing every shard and, for S3, downloading
into an empty cache. WebDataset (one process, no shuffling, no checks) reads from disk and decodes
whole members. Figures are medians of 3 runs. The ways take turns, so that load on the machine
affects all of them; it affects cpu_seconds, of this process, least.
"""

import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import soundfile
import torch
import webdataset

from sepdist.data import shards
from sepdist.data.crops import Crops
from sepdist.data.dataset import Dataset
from sepdist.data.records import Mixture
from sepdist.data.stream import TrainStream
from sepdist.seeding import rng
from tests.support.s3server import ADMIN, S3Server, find_weed

RATE = 8000
CROP_SECONDS = 3.0
NUM_SHARDS = 12
SAMPLES_PER_SHARD = 64
BATCH = 8
REPEATS = 3


def mixture(number: int) -> Mixture:
    """Noise with the spectrum and loudness contour of speech, so that FLAC packs it as well."""

    def load() -> dict[str, np.ndarray]:
        random = rng(0, "benchmark", number)
        num_samples = int(random.integers(3 * RATE, 6 * RATE))
        frequency = np.fft.rfftfreq(num_samples, 1 / RATE)
        shape = 1 / (1 + (frequency / 400) ** 2)
        time_seconds = np.arange(num_samples) / RATE
        waves = {}
        for name in ("s1", "s2", "noise"):
            wave = np.fft.irfft(
                np.fft.rfft(random.standard_normal(num_samples)) * shape, num_samples
            )
            wave *= 0.2 + np.sin(2 * np.pi * 2 * time_seconds + random.uniform(0, 6)) ** 2
            waves[name] = (0.3 * wave / np.abs(wave).max()).astype(np.float32)
        return waves

    return Mixture(id=f"mix-{number:05d}", speakers=("a", "b"), sample_rate=RATE, load=load)


def write(url: str) -> shards.Manifest:
    infos = []
    for i in range(NUM_SHARDS):
        records = [mixture(i * SAMPLES_PER_SHARD + j) for j in range(SAMPLES_PER_SHARD)]
        infos.append(shards.write_shard(records, url, shards.shard_name("bench", "train", i)))
    return shards.write_manifest(url, "bench", "train", RATE, infos)


def from_stream(url: str, num_threads: int) -> Iterator[torch.Tensor]:
    with tempfile.TemporaryDirectory() as cache:
        crops = Crops(Dataset(url, noise=True, cache_dir=cache), seed=0, crop_seconds=CROP_SECONDS)
        shape = {"num_virtual_shards": 1, "micro_batch": BATCH, "rank": 0, "world_size": 1}
        stream = TrainStream({"main": crops}, seed=0, num_threads=num_threads, **shape)
        steps = stream.steps(0)
        for _ in range(NUM_SHARDS * SAMPLES_PER_SHARD // BATCH):
            yield next(steps)[0].mixture
        stream.close()


def from_webdataset(folder: str) -> Iterator[torch.Tensor]:
    random, crop = np.random.default_rng(0), round(CROP_SECONDS * RATE)
    urls = [str(path) for path in sorted(Path(folder).glob("*.tar"))]
    rows = []
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        waves = [
            soundfile.read(io.BytesIO(sample[f"{name}.flac"]), dtype="float32")[0]
            for name in ("s1", "s2", "noise")
        ]
        start = int(random.integers(len(waves[0]) - crop + 1))
        rows.append(np.stack([wave[start : start + crop] for wave in waves]))
        if len(rows) == BATCH:
            yield torch.from_numpy(np.stack(rows)).sum(1)
            rows = []


def seconds_of(batches: Callable[[], Iterator[torch.Tensor]]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of one epoch."""
    began, began_cpu, num_samples = time.perf_counter(), time.process_time(), 0
    for batch in batches():
        assert batch.shape == (BATCH, round(CROP_SECONDS * RATE)), batch.shape
        num_samples += len(batch)
    assert num_samples == NUM_SHARDS * SAMPLES_PER_SHARD, num_samples
    return time.perf_counter() - began, time.process_time() - began_cpu


def start_s3(folder: Path) -> tuple[S3Server | None, str]:
    """Start a server with a bucket "bench" and set the environment; or return None and why not."""
    try:
        find_weed()
        server = S3Server(folder).start()
    except (RuntimeError, TimeoutError) as error:
        return None, str(error).splitlines()[0]
    server.client().create_bucket(Bucket="bench")
    os.environ |= {
        "AWS_ACCESS_KEY_ID": ADMIN[0],
        "AWS_SECRET_ACCESS_KEY": ADMIN[1],
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    return server, ""


def measure(folder: Path) -> dict[str, object]:
    local = str(folder / "set")
    manifest = write(local)
    server, reason = start_s3(folder / "server")
    try:
        ways: dict[str, Callable[[], Iterator[torch.Tensor]]] = {
            "webdataset_local": lambda: from_webdataset(local),
            "stream_local_1_thread": lambda: from_stream(local, 1),
            "stream_local_2_threads": lambda: from_stream(local, 2),
        }
        if server is not None:
            write("s3://bench/set")
            ways["stream_s3_cold_1_thread"] = lambda: from_stream("s3://bench/set", 1)
            ways["stream_s3_cold_2_threads"] = lambda: from_stream("s3://bench/set", 2)
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(REPEATS):
            for name, way in ways.items():
                runs[name].append(seconds_of(way))
    finally:
        if server is not None:
            server.kill()
    result: dict[str, object] = {
        "samples": manifest.num_samples,
        "shards": len(manifest.shards),
        "megabytes": round(sum(shard.bytes for shard in manifest.shards) / 1e6, 1),
        "mean_seconds_stored": round(3600 * manifest.hours / manifest.num_samples, 2),
        "crop_seconds": CROP_SECONDS,
        "cpus": os.cpu_count(),
        "repeats": REPEATS,
    }
    for name, times in runs.items():
        speed = manifest.num_samples / statistics.median(clock for clock, _ in times)
        result[name] = {
            "samples_per_second": round(speed, 1),
            "audio_seconds_per_second": round(speed * CROP_SECONDS, 1),
            "seconds": [round(clock, 3) for clock, _ in times],
            "cpu_seconds": round(statistics.median(cpu for _, cpu in times), 3),
        }
    return result if server is not None else result | {"stream_s3": f"skipped: {reason}"}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"benchmark": "loader", **measure(Path(folder))}))


if __name__ == "__main__":
    main()
