"""Estimates that another system made: s1/ID.wav, s2/ID.wav or ID_s1.wav, ID_s2.wav in a folder.

est1, spk1 or source1hat are as good as s1, and numbers may start anywhere: scoring permutes.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sepdist.audio import find_files, open_sound
from sepdist.config import EvaluateConfig
from sepdist.data.records import Batch
from sepdist.inference.scoring import NO_LIMIT_SECONDS, EvaluationError, open_dataset

_SOURCE = r"(?:s|spk|speaker|est|estimate|source)_?\d+(?:hat)?"


def find_estimates(folder: str) -> dict[str, list[Path]]:
    """The audio files below a folder by the id of their mixture, in order."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in find_files(folder):
        name = path.relative_to(folder).as_posix().removesuffix(path.suffix)
        found[re.sub(rf"(?i)(^|/){_SOURCE}/|[_.-]{_SOURCE}$", r"\1", name, count=1)].append(path)
    return found


def estimates_reader(cfg: EvaluateConfig) -> Callable[[int], tuple[Tensor, Batch, Tensor]]:
    """`scoring.mixture_separator` with estimates from `cfg.estimates`, which must be as the data.

    They are cut where `max_seconds` cuts the mixture.
    """
    dataset, files = open_dataset(cfg), find_estimates(str(cfg.estimates))
    rate = dataset.manifest.sample_rate

    def read(number: int) -> tuple[Tensor, Batch, Tensor]:
        batch = dataset.full(number, cfg.max_seconds or NO_LIMIT_SECONDS)
        assert batch.sources is not None
        waves, paths = torch.zeros_like(batch.sources[0]), files.get(batch.ids[0], [])
        num_samples = waves.shape[1]
        if len(paths) != len(waves):
            there = f"{len(paths)} estimates of {len(waves)} sources"
            raise EvaluationError(f"{batch.ids[0]}: {there} ({', '.join(map(str, paths))})")
        for wave_T, path in zip(waves, paths, strict=True):
            with open_sound(path) as sound:
                has = f"{sound.samplerate} Hz, {sound.channels} channel(s), {sound.frames} samples"
                fits = (
                    sound.frames >= num_samples if cfg.max_seconds else sound.frames == num_samples
                )
                if (sound.samplerate, sound.channels) != (rate, 1) or not fits:
                    wanted = f"{rate} Hz, 1 channel and {num_samples} samples"
                    raise EvaluationError(f"{batch.ids[0]}: {path} has {has}, not {wanted}")
                wave_T[:] = torch.from_numpy(sound.read(num_samples, "float32"))
        return waves, batch, waves

    return read
