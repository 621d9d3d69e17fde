"""Estimates that another system made: s1/ID.wav, s2/ID.wav or ID_s1.wav, ID_s2.wav in a folder.

est1, spk1 or source1hat are as good as s1, and numbers may start anywhere: scoring permutes.
"""

import re
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from sepdist.audio import find_files, open_sound
from sepdist.inference.scoring import EvaluationError

_SOURCE = r"(?:s|spk|speaker|est|estimate|source)_?\d+(?:hat)?"


def find_estimates(folder: str) -> dict[str, list[Path]]:
    """The audio files below a folder by the id of their mixture, in order."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in find_files(folder):
        name = path.relative_to(folder).as_posix().removesuffix(path.suffix)
        found[re.sub(rf"(?i)(^|/){_SOURCE}/|[_.-]{_SOURCE}$", r"\1", name, count=1)].append(path)
    return found


def read_estimates(id_: str, paths: list[Path], shape: torch.Size, rate: int, cut: bool) -> Tensor:
    """The estimates [S, T] of a mixture with sources of this shape, cut to T where they may be.

    EvaluationError for too few or many files, another rate or length, or several channels.
    """
    waves = torch.zeros(shape)
    if len(paths) != len(waves):
        there = ", ".join(map(str, paths)) or "none"
        raise EvaluationError(f"{id_}: {len(paths)} estimates of {len(waves)} sources ({there})")
    for wave_T, path in zip(waves, paths, strict=True):
        with open_sound(path) as sound:
            size, wanted = sound.frames, len(wave_T)
            if (sound.samplerate, sound.channels) != (rate, 1):
                has = f"{sound.samplerate} Hz and {sound.channels} channel(s)"
                raise EvaluationError(f"{id_}: {path} has {has}; the mixture has {rate} Hz and 1")
            if size < wanted or (size > wanted and not cut):
                wrong = f"too {'short' if size < wanted else 'long'}: {size} samples"
                raise EvaluationError(f"{id_}: {path} is {wrong}, the mixture has {wanted}")
            wave_T[:] = torch.from_numpy(sound.read(wanted, "float32"))
    return waves
