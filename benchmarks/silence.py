"""Measure how exclusive the outputs of separators are: what pleases an SI-SNR estimator.

    python -m benchmarks.silence --data data/judge_dev --num 100 MODEL [MODEL ...]

Prints one JSON line. Of each model, means over the first `num` mixtures of two speakers: `si_snr`
of the better order; `correlation` of the two outputs with each other; `silent`, the share of 10 ms
frames that are 40 dB or more below the loudest of their output.

A guided training whose estimate rises while its SI-SNR falls moves each sound to one output as a
whole (docs/results.md): run it on the model before and the one after.
"""

import argparse
import itertools
import json
from typing import Any

import numpy as np
import torch

import sepdist
from benchmarks.recordings import mean_si_snr
from sepdist.corpora.stored import Stored
from sepdist.inference.separator import Separator

FRAMES_PER_SECOND, FLOOR_DB = 100, -40


def silent_share(outputs: np.ndarray, size: int) -> float:
    """Of outputs [S, T], frames of `size` samples that are `FLOOR_DB` below the loudest one."""
    frames = outputs[:, : outputs.shape[1] // size * size].reshape(len(outputs), -1, size)
    levels = 10 * np.log10(np.mean(frames**2, axis=2) + 1e-20)
    return float(np.mean(levels <= levels.max(axis=1, keepdims=True) + FLOOR_DB))


def measure(separator: Separator, data: str, num: int) -> dict[str, Any]:
    rows = []
    for record in itertools.islice(Stored(data, False, "~/.cache/sepdist").records("test"), num):
        members = record.load()
        sources = np.stack([members[name] for name in ("s1", "s2")]).astype(np.float32)
        outputs = np.asarray(separator(sources.sum(0), record.sample_rate))
        scores = [mean_si_snr(outputs, sources, exchanged) for exchanged in (False, True)]
        share = silent_share(outputs, record.sample_rate // FRAMES_PER_SECOND)
        rows.append((max(scores), np.corrcoef(*outputs)[0, 1], share))
    names = ("si_snr", "correlation", "silent")
    means = dict(zip(names, np.round(np.mean(rows, axis=0), 4).tolist(), strict=True))
    return means | {"num": len(rows)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--data", required=True)
    parser.add_argument("--num", type=int, default=100)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        model: measure(sepdist.load(model, device="cpu"), given.data, given.num)
        for model in given.models
    }
    print(json.dumps({"name": "silence", "models": found}))


if __name__ == "__main__":
    main()
