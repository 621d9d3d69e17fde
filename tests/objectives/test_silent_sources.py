"""A silent source is in no score of any objective, and in the loss only as before or as asked.

Item 0 of a batch has a sound in every source, item 1 not in its second, item 2 in none.
"""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sepdist.data.records import Batch
from sepdist.objectives.enhancement import Enhancement
from sepdist.objectives.fixed_permutations import FixedPermutations
from sepdist.objectives.mixit import MixIT
from sepdist.objectives.multitask import MultiTask
from sepdist.objectives.quality import Quality
from sepdist.objectives.semisupervised import SemiSupervised
from sepdist.objectives.separation import Separation
from sepdist.objectives.soft_pit import SoftPit
from tests.support.batches import Fixed, batch_of, values, voices
from tests.support.exports import oracle_si_snr

SILENT = 80.0  # dB, the loss of a silent source


def batch_with(offset: float = 0.0, num_sources: int = 2) -> Batch:
    sources = voices(3, num_sources, 1600)
    sources[1, 1] = offset
    sources[2] = offset
    noise = 0.01 * torch.randn(3, 1600, generator=torch.Generator().manual_seed(5))
    return batch_of(sources, noise)


def estimates_of(batch: Batch, num_outputs: int = 2) -> Tensor:
    """Noisy sources, the first two exchanged, and quiet noise in other outputs."""
    assert batch.sources is not None
    count, num_sources, size = batch.sources.shape
    noise = torch.randn(count, num_outputs, size, generator=torch.Generator().manual_seed(6))
    estimates = 0.01 * noise
    estimates[:, :num_sources] += batch.sources
    estimates[:, :2] = estimates[:, [1, 0]]
    return estimates


def scores(batch: Batch, estimates: Tensor, swapped: bool = True) -> tuple[list, list]:
    """SI-SNR by the angle, of estimates and of the mixture, of each source; None if silent."""
    after, before = [], []
    for item, sources in enumerate(batch.sources.double().numpy()):  # type: ignore[union-attr]
        order = [1, 0, *range(2, len(sources))] if swapped else [*range(len(sources))]
        pairs = [(estimates[item, order[j]], batch.mixture[item], s) for j, s in enumerate(sources)]
        for found, number in ((after, 0), (before, 1)):
            values = [
                None if np.ptp(pair[2]) == 0 else oracle_si_snr(pair[number].numpy(), pair[2])
                for pair in pairs
            ]
            found.append(values)
    return after, before


def means(values: list[list]) -> list[float]:
    kept = [[value for value in item if value is not None] for item in values]
    return [float(np.mean(item)) for item in kept if item]


@pytest.mark.parametrize("offset", [0.0, 0.3])
@pytest.mark.parametrize("num_sources", [2, 3, 4])
def test_scores_are_means_over_the_sources_that_sound(offset: float, num_sources: int) -> None:
    batch = batch_with(offset, num_sources)
    estimates = estimates_of(batch, num_sources)
    after, before = scores(batch, estimates)
    _, metrics = Separation()(Fixed(estimates), batch)
    assert len(means(after)) == 2
    np.testing.assert_allclose(values(metrics["si_snr"]), means(after), atol=2e-3)
    gains = np.subtract(means(after), means(before))
    np.testing.assert_allclose(values(metrics["si_snri"]), gains, atol=2e-3)
    assert metrics["permutation"].shape == (3,) and metrics["permutation"][0] > 0
    assert not values(metrics["si_snr"]).requires_grad


@pytest.mark.parametrize("num_sources", [2, 3])
def test_a_voice_alone_without_noise_is_in_no_score(num_sources: int) -> None:
    """Of item 1 one or two voices sound; a mixture that is its only voice has 100 dB and more."""
    batch = batch_with(num_sources=num_sources)
    batch.mixture = batch.sources.sum(1)
    estimates = estimates_of(batch, num_sources)
    after, before = scores(batch, estimates)
    _, metrics = Separation()(Fixed(estimates), batch)
    scored = num_sources - 1
    np.testing.assert_allclose(values(metrics["si_snr"]), means(after)[:scored], atol=2e-3)
    gains = np.subtract(means(after), means(before))[:scored]
    np.testing.assert_allclose(values(metrics["si_snri"]), gains, atol=2e-3)
    alone = batch_of(voices(2, 1, 800))  # but a data set of one speaker is what was asked for
    _, metrics = Separation()(Fixed(alone.sources + 0.1 * torch.randn(2, 1, 800)), alone)
    assert values(metrics["si_snr"]).shape == (2,)


def test_the_loss_is_as_ever_unless_silent_sources_are_to_be_left_out() -> None:
    batch = batch_with()
    estimates = estimates_of(batch)
    after, _ = scores(batch, estimates)
    [[first, second], [only, _], _] = after
    usual, left_out = Fixed(estimates), Fixed(estimates)
    loss, _ = Separation()(usual, batch)
    both, all_silent = -(first + second) / 2, SILENT
    expected = (both + (SILENT - only) / 2 + all_silent) / 3
    assert float(loss.detach()) == pytest.approx(expected, abs=2e-3)
    loss.backward()
    loss, _ = Separation(skip_silent=True)(left_out, batch)
    assert float(loss.detach()) == pytest.approx((both - only) / 2, abs=2e-3)
    loss.backward()
    usual_grad, grad = usual.estimates.grad, left_out.estimates.grad
    assert not grad[1, 0].any() and not grad[2].any(), "the outputs that match silence"
    # A mean over 2 items and 1 source instead of 3 and 2.
    torch.testing.assert_close(grad[0], usual_grad[0] * 3 / 2)
    torch.testing.assert_close(grad[1, 1], usual_grad[1, 1] * 3)


@pytest.mark.parametrize("num_sources", [1, 2, 3])
@pytest.mark.parametrize("threshold", [None, -15.0])
def test_without_silence_the_option_changes_no_bit(
    num_sources: int, threshold: float | None
) -> None:
    batch = batch_of(voices(3, num_sources, 900), 0.1 * torch.randn(3, 900))
    results = []
    for skip_silent in (False, True):
        model = Fixed(torch.randn(3, num_sources, 900, generator=torch.Generator().manual_seed(1)))
        loss, metrics = Separation(threshold, skip_silent)(model, batch)
        loss.backward()
        results.append([loss.detach(), model.estimates.grad, *metrics.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("threshold", [None, -30.0])
def test_a_batch_of_silence_has_no_score_and_a_loss_of_zero_without_gradient(
    threshold: float | None,
) -> None:
    batch = batch_of(torch.zeros(2, 2, 500), torch.randn(2, 500))
    model = Fixed(torch.randn(2, 2, 500))
    loss, metrics = Separation(threshold, skip_silent=True)(model, batch)
    loss.backward()
    assert float(loss.detach()) == 0.0 and not model.estimates.grad.any()
    assert values(metrics["si_snr"]).numel() == values(metrics["si_snri"]).numel() == 0


def test_a_broken_estimate_is_not_taken_for_silence() -> None:
    batch = batch_with()
    estimates = estimates_of(batch)
    estimates[1] = torch.nan
    loss, metrics = Separation(skip_silent=True)(Fixed(estimates), batch)
    assert torch.isnan(loss) and torch.isnan(values(metrics["si_snr"])).tolist() == [False, True]


@pytest.mark.parametrize("name", ["soft PIT", "fixed", "multi-task"])
def test_other_objectives_have_the_scores_of_separation(name: str, tmp_path: Path) -> None:
    batch = batch_with()
    estimates = estimates_of(batch)
    _, expected = Separation()(Fixed(estimates), batch)
    if name == "multi-task":
        estimates = torch.cat([estimates, torch.randn(3, 1, 1600)], 1)
        objective = MultiTask()
    elif name == "fixed":
        table = tmp_path / "table.csv"
        table.write_text("id,permutation\nutterance0,1\nutterance1,1\nutterance2,0\n")
        objective = FixedPermutations(str(table))
    else:
        objective = SoftPit(2.0)
    _, metrics = objective(Fixed(estimates), batch)
    for key in ("si_snr", "si_snri"):
        assert torch.equal(metrics[key], expected[key])


def test_enhancement_scores_the_items_whose_voice_sounds() -> None:
    batch = batch_with()
    estimates = estimates_of(batch)[:, 1:]
    first = dataclasses.replace(batch, sources=batch.sources[:, :1])
    after, before = scores(first, estimates, swapped=False)
    _, metrics = Enhancement()(Fixed(estimates), batch)
    np.testing.assert_allclose(values(metrics["si_snr"]), means(after), atol=2e-3)
    gains = np.subtract(means(after), means(before))
    np.testing.assert_allclose(values(metrics["si_snri"]), gains, atol=2e-3)


class Says(nn.Module):
    """Predicts 5 dB for every estimate."""

    estimates_si_snr = True

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(5.0))

    def forward(self, mixture_BT: Tensor, estimates_BST: Tensor) -> Tensor:
        return self.value.expand(estimates_BST.shape[:2])


def test_an_estimator_does_not_learn_80_db_below_for_silence() -> None:
    batch = batch_with()
    batch.estimates = estimates_of(batch)[:, [1, 0]]
    after, _ = scores(batch, batch.estimates, swapped=False)
    known = [value for item in after for value in item if value is not None]
    loss, metrics = Quality()(Says(), batch)
    assert float(loss.detach()) == pytest.approx(np.mean(np.abs(np.array(known) - 5)), abs=2e-3)
    np.testing.assert_allclose(values(metrics["true_si_snr"]), means(after), atol=2e-3)
    assert (
        values(metrics["mae"]).shape
        == values(metrics["bias"]).shape
        == values(metrics["predicted"]).shape
        == (2,)
    )
    batch.sources = torch.zeros(3, 2, 1600)
    model = Says()
    loss, metrics = Quality()(model, batch)
    loss.backward()
    assert (
        float(loss.detach()) == float(model.value.grad) == 0 and values(metrics["mae"]).numel() == 0
    )


def test_the_gap_of_an_estimator_is_that_of_mixtures_without_silence() -> None:
    batch = batch_with()
    model = Fixed(estimates_of(batch)).eval()
    objective = SemiSupervised(Says(), epoch_samples=100, labelled_share=0.5, max_gap_db=1.0)
    _, metrics = objective(model, batch)
    _, expected = Separation()(model, batch)
    assert (
        torch.equal(values(metrics["si_snr"]), values(expected["si_snr"]))
        and len(values(metrics["si_snr"])) == 2
    )
    assert values(metrics["gap"]).tolist() == pytest.approx(
        [5 - float(values(expected["si_snr"])[0])], abs=1e-4
    )
    assert values(metrics["predicted_si_snr"]).tolist() == [5.0]
    objective.observe({"loss": 3.0, "si_snr": 4.0})  # no mixture has a gap
    assert objective.factor == 1.0 and objective.stop_reason is None


def test_mixit_takes_a_silent_source_for_one_of_its_silences() -> None:
    """The losses by hand, of the best of all assignments of four outputs to two references."""
    batch = batch_with()
    estimates = estimates_of(batch, 4)
    loss, metrics = MixIT(data_set="unlabelled")(Fixed(estimates), batch)
    waves, outputs = batch.sources.double().numpy(), estimates.double().numpy()
    mixtures = batch.mixture.double().numpy()

    def decibels(error: np.ndarray, reference: np.ndarray) -> float:
        energy = (reference**2).sum()
        return 10 * np.log10(((error**2).sum() + energy / 1000) / energy)

    expected = []
    for item in range(3):
        table = np.array([[decibels(output, mixtures[item])] * 4 for output in outputs[item]])
        for j, source in enumerate(waves[item]):
            if source.any():
                table[:, j] = [decibels(source - output, source) for output in outputs[item]]
        orders = itertools.permutations(range(4))
        totals = [sum(table[i, j] for j, i in enumerate(order)) for order in orders]
        expected.append(min(totals) / 4)
    assert float(loss.detach()) == pytest.approx(np.mean(expected), abs=1e-3)
    _, separation = Separation()(Fixed(estimates[:, :2]), batch)
    np.testing.assert_allclose(
        values(metrics["oracle_si_snr"]), values(separation["si_snr"]), atol=1e-4
    )
    assert values(metrics["si_snr"]).shape == values(metrics["si_snri"]).shape == (2,)
    assert "permutation" not in metrics
