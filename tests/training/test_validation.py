"""Validation means: silent sources are in none of them, marked and counted at any world size."""

import contextlib
import math
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sepdist.config import ValidationConfig
from sepdist.data import shards
from sepdist.data.dataset import Dataset
from sepdist.data.records import Batch, Mixture
from sepdist.objectives.quality import Quality
from sepdist.objectives.separation import Separation
from sepdist.training import validation
from sepdist.training.engine import StepResult
from sepdist.training.meter import Meter
from sepdist.training.validation import validate
from sepdist.training.world import World
from tests.support.exports import oracle_si_snr
from tests.support.shard_sets import write_shard

RATE = 1000
LATE = (0, 2500, 0, 4000, 1500)  # sample at which the second speaker of each mixture begins


class Leaky(nn.Module):
    """Gives halves of the mixture: the even and the odd samples, each with some of the others."""

    def forward(self, mixture_BT: Tensor) -> Tensor:
        even_T = (torch.arange(mixture_BT.shape[1]) % 2 == 0).float()
        return torch.stack([mixture_BT * (0.1 + even_T), mixture_BT * (1.1 - even_T)], 1)


def members(number: int, late: tuple[int, ...]) -> dict[str, np.ndarray]:
    waves = np.random.default_rng(number).integers(-9000, 9000, (2, 5000)) / 2**15
    waves[1, : late[number]] = 0
    if late[number] > 4500:
        waves[0, :2500] = 0
    return dict(zip(("s1", "s2"), waves.astype(np.float32), strict=True))


def data(url: Path, late: tuple[int, ...] = LATE) -> Dataset:
    records = [
        Mixture(f"m{n}", ("a", "b"), RATE, partial(members, n, late)) for n in range(len(late))
    ]
    info = write_shard(records, url, shards.shard_name("toy", "dev", 0))
    shards.write_manifest(url, "toy", "dev", RATE, [info])
    return Dataset(str(url))


def run(
    dataset: Dataset, seconds: float, objective: Any, model: nn.Module | None = None
) -> dict[str, float]:
    engine: Any = SimpleNamespace(evaluated=model or Leaky(), autocast=contextlib.nullcontext)
    options = ValidationConfig(max_seconds=seconds)
    return validate(engine, objective, dataset, World(0, 1, torch.device("cpu")), options)


def by_hand(dataset: Dataset, seconds: float) -> list[float]:
    """SI-SNR, mean over sources, of each mixture in which both sound: one alone is none."""
    found = []
    for number in range(dataset.manifest.num_samples):
        batch = dataset.full(number, seconds)
        estimates = Leaky()(batch.mixture)[0].numpy()
        tried = []
        for order in ((0, 1), (1, 0)):
            pairs = zip(estimates[list(order)], batch.sources[0].numpy(), strict=True)
            tried.append([oracle_si_snr(e, s) for e, s in pairs if s.any()])
        if len(tried[0]) == 2:
            found.append(max(np.mean(values) for values in tried))
    return found


@pytest.mark.parametrize(("seconds", "num_silent"), [(2.0, 2), (3.0, 1), (1.0, 3), (30.0, 0)])
def test_a_score_is_over_the_sources_that_sound_and_the_others_are_counted(
    seconds: float, num_silent: int, tmp_path: Path
) -> None:
    dataset = data(tmp_path)
    means = run(dataset, seconds, Separation())
    expected = by_hand(dataset, seconds)
    assert means["score"] == means["si_snr"] == pytest.approx(np.mean(expected), abs=1e-3)
    assert means.get("silent_sources", 0) == num_silent
    assert len(expected) == 5 - num_silent
    assert -10 < means["si_snri"] < 10, "the mixture is 80 dB and more above a voice that is alone"
    if num_silent:
        assert means["loss"] > -means["si_snr"] + 5, "as in training, unless skip_silent"
        assert run(dataset, seconds, Separation(skip_silent=True))["loss"] < means["loss"] - 5


def test_a_mixture_whose_sources_are_all_silent_is_in_no_mean(tmp_path: Path) -> None:
    dataset = data(tmp_path, (0, 4800, 0))
    means = run(dataset, 2.0, Separation())
    assert means["silent_sources"] == 2 and len(by_hand(dataset, 2.0)) == 2
    assert means["score"] == pytest.approx(np.mean(by_hand(dataset, 2.0)), abs=1e-3)


@pytest.mark.parametrize("late", [(4800, 4900), (2500, 2100)], ids=["no voice", "one voice"])
def test_nothing_to_score_is_an_error_and_not_a_score(
    late: tuple[int, ...], tmp_path: Path
) -> None:
    dataset = data(tmp_path, late)
    with pytest.raises(ValueError, match=r"validation\.max_seconds=2\.0"):
        run(dataset, 2.0, Separation())
    assert math.isfinite(run(dataset, 5.0, Separation())["score"])


def test_a_broken_model_keeps_its_nan(tmp_path: Path) -> None:
    class Broken(nn.Module):
        def forward(self, mixture_BT: Tensor) -> Tensor:
            return torch.full((1, 2, mixture_BT.shape[1]), torch.nan)

    assert math.isnan(run(data(tmp_path), 2.0, Separation(), Broken())["score"])


def test_a_score_that_is_a_loss_has_no_silent_source_either(tmp_path: Path) -> None:
    class Estimator(nn.Module):
        def forward(self, mixture_BT: Tensor, estimates_BST: Tensor) -> Tensor:
            return torch.zeros(1, 2)

    class Given(Quality):
        """Half of each source beside the other is the estimate."""

        def __call__(self, model: nn.Module, batch: Batch) -> Any:
            sources = batch.sources
            batch.estimates = sources + 0.5 * sources.flip(1) + 0.01 * batch.mixture[:, None].abs()
            return super().__call__(model, batch)

    means = run(data(tmp_path), 2.0, Given(), Estimator())
    assert means["silent_sources"] == 2
    assert means["score"] == -means["loss"] > -45, "two of ten would add 16 dB"


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_that_meet_silence_alone_agree_with_the_others(
    world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks are threads; the sum over them is made here."""
    dataset = data(tmp_path, (0, 4800, 0, 4900))
    alone = run(dataset, 2.0, Separation())
    parts: dict[int, Tensor] = {}
    barrier = threading.Barrier(world_size, timeout=60)

    def summed(values: Tensor, world: World) -> Tensor:
        parts[world.rank] = values
        barrier.wait()
        return torch.stack([parts[rank] for rank in range(world_size)]).sum(0)

    monkeypatch.setattr(validation, "sum_over_world", summed)
    found: dict[int, dict[str, float]] = {}

    def rank(number: int) -> None:
        engine: Any = SimpleNamespace(evaluated=Leaky(), autocast=contextlib.nullcontext)
        world = World(number, world_size, torch.device("cpu"))
        options = ValidationConfig(max_seconds=2.0)
        objective: Any = Separation()
        found[number] = validate(engine, objective, Dataset(dataset.url), world, options)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[number] == alone for number in range(world_size))


def test_the_silent_sources_of_crops_are_counted_from_one_reading_to_the_next() -> None:
    stream: Any = SimpleNamespace(seconds_waited=0.0, num_damaged=0, num_silent=0)
    meter = Meter(stream, World(0, 1, torch.device("cpu")), None)
    found = []
    for counts in ((5, 0, 2), (0, 0), (1, 3)):
        for count in counts:
            stream.num_silent += count
            meter.add(StepResult(1.0, {}, 1.0, True, []))
        found.append(meter.read(1.0)["data/silent_sources"])
    assert found == [2, 0, 4], "the first step of an attempt is not part of a reading"
