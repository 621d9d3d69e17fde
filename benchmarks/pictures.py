r"""Draw the two pictures of the README; the results are committed in docs/figures/.

    python -m benchmarks.pictures voices demo/evaluation/listening/0/mixture.wav \
        demo/separated/mixture_s1.wav demo/separated/mixture_s2.wav
    python -m benchmarks.pictures killed

voices: spectrograms of a recording above those of its separated voices (after `make demo`).

killed: the loss of a run on two Ray workers that is killed twenty times, ten times a worker and
ten times the command, all by SIGKILL, over the loss of the same run in one process that nobody
disturbs. Losses and weights must have the same bits, or nothing is drawn. Takes about ten minutes
on two cores.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from matplotlib.figure import Figure

from sepdist.plotting import COLOURS, decibel_spectrogram

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs" / "figures"
NUM_COLOURS = 48  # of a picture: a third of the bytes
RANGE_DB = 50.0  # of the spectrograms
PATIENCE = 900.0  # seconds, for a busy machine
# The demo's model and rate; short crops and frequent checkpoints, for a run of minutes.
SETTINGS = [
    "model.compile=false",
    "data.crop_seconds=1.0",
    "data.micro_batch=1",
    "data.num_virtual_shards=4",
    "validation.every_steps=200",
    "validation.num_mixtures=4",
    "validation.num_listening=0",
    "training.checkpoint_every=10",
    "training.log_every=1",
]


def voices(files: Sequence[str]) -> Figure:
    """Spectrograms of a recording and of its separated voices, from audio files."""
    waves, rates = zip(*map(soundfile.read, files), strict=True)
    rate = rates[0]
    names = ["the recording", *(f"voice {k}" for k in range(1, len(waves)))]
    figure = Figure((10, 3.5), dpi=100, layout="constrained", facecolor="white")
    panels: Any = figure.subplots(len(waves), 1, sharex=True, sharey=True)
    for axes, name, wave in zip(panels, names, waves, strict=True):
        axes.imshow(
            decibel_spectrogram(wave, rate),
            origin="lower",
            aspect="auto",
            extent=(0.0, len(wave) / rate, 0.0, rate / 2000),
            vmin=-RANGE_DB,
            vmax=0.0,
            cmap="magma",
        )
        axes.set_title(name, loc="left", fontsize=12, fontweight="bold")
        axes.set_yticks([0, 2, 4])
    panels[1].set_ylabel("kHz", fontsize=11)
    panels[-1].set_xlabel("seconds", fontsize=11)
    return figure


def run_and_kill(num_kills: int, num_steps: int, seed: int) -> dict[str, Any]:
    """Losses by step of both runs, equal by assertion, and the steps of the kills by kind."""
    from benchmarks.chaos import audit, make_data
    from tests.support.disturb import Run, left_alone
    from tests.support.runs import final_hash, history

    chance = random.Random(seed)
    kinds = ["worker", "command"] * (num_kills // 2)
    chance.shuffle(kinds)
    due = sorted(chance.sample(range(20, num_steps - 20, 8), num_kills))
    marks: dict[str, list[int]] = {"worker": [], "command": []}
    with tempfile.TemporaryDirectory() as name:
        data = make_data(Path(name, "data"), 240)
        losses, weights = left_alone(data, Path(name, "alone"), num_steps, SETTINGS)
        workers = "cluster.num_workers=2"
        run = Run(data, Path(name, "run"), workers, settings=SETTINGS, steps=num_steps)
        try:
            for step, kind in zip(due, kinds, strict=True):
                run.until_step(step, PATIENCE)
                marks[kind].append(run.step())
                if kind == "worker":
                    run.seconds_to_next_step(lambda: chance.choice(run.workers()).kill(), PATIENCE)
                else:
                    run.seconds_to_next_step(lambda: (run.kill_driver(), run.start()), PATIENCE)
                print(f"{kind} killed at step {marks[kind][-1]}", file=sys.stderr, flush=True)
            run.finish(PATIENCE)
        finally:
            run.end()
        disturbed, audited = history(run.run_dir), audit(str(run.run_dir))
        assert disturbed == losses and final_hash(run.run_dir) == weights
        assert audited.num_lost == audited.num_repeated == 0
    return {"alone": list(losses.values()), "killed": list(disturbed.values()), "kills": marks}


def killed(found: dict[str, Any]) -> Figure:
    """Both losses, averaged over ten steps, with a mark at every kill."""
    figure = Figure((10, 4.0), dpi=100, layout="constrained", facecolor="white")
    axes: Any = figure.subplots()
    marks = found["kills"]
    num_steps = len(found["alone"]) // 10 * 10
    steps = np.arange(10, num_steps + 1, 10)
    left, right = (
        np.reshape(found[name][:num_steps], (-1, 10)).mean(1) for name in ("alone", "killed")
    )
    num_kills = sum(map(len, marks.values()))
    axes.plot(steps, left, color="#f2b27a", linewidth=7, label="left alone, one process")
    name = f"killed {num_kills} times, two Ray workers"
    axes.plot(steps, right, color=COLOURS[0], linewidth=1.8, label=name)
    top = max(left.max(), right.max())
    for kind, sign in (("worker", "v"), ("command", "X")):
        axes.plot(
            marks[kind],
            np.full(len(marks[kind]), top + 0.06 * (top - left.min())),
            sign,
            color="#b3202a",
            markersize=8,
            linestyle="none",
            label=f"SIGKILL to {'a worker' if kind == 'worker' else 'the command'}",
        )
    for step in sorted([*marks["worker"], *marks["command"]]):
        axes.axvline(step, color="#b3202a", alpha=0.18, linewidth=1)
    axes.set_xlabel("step", fontsize=11)
    axes.set_ylabel("loss (-SI-SNR in dB), mean of 10 steps", fontsize=11)
    axes.set_xlim(0, num_steps + 5)
    axes.legend(loc="center right", fontsize=11, edgecolor="none", framealpha=0.9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def save(figure: Figure, name: str) -> None:
    """Write a PNG with a palette to docs/figures/."""
    import io

    from PIL import Image

    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    path = FIGURES / name
    Image.open(stream).convert("RGB").quantize(NUM_COLOURS, dither=Image.Dither.NONE).save(
        path, optimize=True
    )
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes")


def main(arguments: Sequence[str] | None = None) -> None:
    """Make one of the pictures."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pictures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("picture", choices=("voices", "killed"))
    add("files", nargs="*", help="for voices: the recording, then its voices")
    numbers = "for killed: losses of an earlier call, or where to keep them"
    add("--numbers", type=Path, default=Path("killed.json"), help=numbers)
    add("--kills", type=int, default=20, help="an even number")
    add("--steps", type=int, default=500)
    add("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if given.picture == "voices":
        save(voices(given.files), "voices.png")
    else:
        if not given.numbers.exists():
            found = run_and_kill(given.kills, given.steps, given.seed)
            given.numbers.write_text(json.dumps(found))
        save(killed(json.loads(given.numbers.read_text())), "killed.png")


if __name__ == "__main__":
    main()
