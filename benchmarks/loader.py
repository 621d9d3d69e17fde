"""Measure what a training batch costs, and the speed of the stream beside WebDataset's.

    python -m benchmarks.loader

Prints one JSON line. The tars are generated: s1, s2 and noise of 3 to 6 s, of which 3 s are cropped
at random, added up and stacked by 8.

`cost` is CPU milliseconds per sample in one thread, with the shards open: items and their batch.
`gil_ms` is the part of it outside of libsndfile, soxr, SciPy's filter and system calls on files,
which let go of the GIL; so it is at most that long under the GIL (NumPy lets go of it too).
`on_8_cores` is the samples per second that both allow: 8 / cpu_ms and 1 / gil_ms. Mixing at its
`first` pass measures the loudness of every utterance.

`threads` is the samples per second of that work in 1 and 2 threads (best of several turns).

`epoch` is one epoch from a cold start, including manifest and indices, hashing every shard and, for
S3, downloading into an empty cache. WebDataset (one process, no shuffling, no checks) decodes whole
members. Medians of 3 runs. The ways take turns, so that load on the machine affects all of them; it
affects cpu_seconds, of this process, least.
"""

import contextlib
import io
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import scipy.signal
import soundfile
import soxr
import torch
import webdataset

from sepdist import storage
from sepdist.allocator import keep_freed_memory
from sepdist.data import shards
from sepdist.data.crops import Crops
from sepdist.data.dataset import Dataset, collate
from sepdist.data.dynamic import DynamicMixing
from sepdist.data.records import Mixture, Utterance
from sepdist.data.stream import Feed, TrainStream
from sepdist.seeding import rng
from tests.support.s3server import ADMIN, S3Server, find_weed
from tests.support.shard_sets import write_shard

RATE = 8000
CROP_SECONDS = 3.0
NUM_SHARDS = 12
SAMPLES_PER_SHARD = 64
BATCH = 8
REPEATS = 3
TURNS = 7  # of the samples whose cost is measured
GOAL = 1900  # samples per second for one GPU with 8 cores
CORES = 8
FREE = {
    os: ("pread", "pwrite", "memfd_create", "close"),
    soxr: ("resample",),
    scipy.signal: ("lfilter",),
}
SNDFILE = ("sf_open_fd", "sf_open_virtual", "sf_seek", "sf_readf_float", "sf_close")


def mixture(number: int, rate: int = RATE) -> Mixture:
    """Noise with the spectrum and loudness contour of speech, so that FLAC packs it as well."""

    def load() -> dict[str, np.ndarray]:
        random = rng(0, "benchmark", number)
        num_samples = int(random.integers(3 * rate, 6 * rate))
        frequency = np.fft.rfftfreq(num_samples, 1 / rate)
        shape = 1 / (1 + (frequency / 400) ** 2)
        time_seconds = np.arange(num_samples) / rate
        waves = {}
        for name in ("s1", "s2", "noise"):
            wave = np.fft.irfft(
                np.fft.rfft(random.standard_normal(num_samples)) * shape, num_samples
            )
            wave *= 0.2 + np.sin(2 * np.pi * 2 * time_seconds + random.uniform(0, 6)) ** 2
            waves[name] = (0.3 * wave / np.abs(wave).max()).astype(np.float32)
        return waves

    return Mixture(id=f"mix-{number:05d}", speakers=("a", "b"), sample_rate=rate, load=load)


def utterance(number: int) -> Utterance:
    """The first source of `mixture`, by one of 16 speakers."""
    load = mixture(number).load
    speaker, key = f"p{number % 16}", f"utterance-{number:05d}"
    return Utterance(key, speaker, RATE, lambda: load()["s1"])


def write(
    url: str,
    rate: int = RATE,
    num_shards: int = NUM_SHARDS,
    record: Callable[[int], Mixture | Utterance] | None = None,
) -> shards.Manifest:
    """Write a data set of mixtures, or of what `record` returns for a number."""
    make = record or (lambda number: mixture(number, rate))
    infos = []
    for i in range(num_shards):
        records = [make(i * SAMPLES_PER_SHARD + j) for j in range(SAMPLES_PER_SHARD)]
        infos.append(write_shard(records, url, shards.shard_name("bench", "train", i)))
    return shards.write_manifest(url, "bench", "train", rate, infos)


def crops(url: str) -> Crops:
    return Crops(Dataset(url, noise=True), seed=0, crop_seconds=CROP_SECONDS)


def mixing(url: str) -> DynamicMixing:
    utterances = Dataset(url, num_sources=1)
    return DynamicMixing(utterances, seed=0, num_sources=2, crop_seconds=CROP_SECONDS, noise=url)


def make_batches(feed: Feed, first: int = 0, number: int = 24) -> int:
    """Make `number` batches from position `first` on; return the number of samples."""
    for start in range(first, first + number * BATCH, BATCH):
        positions = range(start, start + BATCH)
        collate([feed.item(p, []) for p in positions], positions, feed.crop_samples)
    return number * BATCH


class Timer:
    """CPU seconds of this thread inside the functions that are wrapped by `__call__`."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            began = time.thread_time()
            result = function(*arguments, **options)
            self.seconds += time.thread_time() - began
            self.calls += 1
            return result

        return call


class Timed:
    """libsndfile, some functions of which are timed."""

    def __init__(self, library: Any, timer: Timer) -> None:
        self._library, self._timer = library, timer

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._library, name)
        self.__dict__[name] = self._timer(found) if name in SNDFILE else found
        return self.__dict__[name]


def gil_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of `work` outside of the functions that let go of the GIL."""
    idle = Timer()
    empty, began = idle(lambda: None), time.thread_time()
    for _ in range(10_000):
        empty()
    overhead = (time.thread_time() - began - idle.seconds) / idle.calls
    timer = Timer()
    with contextlib.ExitStack() as stack:
        for module, names in FREE.items():
            for name in names:
                stack.enter_context(patch.object(module, name, timer(getattr(module, name))))
        stack.enter_context(patch("soundfile._snd", Timed(soundfile._snd, timer)))
        began = time.thread_time()
        work()
        spent = time.thread_time() - began
    return spent - timer.seconds - timer.calls * overhead


def cpu_seconds(work: Callable[[], object]) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began


def cost(make: Callable[[], Feed], again: bool = True) -> dict[str, float]:
    """Minima over `TURNS`; unless `again`, of a fresh feed each time."""
    feed = make()
    num_samples = make_batches(feed)  # opens and hashes the shards
    whole, held = [], []
    for _ in range(TURNS):
        for seconds, measure in ((whole, cpu_seconds), (held, gil_seconds)):
            one = feed if again else make()
            seconds.append(measure(lambda one=one: make_batches(one)))
    cpu, gil = 1000 * min(whole) / num_samples, 1000 * min(held) / num_samples
    return {
        "cpu_ms": round(cpu, 3),
        "gil_ms": round(gil, 3),
        "samples_per_second_and_core": round(1000 / cpu),
        "on_8_cores": round(1000 * min(CORES / cpu, 1 / gil)),
    }


def in_threads(feed: Feed, number: int) -> float:
    """Samples per second of `number` threads that make batches of `feed`."""
    counts = list[int]()
    jobs = [lambda i=i: counts.append(make_batches(feed, 1000 * i)) for i in range(number)]
    threads = [threading.Thread(target=job) for job in jobs]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - began)


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


def epochs(local: str, remote: str | None) -> dict[str, dict[str, Any]]:
    """Speed and CPU seconds of one epoch from a cold start, by way."""
    ways: dict[str, Callable[[], Iterator[torch.Tensor]]] = {
        "webdataset_local": lambda: from_webdataset(local),
        "stream_local_1_thread": lambda: from_stream(local, 1),
        "stream_local_2_threads": lambda: from_stream(local, 2),
    }
    if remote:
        ways["stream_s3_cold_1_thread"] = lambda: from_stream(remote, 1)
        ways["stream_s3_cold_2_threads"] = lambda: from_stream(remote, 2)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            runs[name].append(seconds_of(way))
    found = {}
    for name, times in runs.items():
        clock = statistics.median(clock for clock, _ in times)
        found[name] = {
            "samples_per_second": round(NUM_SHARDS * SAMPLES_PER_SHARD / clock, 1),
            "seconds": [round(clock, 3) for clock, _ in times],
            "cpu_seconds": round(statistics.median(cpu for _, cpu in times), 3),
        }
    return found


def goal(wanted: float, measured: float, at_most: bool = False) -> dict[str, Any]:
    met = measured <= wanted if at_most else measured >= wanted
    return {"goal": round(wanted, 3), "measured": round(measured, 3), "met": met}


def measure(folder: Path) -> dict[str, Any]:
    local, wide, single = (str(folder / name) for name in ("set", "set16", "utterances"))
    manifest = write(local)
    write(wide, 2 * RATE, 2)
    write(single, num_shards=3, record=utterance)
    server, reason = start_s3(folder / "server")
    try:
        if server is not None:
            for path in Path(local).rglob("*.*"):
                place = f"s3://bench/set/{path.relative_to(local)}"
                storage.put_bytes(place, path.read_bytes())
        found = epochs(local, "s3://bench/set" if server is not None else None)
    finally:
        if server is not None:
            server.kill()
    keep_freed_memory()  # as training does
    costs = {
        "crops_8_khz": cost(lambda: crops(local)),
        "crops_16_khz": cost(lambda: crops(wide)),
        "mixing_8_khz": cost(lambda: mixing(single)),
        "mixing_8_khz_first": cost(lambda: mixing(single), again=False),
    }
    feed = crops(local)
    make_batches(feed, 0, NUM_SHARDS * SAMPLES_PER_SHARD // BATCH)  # opens all shards
    speeds = [[in_threads(feed, number) for number in (1, 2)] for _ in range(TURNS)]
    one, two = (max(speed) for speed in zip(*speeds, strict=True))
    main = costs["crops_8_khz"]
    return {
        "samples": manifest.num_samples,
        "shards": len(manifest.shards),
        "megabytes": round(sum(shard.bytes for shard in manifest.shards) / 1e6, 1),
        "mean_seconds_stored": round(3600 * manifest.hours / manifest.num_samples, 2),
        "crop_seconds": CROP_SECONDS,
        "cpus": os.cpu_count(),
        "cost": costs,
        "threads": {"1": round(one), "2": round(two)},
        "epoch": found if server is not None else found | {"stream_s3": f"skipped: {reason}"},
        "goals": {
            "samples/s on 8 cores": goal(GOAL, main["on_8_cores"]),
            "ms of CPU per sample": goal(1000 * CORES / GOAL, main["cpu_ms"], at_most=True),
            "ms under the GIL per sample": goal(1000 / GOAL, main["gil_ms"], at_most=True),
            "speed of 2 threads over 1": goal(1.7, two / one),
        },
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"name": "loader", **measure(Path(folder))}))


if __name__ == "__main__":
    main()
