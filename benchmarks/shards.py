"""Measure the speed of writing shards of the demo corpus, in this process and in 2 Ray workers.

    python -m benchmarks.shards

Prints one JSON line. Each figure is the median of 3 runs into an empty folder, without the start of
Ray.
"""

import json
import os
import statistics
import tempfile
from pathlib import Path

from sepdist.cluster import connected
from sepdist.config import ShardConfig
from sepdist.data.sharding import write_data_set

NUM_SHARDS = 8
SAMPLES_PER_SHARD = 25
REPEATS = 3


def measure(num_workers: int) -> dict[str, float]:
    """Medians of shards per minute and seconds of audio (of s1, s2 and noise) per second."""
    corpus = {
        "_target_": "sepdist.corpora.demo.DemoCorpus",
        "num_train": NUM_SHARDS * SAMPLES_PER_SHARD,
    }
    shards_per_minute, audio_per_second = [], []
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory() as folder:
            written = write_data_set(
                ShardConfig(
                    corpus=corpus,
                    split="train",
                    output=str(Path(folder) / "train"),
                    samples_per_shard=SAMPLES_PER_SHARD,
                    num_workers=num_workers,
                )
            )
        manifest = written.manifest
        shards_per_minute.append(60 * len(manifest.shards) / written.seconds)
        audio_per_second.append(3600 * manifest.hours * len(manifest.members) / written.seconds)
    return {
        "shards_per_minute": round(statistics.median(shards_per_minute), 1),
        "audio_seconds_per_second": round(statistics.median(audio_per_second), 1),
    }


def main() -> None:
    """Print the JSON line."""
    in_process = measure(0)
    with connected(2):
        in_workers = measure(2)
    print(
        json.dumps(
            {
                "benchmark": "shards",
                "corpus": "demo",
                "samples_per_shard": SAMPLES_PER_SHARD,
                "shards": NUM_SHARDS,
                "cpus": os.cpu_count(),
                "repeats": REPEATS,
                "in_process": in_process,
                "two_ray_workers": in_workers,
            }
        )
    )


if __name__ == "__main__":
    main()
