"""Measure the separation of long files beside Asteroid's and SpeechBrain's.

    python -m benchmarks.separation [--minutes 30] [--quick]

Prints one JSON line. A generated recording at 8 kHz is separated into files by: `ours`, windows of
8 s that overlap by 4 s; `asteroid`, its `LambdaOverlapAdd` with the same windows and weights and
`file_separate`; `asteroid_whole`, its `file_separate` of the whole recording at once, which is its
default; and with SepFormer's weights `ours_sepformer` and `speechbrain_whole`, its `separate_file`,
which knows no windows. The two without windows, and SepFormer, get the first minutes only, because
their memory grows with the recording. The Conv-TasNet is the small one, SepFormer has 2 of its 8
layers per path, so that the benchmark ends in minutes.

Each way runs in a process of its own with one thread. `real_time` is its CPU seconds per second of
audio, without loading the model and (ours) compiling it on a first window; `peak_mib` the largest
resident size; `growth_mib` its part that came with the recording; `growth_at_30_minutes` what that
would be if it grew in proportion.

Peers: those of benchmarks/evaluation.py, and julius.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import scipy.signal
import soundfile
import torch
from torch import nn

from benchmarks.peers import export_with_peer, stand_in_for_torchaudio

RATE, WINDOW = 8000, 64000
WAYS = ("ours", "asteroid", "asteroid_whole", "ours_sepformer", "speechbrain_whole")


def write_recording(path: Path, minutes: float) -> None:
    """Two voices of speech's spectrum, each for seconds at a time, written second by second."""
    draw, state, level = np.random.default_rng(0), np.zeros((2, 2)), np.zeros((2, 1))
    with soundfile.SoundFile(path, "w", RATE, 1, "PCM_16") as file:
        for second in range(int(60 * minutes)):
            if second % 2 == 0:
                level = draw.choice([0.0, 0.005, 0.01], (2, 1))
            noise = draw.standard_normal((2, RATE)) * level
            waves, state = scipy.signal.lfilter([1], [1, -1.6, 0.8], noise, zi=state)
            file.write(np.clip(waves.sum(0), -0.9, 0.9))


def prepare(way: str, folder: Path) -> Callable[[Path], Any]:
    """Load a model and return a function that separates a recording into `folder`."""
    preset = "sepformer" if "sepformer" in way or "speechbrain" in way else "conv_tasnet_small"
    changes = {"num_layers": 2} if preset == "sepformer" else {}
    if way.startswith("ours"):
        export_with_peer(preset, folder / "model", peer_wanted=False, **changes)
        import sepdist
        from sepdist.allocator import keep_freed_memory

        keep_freed_memory()  # as `sepdist separate` does
        compiled = preset != "sepformer"
        separator = sepdist.load(folder / "model", device="cpu", compile=compiled)
        separator(np.random.default_rng(0).standard_normal(WINDOW), RATE)
        return lambda recording: separator.file(recording, folder)
    peer = export_with_peer(preset, folder / "model", **changes)
    assert peer is not None
    return of_asteroid(way, peer, folder) if "asteroid" in way else of_speechbrain(peer, folder)


def of_asteroid(way: str, peer: nn.Module, folder: Path) -> Callable[[Path], Any]:
    from asteroid.dsp.overlap_add import LambdaOverlapAdd
    from asteroid.separate import file_separate

    peer.sample_rate = RATE
    model: Any = peer if way == "asteroid_whole" else LambdaOverlapAdd(peer, 2, WINDOW, WINDOW // 2)
    return lambda recording: file_separate(model, str(recording), str(folder))


def of_speechbrain(peer: nn.Module, folder: Path) -> Callable[[Path], Any]:
    stand_in_for_torchaudio()
    from speechbrain.inference.separation import SepformerSeparation

    parts = SimpleNamespace(encoder=peer.encoder, masknet=peer.masknet, decoder=peer.decoder)
    like = SimpleNamespace(device="cpu", mods=parts)
    like.hparams = SimpleNamespace(num_spks=2, sample_rate=RATE)
    like.separate_batch = lambda mix: SepformerSeparation.separate_batch(like, mix)

    def separate(recording: Path) -> None:
        with torch.no_grad():
            estimates = SepformerSeparation.separate_file(like, str(recording))
        for i, wave in enumerate(estimates[0].T.numpy(), start=1):
            soundfile.write(folder / f"s{i}.wav", wave, RATE)

    return separate


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_one(way: str, recording: Path, seconds: float) -> dict[str, float]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        separate = prepare(way, Path(folder))
        before, began = peak_mib(), time.process_time()
        separate(recording)
        took = time.process_time() - began
    return {
        "minutes": seconds / 60,
        "real_time": round(took / seconds, 4),
        "peak_mib": round(peak_mib(), 1),
        "growth_mib": round(peak_mib() - before, 1),
    }


def in_child(way: str, recording: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.separation", "--way", way, str(recording)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"missing": (done.stderr.strip().splitlines() or [str(done.returncode)])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--quick", action="store_true", help="2 minutes instead of 30")
    parser.add_argument("--way", nargs=2, help=argparse.SUPPRESS)  # what in_child runs
    given = parser.parse_args()
    if given.way:
        seconds = soundfile.info(given.way[1]).duration
        print(json.dumps(run_one(given.way[0], Path(given.way[1]), seconds)))
        return
    minutes = 2.0 if given.quick else given.minutes
    of_way = dict.fromkeys(WAYS, minutes) | {"asteroid_whole": min(2.0, minutes)}
    of_way |= dict.fromkeys(("ours_sepformer", "speechbrain_whole"), min(0.5, minutes))
    report: dict[str, Any] = {"name": "separation", "minutes": minutes, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        for way, length in of_way.items():
            path = Path(folder) / f"{length}.wav"
            if not path.exists():
                write_recording(path, length)
            report[way] = in_child(way, path)
            if "whole" in way and "missing" not in report[way]:
                report[way]["growth_at_30_minutes"] = report[way]["growth_mib"] * 30 / length
    report["goals"] = goals_of(report)
    print(json.dumps(report))


def goals_of(report: dict[str, Any]) -> dict[str, Any]:
    goals = {"ours: MiB of growth with the recording": (64.0, report["ours"]["growth_mib"], False)}
    for mine, theirs, factor in (
        ("ours", "asteroid", 2.0),
        ("ours_sepformer", "speechbrain_whole", 1.0),
    ):
        if "missing" not in report[theirs]:
            ratio = report[theirs]["real_time"] / report[mine]["real_time"]
            goals[f"{mine}: times the speed of {theirs}"] = (factor, round(ratio, 2), True)
    return {
        what: {"goal": goal, "measured": found, "met": found >= goal if more else found <= goal}
        for what, (goal, found, more) in goals.items()
    }


if __name__ == "__main__":
    main()
