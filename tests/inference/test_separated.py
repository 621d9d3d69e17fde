"""Data sets made of data sets: subsets, mixtures alone, and a separator's estimates."""

from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from sepdist import slots
from sepdist.config import ConfigError, ShardConfig
from sepdist.data import shards
from sepdist.data.dataset import Dataset
from sepdist.data.members import DataError
from sepdist.data.sharding import subset_of, write_data_set
from tests.support.exports import oracle_si_snr, write_export


def write(output: Path, corpus: dict[str, object], **changes: object) -> shards.Manifest:
    cfg = ShardConfig(
        corpus=corpus, split="derived", output=str(output), samples_per_shard=3, **changes
    )
    return write_data_set(cfg, Console(quiet=True)).manifest


def stored(data: str, **changes: object) -> dict[str, object]:
    return {"_target_": "sepdist.corpora.stored.Stored", "data": data} | changes


def separated(data: str, model: str | Path, **changes: object) -> dict[str, object]:
    target = "sepdist.inference.separated.Separated"
    return {"_target_": target, "data": data, "model": str(model)} | changes


def test_parts_are_disjoint_and_together_everything_in_its_order() -> None:
    numbers = list(range(1000))
    tenth, rest = subset_of(numbers, 0.0, 0.1), subset_of(numbers, 0.1, 1.0)
    assert len(tenth) == 100 and sorted(tenth + rest) == numbers
    assert tenth == sorted(tenth) and rest == sorted(rest)
    assert 300 < np.mean(tenth) < 700  # not the first ones
    assert set(tenth) < set(subset_of(numbers, 0.0, 0.5))


def test_a_subset_of_a_stored_data_set_has_its_samples_to_the_bit_and_their_texts(
    tiny_data, tmp_path: Path
) -> None:
    first = write(tmp_path / "a", stored(tiny_data["train"]), subset=[0.0, 0.25])
    rest = write(tmp_path / "b", stored(tiny_data["train"]), subset=[0.25, 1.0])
    whole = Dataset(tiny_data["train"], noise=True)
    assert first.num_samples + rest.num_samples == whole.manifest.num_samples
    originals = {
        whole.full(i, 99.0).ids[0]: (whole.full(i, 99.0), whole.metadata(i)) for i in range(10)
    }
    found = {}
    for place in ("a", "b"):
        part = Dataset(str(tmp_path / place), noise=True)
        for i in range(part.manifest.num_samples):
            batch = part.full(i, 99.0)
            original, facts = originals[batch.ids[0]]
            assert torch.equal(batch.mixture, original.mixture)
            assert torch.equal(batch.sources, original.sources)
            assert part.metadata(i) == facts and facts["texts"]
            found[batch.ids[0]] = place
    assert len(found) == whole.manifest.num_samples


def test_mixtures_alone_say_nothing_of_who_speaks(tiny_data, tmp_path: Path) -> None:
    manifest = write(tmp_path, stored(tiny_data["dev"]), mixtures_only=True)
    assert manifest.members == ("mix",) and manifest.speakers == ()
    whole, alone = Dataset(tiny_data["dev"], noise=True), Dataset(str(tmp_path))
    for i in range(manifest.num_samples):
        batch = alone.full(i, 99.0)
        assert batch.sources is None and batch.noise is None
        torch.testing.assert_close(batch.mixture, whole.full(i, 99.0).mixture, atol=1e-7, rtol=0)
        assert not alone.metadata(i)["texts"]


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.xdist_group("ray"))])
def test_separated_data_has_the_models_estimates_in_the_order_of_the_sources(
    tiny_data, tmp_path: Path, num_workers: int
) -> None:
    model, data = write_export(tmp_path / "model"), str(tmp_path / "data")
    corpus = separated(tiny_data["dev"], tmp_path / "model")
    manifest = write(tmp_path / "data", corpus, num_workers=num_workers)
    assert manifest.members == ("s1", "s2", "noise", "e1", "e2") and shards.verify(data) == []
    before, after = (Dataset(url, noise=True) for url in (tiny_data["dev"], data))
    for i in range(manifest.num_samples):
        batch, mixture = after.full(i, 99.0), before.full(i, 99.0).mixture
        assert torch.equal(batch.mixture, mixture)
        with torch.no_grad():
            raw = model(mixture)[0].numpy()
        sources, estimates = batch.sources[0].numpy(), batch.estimates[0].numpy()
        straight = sum(oracle_si_snr(raw[j], sources[j]) for j in (0, 1))
        crossed = sum(oracle_si_snr(raw[1 - j], sources[j]) for j in (0, 1))
        order = (0, 1) if straight >= crossed else (1, 0)
        for j in (0, 1):
            assert abs(np.corrcoef(estimates[j], raw[order[j]])[0, 1]) > 0.9999
            expected = oracle_si_snr(estimates[j], sources[j])
            assert after.metadata(i)["si_snr"][j] == pytest.approx(expected, abs=2e-3)
        assert np.abs(estimates).max() <= 0.9901


def test_estimates_of_another_model_at_the_same_place_are_made_again(
    tiny_data, tmp_path: Path
) -> None:
    model, output = write_export(tmp_path / "model"), tmp_path / "data"
    corpus = separated(tiny_data["dev"], tmp_path / "model")
    write(output, corpus, limit=1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(
                0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
            )
    save_file(model.state_dict(), str(tmp_path / "model" / "model.safetensors"))
    with pytest.raises(DataError, match=r"was made of other inputs: corpus\.identity was"):
        write(output, corpus, limit=1)
    (output / "manifest.json").unlink()
    write(output, corpus, limit=1)
    batch = Dataset(str(output), noise=True).full(0, 99.0)
    with torch.no_grad():
        raw = model(batch.mixture)[0].numpy()
    likeness = np.abs(np.corrcoef(raw, batch.estimates[0].numpy())[:2, 2:])
    assert (likeness.max(0) > 0.9999).all()


def test_without_noise_the_mixture_that_is_stored_or_separated_is_the_sum_of_its_sources(
    tiny_data, tmp_path: Path
) -> None:
    model, clean = write_export(tmp_path / "model"), Dataset(tiny_data["dev"])
    corpus = separated(tiny_data["dev"], tmp_path / "model")
    mixtures = stored(tiny_data["dev"], noise=False)
    assert write(tmp_path / "alone", mixtures, mixtures_only=True).members == ("mix",)
    written = write(tmp_path / "separated", corpus | {"noise": False})
    assert written.members == ("s1", "s2", "e1", "e2")
    alone, after = Dataset(str(tmp_path / "alone")), Dataset(str(tmp_path / "separated"))
    for i in range(clean.manifest.num_samples):
        mixture = clean.full(i, 99.0).mixture
        torch.testing.assert_close(alone.full(i, 99.0).mixture, mixture, atol=1e-7, rtol=0)
        assert torch.equal(after.full(i, 99.0).mixture, mixture)
        with torch.no_grad():
            raw = model(mixture)[0].numpy()
        likeness = np.abs(np.corrcoef(raw, after.full(i, 99.0).estimates[0].numpy())[:2, 2:])
        assert (likeness.max(0) > 0.9999).all()
    write(tmp_path / "noisy", corpus)
    message = r"noisy: its estimates were made of mixtures with noise.*corpus\.noise=false"
    with pytest.raises(DataError, match=message):
        Dataset(str(tmp_path / "noisy"))
    with pytest.raises(ConfigError, match=r"corpus\.noise=false: .*alone has mixtures as they are"):
        slots.build("corpus", stored(str(tmp_path / "alone"), noise=False))


def test_what_cannot_be_separated_is_refused_by_name(tiny_data, tmp_path: Path) -> None:
    write(tmp_path / "mixtures", stored(tiny_data["dev"]), mixtures_only=True)
    message = "mixtures has mixtures only; without sources no SI-SNR is known"
    with pytest.raises(ConfigError, match=message):
        slots.build("corpus", separated(str(tmp_path / "mixtures"), "runs/none"))
    with pytest.raises(ConfigError, match=r"subset=\[0\.5, 0\.5\]"):
        write(tmp_path / "x", stored(tiny_data["dev"]), subset=[0.5, 0.5])


def test_a_model_of_another_rate_and_one_that_separates_nothing_are_refused(
    tiny_data, tmp_path: Path
) -> None:
    write_export(tmp_path / "wide", rate=16000)
    with pytest.raises(ValueError, match="wide works at 16000 Hz, the data has 8000 Hz"):
        write(tmp_path / "a", separated(tiny_data["dev"], tmp_path / "wide"))
    write_export(tmp_path / "estimator")
    node = {"_target_": "sepdist.models.sisnr_cnn.SISNREstimator"}
    save_file(slots.build("model", node).state_dict(), tmp_path / "estimator/model.safetensors")
    card = f"model: {node}\nsample_rate: 8000\n"
    (tmp_path / "estimator/model.yaml").write_text(card)
    with pytest.raises(ValueError, match="estimates SI-SNR and separates nothing"):
        write(tmp_path / "b", separated(tiny_data["dev"], tmp_path / "estimator"))
