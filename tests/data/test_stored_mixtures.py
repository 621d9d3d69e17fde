"""Format 2: a mixture beside sources of which it is not the sum, as a room makes it."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sepdist.config import ConfigError, EvaluateConfig, ShardConfig
from sepdist.corpora.stored import Stored
from sepdist.data import shards
from sepdist.data.crops import Crops
from sepdist.data.dataset import Dataset, collate
from sepdist.data.dynamic import DynamicMixing
from sepdist.data.members import DataError
from sepdist.data.records import Mixture
from sepdist.data.sharding import load_mixture
from sepdist.inference import scoring
from sepdist.inference.export import Export
from sepdist.objectives.enhancement import Enhancement
from sepdist.objectives.mixit import MixIT
from sepdist.objectives.multitask import MultiTask
from sepdist.objectives.separation import Separation
from tests.support.shard_sets import write_shard

RATE = 8000
LENGTH = 5200
NOISY = ("s1", "s2", "noise", "mix")


def pcm(number: int, name: str) -> np.ndarray:
    """Members of sample `number` as 16-bit integers; an echo makes `mix` no sum."""
    if name == "mix":
        total = sum(pcm(number, one) for one in ("s1", "s2", "noise"))
        return total + np.roll(total, 37) // 2
    random = np.random.default_rng([number, *name.encode()])
    return random.integers(-4000, 4000, LENGTH + 100 * number)


def waves(number: int, names: Sequence[str]) -> dict[str, np.ndarray]:
    return {name: (pcm(number, name) / 2**15).astype(np.float32) for name in names}


def write(url: Path, names: Sequence[str] = NOISY, num_samples: int = 3) -> str:
    speakers = [name for name in names if name[0] == "s"]
    records = [
        Mixture(f"u{i}", tuple(f"{name}-{i}" for name in speakers), RATE, partial(waves, i, names))
        for i in range(num_samples)
    ]
    info = write_shard(records, url, shards.shard_name("toy", "train", 0))
    shards.write_manifest(url, "toy", "train", RATE, [info])
    return str(url)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("noisy") / "set")


def as_float(number: int, name: str) -> np.ndarray:
    return (pcm(number, name) / 2**15).astype(np.float32)


def test_a_batch_holds_the_mixture_as_it_is_stored_and_the_sources_as_targets(noisy: str) -> None:
    manifest = shards.read_manifest(noisy)
    assert (manifest.format_version, manifest.members) == (2, NOISY)
    assert shards.verify(noisy) == []
    batch = Dataset(noisy, num_sources=2, noise=True).full(1, 1e6)
    assert batch.sources is not None and batch.noise is not None
    np.testing.assert_array_equal(batch.mixture[0], as_float(1, "mix"))
    np.testing.assert_array_equal(batch.sources[0, 1], as_float(1, "s2"))
    np.testing.assert_array_equal(batch.noise[0], as_float(1, "noise"))
    assert batch.estimates is None and batch.sources.shape[1] == 2


def test_a_crop_takes_the_same_place_from_mixture_and_sources(noisy: str) -> None:
    feed = Crops(Dataset(noisy, noise=True), seed=1, crop_seconds=0.25)
    for position in range(6):
        item = feed.item(position, [])
        number, crop = int(item.id.removeprefix("u")), item.members["s1"]
        whole = as_float(number, "s1")
        start = next(i for i in range(whole.size) if np.array_equal(whole[i : i + 2000], crop))
        for name in NOISY:
            own = as_float(number, name)[start : start + 2000]
            np.testing.assert_array_equal(item.members[name], own)


def test_without_a_mixture_beside_sources_a_set_stays_of_format_1(tmp_path: Path) -> None:
    for names in (("s1", "s2"), ("s1", "s2", "noise"), ("mix",)):
        url = tmp_path / "-".join(names)
        write(url, names)
        manifest = shards.read_manifest(url)
        index = json.loads((url / "index" / "toy-train-000000.json").read_text())
        assert manifest.format_version == index["format_version"] == 1


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_a_manifest_whose_format_does_not_fit_its_members_is_refused(
    before: int, after: int, tmp_path: Path
) -> None:
    write(tmp_path, NOISY if before == 2 else NOISY[:3])
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": after}))
    with pytest.raises(DataError, match=f"is of format {after}, this version of sepdist reads 1"):
        shards.read_manifest(tmp_path)


def test_nothing_can_be_left_out_of_a_stored_mixture_or_added(noisy: str, tmp_path: Path) -> None:
    for options in ({"noise": False}, {"num_sources": 1, "noise": True}, {"num_sources": 3}):
        with pytest.raises(DataError, match=r"stored \(mix\).* set num_sources=2 and noise=true"):
            Dataset(noisy, **options)  # type: ignore[arg-type]
    dry = write(tmp_path / "dry", ("s1", "mix"), 1)
    with pytest.raises(DataError, match="set num_sources=1 and noise=false"):
        Dataset(dry, num_sources=1, noise=True)
    with pytest.raises(ConfigError, match=r"corpus\.noise=false: .* has mixtures as they are"):
        Stored(noisy, noise=False)
    assert Dataset(dry, num_sources=1).members == ("s1", "mix")


def test_one_source_in_a_room_can_be_evaluated(tmp_path: Path) -> None:
    """Of a sum it could not: the mixture would be the source itself."""
    url, export = write(tmp_path / "room", ("s1", "mix"), 1), Export(nn.Identity(), RATE, {}, "")
    cfg = EvaluateConfig("model", url, "output", num_sources=1)
    assert scoring.check_data(cfg, export)[1] == [{"id": "u0"}]
    cfg.data = write(tmp_path / "clean", ("s1",), 1)
    with pytest.raises(ConfigError, match="the mixture is the source itself"):
        scoring.check_data(cfg, export)


def test_a_subset_keeps_the_stored_mixture_and_unlabelled_data_is_that_mixture(noisy: str) -> None:
    record = list(Stored(noisy).records("any"))[2]
    found = record.load()
    assert set(found) == set(NOISY)
    for name, wave in found.items():
        np.testing.assert_array_equal(wave, as_float(2, name))
    alone = load_mixture(record)
    assert list(alone) == ["mix"]
    np.testing.assert_array_equal(alone["mix"], as_float(2, "mix"))


def test_dynamic_mixing_takes_the_sources_of_such_a_set_and_never_its_mixtures(noisy: str) -> None:
    dataset = Dataset(noisy, members=["s1"])
    assert dataset.members == ("s1",)
    mixing = DynamicMixing(dataset, seed=1, num_sources=2, crop_seconds=0.25, speeds=[1.0])
    item = mixing.item(0, [])
    assert list(item.members) == ["s1", "s2"]
    assert all(name.startswith("s1-") for name in item.speakers)


class _Outputs(nn.Module):
    """Outputs are shares of the mixture, so a loss and its gradient are known by hand."""

    def __init__(self, num_speakers: int) -> None:
        super().__init__()
        self.num_speakers = num_speakers
        self.shares = nn.Parameter(torch.linspace(0.2, 0.8, num_speakers))

    def forward(self, mixture_BT: torch.Tensor) -> torch.Tensor:
        return mixture_BT[:, None] * self.shares[:, None]


def test_objectives_score_a_stored_mixture_against_its_targets(noisy: str) -> None:
    """No objective takes the rest of a mixture for what is left after subtracting the sources."""
    dataset = Dataset(noisy, noise=True)
    items = [dataset.item(number, 0.5) for number in range(2)]
    batch, si_snrs = collate(items, range(2)), []
    for number in range(2):
        mix = as_float(number, "mix")[:4000].astype(np.float64)
        mix -= mix.mean()
        own = []
        for name in ("s1", "s2"):
            target = as_float(number, name)[:4000].astype(np.float64)
            target -= target.mean()
            kept = (mix @ target) / (target @ target) * target
            own.append(10 * np.log10((kept @ kept) / ((mix - kept) @ (mix - kept))))
        si_snrs.append(own)
    wanted = np.mean(si_snrs, axis=1)
    loss, found = Separation()(_Outputs(2), batch)
    assert float(loss.detach()) == pytest.approx(-wanted.mean(), abs=2e-3)
    np.testing.assert_allclose(found["si_snri"][0].detach(), [0, 0], atol=1e-3)
    loss, found = MultiTask()(_Outputs(3), batch)
    assert float(loss.detach()) == pytest.approx(-wanted.mean(), abs=2e-3)
    loss, found = Enhancement()(_Outputs(1), batch)
    assert float(loss.detach()) == pytest.approx(-np.mean([one for one, _ in si_snrs]), abs=2e-3)
    loss, found = MixIT()(_Outputs(4).eval(), batch)
    assert torch.isfinite(loss) and float(found["si_snri"][0].abs().max()) < 1e-3
    # Unlabelled, the two mixtures of a pair are those that are stored: outputs that are both of
    # them, all of one and none of the other, restore them up to the bound of 30 dB.
    pair = [torch.from_numpy(as_float(number, "mix")[:4000]) for number in range(2)]
    perfect = _Outputs(4).train()
    perfect.forward = lambda mixture: torch.stack([*pair, 0 * pair[0], 0 * pair[0]])[None]  # type: ignore[method-assign]
    loss, _ = MixIT()(perfect, batch)
    assert float(loss.detach()) == pytest.approx(-30, abs=0.01)


def test_the_writer_of_a_whole_corpus_writes_format_2(noisy: str, tmp_path: Path) -> None:
    from sepdist.data.sharding import write_data_set

    node = {"_target_": "sepdist.corpora.stored.Stored", "data": noisy}
    cfg = ShardConfig(corpus=node, split="all", output=str(tmp_path / "copy"))
    written = write_data_set(cfg)
    assert written.manifest.members == NOISY and written.manifest.format_version == 2
    assert write_data_set(cfg).num_kept == 1, "the second start keeps it"
