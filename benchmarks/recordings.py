"""Measure what pauses, DC, hum and low levels of a recording do to its separation.

    python -m benchmarks.recordings --model demo/runs/finetune --data demo/data/test [--num 16]
        [--parts pauses,disturbances,levels,rates]

Prints one JSON line. A recording is 4 stretches of 3.6 to 8.4 s in which two speakers of `data`
talk at once, and pauses between them of 3, 6 or 12 s (within 10 %), over white noise. It is
separated with the windows of `sepdist separate`, `before` without the second hearing of the speech
around pauses and without the removal of DC and hum, `after` with both. `si_snr` is the mean over
recordings and speakers of the whole recording, with one order of the outputs; `exchanges` is how
many stretches have another best order than the one before; `told` counts the times
in warnings; `forwards` is how many inputs the model got. Of `levels` the recording is 60 dB
quieter, as floats, and the outputs are files of 16 bits or of those that are the default. Of
`rates` it is resampled to another rate before it is separated, and the outputs back.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

import sepdist
from sepdist import audio
from sepdist.corpora.stored import Stored
from sepdist.inference import separator as module
from sepdist.inference.separator import Separator
from sepdist.inference.stitching import Pauses

RATE, LEVEL = 8000, 0.05


class NoPauses(Pauses):
    """Leaves every order to the overlap of the windows, as before pauses were bridged."""

    def bridged(self, window: np.ndarray) -> None:
        return None


class Kept(Pauses):
    last: Pauses

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        Kept.last = self


def voices_of(data: str) -> dict[str, list[np.ndarray]]:
    """The utterances of each speaker of a data set, at one level."""
    found: dict[str, list[np.ndarray]] = {}
    for record in Stored(data, False, "~/.cache/sepdist").records("test"):
        members = record.load()
        for name, speaker in zip(("s1", "s2"), record.speakers, strict=True):
            wave = np.asarray(members[name], np.float64)
            found.setdefault(speaker, []).append(LEVEL * wave / np.sqrt(np.mean(wave**2)))
    return found


def make(
    voices: dict[str, list[np.ndarray]], pause: float, floor_db: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, list[slice]]:
    """Sources [2, T], mixture [T] and where in it the stretches are."""
    speakers = rng.choice(sorted(voices), 2, replace=False)
    lines = [itertools.cycle(rng.permutation(len(voices[one]))) for one in speakers]
    parts, stretches, at = [], [], 0
    for number in range(4):
        size = int(RATE * rng.uniform(3.6, 8.4))
        both = np.zeros((2, size))
        for row, speaker, line in zip(both, speakers, lines, strict=True):
            said = np.zeros(0)
            while said.size < size:
                said = np.concatenate([said, voices[speaker][next(line)]])
            row[:] = said[:size]
        quiet = int(RATE * pause * rng.uniform(0.9, 1.1)) if number < 3 else 0
        parts += [both, np.zeros((2, quiet))]
        stretches.append(slice(at, at + size))
        at += size + quiet
    sources = np.concatenate(parts, axis=1)
    noise = 10 ** (floor_db / 20) * rng.standard_normal(sources.shape[1])
    return sources, (sources.sum(0) + noise).astype(np.float32), stretches


def si_snr(estimate: np.ndarray, source: np.ndarray) -> float:
    r = np.corrcoef(estimate, source)[0, 1]
    return float(10 * np.log10(r**2 / (1 - r**2 + 1e-12)))


def mean_si_snr(estimates: np.ndarray, sources: np.ndarray, exchanged: bool) -> float:
    pairs = zip(estimates[::-1] if exchanged else estimates, sources, strict=True)
    return float(np.mean([si_snr(estimate, source) for estimate, source in pairs]))


def score(
    estimates: np.ndarray, sources: np.ndarray, stretches: list[slice]
) -> tuple[float, list[bool]]:
    """SI-SNR of the whole, and which stretches have another order than the one before."""
    whole = max(mean_si_snr(estimates, sources, one) for one in (False, True))
    orders = [
        int(np.argmax([mean_si_snr(estimates[:, s], sources[:, s], one) for one in (False, True)]))
        for s in stretches
    ]
    return whole, [one != other for one, other in itertools.pairwise(orders)]


def measure(
    separator: Separator, recordings: list[Any], add: Callable[[np.ndarray], Any], *, old: bool
) -> dict[str, Any]:
    """Separate mixtures to which `add` adds a disturbance."""
    module.Pauses = NoPauses if old else Kept  # type: ignore[misc]
    cleaned, inputs, told = module.cleaned, 0, 0
    if old:
        module.cleaned = lambda wave_T, _: wave_T

    def count(*_: Any) -> None:
        nonlocal inputs
        inputs += 1

    hook, scores, exchanges = separator.model.register_forward_hook(count), [], 0
    for sources, mixture, stretches in recordings:
        time = np.arange(mixture.size) / RATE
        estimates = separator((mixture + add(time)).astype(np.float32), RATE)
        whole, changed = score(estimates, sources, stretches)
        scores.append(whole)
        exchanges += sum(changed)
        told += 0 if old else len(Kept.last.unsure)
    hook.remove()
    module.Pauses, module.cleaned = Pauses, cleaned  # type: ignore[misc]
    found: dict[str, Any] = {"si_snr": round(float(np.mean(scores)), 2), "exchanges": exchanges}
    return found | {"forwards": inputs, "told": told}


def hum(mains: float, level: float) -> Callable[[np.ndarray], np.ndarray]:
    def add(time: np.ndarray) -> np.ndarray:
        wave = sum(np.sin(2 * np.pi * mains * k * time + k) / k for k in range(1, 8))
        return level * wave / np.sqrt(np.mean(wave**2))

    return add


def quiet(separator: Separator, recordings: list[Any]) -> dict[str, float]:
    """SI-SNR of files of recordings 60 dB quieter, by the subtype of the outputs."""
    means: dict[str, list[float]] = {"PCM_16": [], "": []}
    for sources, mixture, stretches in recordings:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "in.wav"
            soundfile.write(path, mixture * 1e-3, RATE, subtype="FLOAT")
            for subtype, values in means.items():
                outputs = separator.file(path, folder, subtype=subtype).outputs
                estimates = np.stack([soundfile.read(one)[0] for one in outputs])
                values.append(score(estimates + 1e-12, sources, stretches)[0])
    return {name or "default": round(float(np.mean(one)), 2) for name, one in means.items()}


def at_rate(separator: Separator, recordings: list[Any], rate: int) -> float:
    """SI-SNR of recordings that come at another rate."""
    scores = []
    for sources, mixture, stretches in recordings:
        estimates = separator(audio.resample(mixture, RATE, rate), rate)
        back = np.stack([audio.resample(np.asarray(one), rate, RATE) for one in estimates])
        back = back[:, : mixture.size] + 1e-12
        scores.append(score(back, sources[:, : back.shape[1]], stretches)[0])
    return round(float(np.mean(scores)), 2)


DISTURBANCES: dict[str, Callable[[np.ndarray], Any]] = {
    "none": lambda time: 0 * time,
    "DC of 0.1": lambda time: 0.1 + 0 * time,
    "DC of 0.02": lambda time: 0.02 + 0 * time,
    "drift of 0.1 in 20 s": lambda time: 0.1 * np.sin(0.1 * np.pi * time),
    "hum of 50.03 Hz at -3 dB": hum(50.03, LEVEL),
    "hum of 60 Hz at -13 dB": hum(60, 0.3 * LEVEL),
    "hum of 50 Hz at -23 dB": hum(50, 0.1 * LEVEL),
}


def pauses(separator: Separator, voices: Any, num: int) -> dict[str, Any]:
    """Recordings with pauses of several lengths over noise of several levels."""
    found = {}
    for pause, floor_db in ((3, -80), (6, -300), (6, -80), (12, -80), (12, -45)):
        rng = np.random.default_rng(7)
        recordings = [make(voices, pause, floor_db, rng) for _ in range(num)]
        found[f"{pause} s, {floor_db} dB"] = {
            when: measure(separator, recordings, DISTURBANCES["none"], old=when == "before")
            for when in ("before", "after")
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--num", type=int, default=16)
    parser.add_argument("--parts", default="pauses,disturbances,levels,rates")
    given = parser.parse_args()
    torch.set_num_threads(1)
    separator, voices = sepdist.load(given.model, device="cpu"), voices_of(given.data)
    recordings = [make(voices, 1, -80, np.random.default_rng(seed)) for seed in range(given.num)]
    parts: dict[str, Callable[[], Any]] = {
        "pauses": lambda: pauses(separator, voices, given.num),
        "disturbances": lambda: {
            name: {
                when: measure(separator, recordings, add, old=when == "before")["si_snr"]
                for when in ("before", "after")
            }
            for name, add in DISTURBANCES.items()
        },
        "levels": lambda: quiet(separator, recordings),
        "rates": lambda: {
            rate: at_rate(separator, recordings, rate) for rate in (8000, 16000, 44100, 48000)
        },
    }
    report = {name: parts[name]() for name in given.parts.split(",")}
    print(json.dumps({"name": "recordings", "num": given.num} | report))


if __name__ == "__main__":
    main()
