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
from sepdist.corpora.files import sample_key
from sepdist.data.records import Batch
from sepdist.inference.scoring import NO_LIMIT_SECONDS, EvaluationError, open_dataset

_SOURCE = r"(?:s|spk|speaker|est|estimate|source)_?\d+(?:hat)?"


def find_estimates(folder: str) -> dict[str, list[Path]]:
    """The audio files below a local folder by the id that a corpus gives their mixture."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in find_files(folder):
        name = path.relative_to(folder).as_posix().removesuffix(path.suffix)
        name = re.sub(rf"(?i)(^|/){_SOURCE}/|[_.-]{_SOURCE}$", r"\1", name, count=1)
        found[sample_key(name)].append(path)
    return found


def estimates_reader(cfg: EvaluateConfig) -> Callable[[int], tuple[Tensor, Batch, Tensor]]:
    """`scoring.mixture_separator` for the files in `cfg.estimates`, cut as the mixtures are."""
    dataset, files = open_dataset(cfg), find_estimates(str(cfg.estimates))
    wanted = f"{dataset.manifest.sample_rate} Hz, 1 channel(s)"

    def read(number: int) -> tuple[Tensor, Batch, Tensor]:
        batch = dataset.full(number, cfg.max_seconds or NO_LIMIT_SECONDS)
        assert batch.sources is not None
        waves, paths, name = batch.sources[0].clone(), files.get(batch.ids[0], []), batch.ids[0]
        if len(paths) != len(waves):
            there = ", ".join(map(str, paths)) or "none"
            raise EvaluationError(f"{name}: {len(paths)} of {len(waves)} estimates ({there})")
        for wave_T, path in zip(waves, paths, strict=True):
            with open_sound(path) as sound:
                has = f"{sound.samplerate} Hz, {sound.channels} channel(s)"
                extra = sound.frames - len(wave_T)
                if has != wanted or extra < 0 or (extra and not cfg.max_seconds):
                    own = f"{has}, {sound.frames} samples"
                    raise EvaluationError(f"{name}: {path} has {own}, not {wanted}, {len(wave_T)}")
                wave_T[:] = torch.from_numpy(sound.read(len(wave_T), "float32"))
        return waves, batch, waves

    return read
