"""The experiments of the field on trees like those of their corpora: shards, two steps, scores."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sepdist import config
from sepdist.config import ShardConfig
from sepdist.data.sharding import write_data_set
from sepdist.data.shards import read_manifest
from sepdist.reporting import read_metrics
from tests.corpora.conftest import signal, write
from tests.support.runs import TINY, frozen, history, loop

NUM_SAMPLES = 6000


def libri_tree(root: Path, num_speakers: int, rate: int) -> None:
    """What LibriMix's script generates of four mixtures each of train-360 and dev."""
    base = root / f"wav{rate // 1000}k" / "min"
    members = [*(f"s{i}" for i in range(1, num_speakers + 1)), "noise"]
    columns = [*(f"source_{i}_path" for i in range(1, num_speakers + 1)), "noise_path"]
    for split in ("train-360", "dev"):
        rows = [",".join(["mixture_ID", *columns])]
        for number in range(4):
            name = "_".join(f"{10 * number + i}-1-0" for i in range(num_speakers))
            waves = {m: signal(10 * number + i, NUM_SAMPLES) for i, m in enumerate(members)}
            for member, wave in {**waves, "mix_both": sum(waves.values())}.items():
                write(base / split / member / f"{name}.wav", np.asarray(wave), rate)
            rows.append(",".join([name, *(f"/gone/{member}/{name}.wav" for member in members)]))
        (base / "metadata").mkdir(exist_ok=True)
        (base / "metadata" / f"mixture_{split}_mix_both.csv").write_text("\n".join(rows) + "\n")


def wham_tree(root: Path, rooms: tuple[str, ...]) -> None:
    """What WHAM!'s script (no rooms) or WHAMR!'s generates of four mixtures each of tr and cv."""
    for split in ("tr", "cv"):
        base = root / "wav8k" / "min" / split
        for number in range(4):
            name = f"40na01{number}x_1.5_01xo031a_-1.5.wav"
            noise = signal(90 + number, NUM_SAMPLES)
            write(base / "noise" / name, noise, 8000)
            for shift, room in enumerate(rooms):
                s1, s2 = (np.roll(signal(2 * number + i, NUM_SAMPLES), 9 * shift) for i in (0, 1))
                folders = {"s1": s1, "s2": s2, "mix_clean": s1 + s2, "mix_both": s1 + s2 + noise}
                for folder, wave in folders.items():
                    write(base / f"{folder}{room}" / name, wave, 8000)


@pytest.mark.slow  # 20 s
@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("libri3mix", ("s1", "s2", "s3", "noise")),
        ("libri2mix_noisy", ("s1", "s2", "noise")),
        ("libri2mix_16k", ("s1", "s2", "noise")),
        ("wham_noisy", ("s1", "s2", "noise")),
        ("whamr", ("s1", "s2", "mix")),
    ],
)
def test_an_experiment_trains_on_a_tree_like_that_of_its_corpus(
    tmp_path: Path, name: str, members: tuple[str, ...]
) -> None:
    rate = 16000 if name.endswith("16k") else 8000
    options: dict[str, Any] = {"root": str(tmp_path / "tree"), "task": "sep_noisy"}
    if name.startswith("libri"):
        options = {"generated": options["root"], "num_speakers": int(name[5])}
        libri_tree(tmp_path / "tree", options["num_speakers"], rate)
    elif name == "whamr":
        options["task"] = "sep_noisy_reverb"
        wham_tree(tmp_path / "tree", ("_anechoic", "_reverb"))
    else:
        wham_tree(tmp_path / "tree", ("",))
    group = "librimix" if name.startswith("libri") else "wham"
    node = yaml.safe_load((Path(config.config_dir()) / "corpus" / f"{group}.yaml").read_text())
    splits = (
        {"train": "train-360", "dev": "dev"}
        if group == "librimix"
        else {"train": "tr", "dev": "cv"}
    )
    places = {purpose: str(tmp_path / purpose) for purpose in splits}
    for purpose, split in splits.items():
        corpus = {**node, **options, "sample_rate": rate}
        write_data_set(ShardConfig(corpus=corpus, split=split, output=places[purpose]))
    assert read_manifest(places["train"]).members == members
    steps = [
        "training.max_steps=2",
        "validation.every_steps=2",
        "scale=mini",
        "schedule.warmup_steps=1",
    ]
    run = tmp_path / "run"
    loop(frozen(places, run, *steps, settings=TINY, experiment=f"field/{name}"))
    assert list(history(run)) == [1, 2] and all(map(math.isfinite, history(run).values()))
    scored = [row for row in read_metrics(str(run)) if "validation/si_snri" in row]
    assert len(scored) == 1 and math.isfinite(scored[0]["validation/si_snri"])
