"""MixIT: the best division of outputs between two mixtures by brute force; a model that learns."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from sepdist.data.records import Batch
from sepdist.metrics.si_snr import si_snr
from sepdist.models.conv_tasnet import ConvTasNet
from sepdist.objectives.mixit import MixIT
from tests.support.batches import Fixed, batch_of, values, voices


def unlabelled(batch: Batch) -> Batch:
    return dataclasses.replace(batch, sources=None, data_set="unlabelled")


def decibels(error: np.ndarray, energy_of: np.ndarray, max_snr_db: float) -> float:
    energy = (energy_of**2).sum()
    return 10 * np.log10((error**2).sum() + energy * 10 ** (-max_snr_db / 10)) - 10 * np.log10(
        energy
    )


@pytest.mark.parametrize(("num_outputs", "max_snr_db"), [(4, 30.0), (3, 30.0), (4, 5.0)])
def test_each_output_is_given_to_the_mixture_that_makes_both_come_out_best(
    num_outputs: int, max_snr_db: float
) -> None:
    torch.manual_seed(1)
    mixtures = torch.randn(4, 300) * torch.tensor([1.0, 0.2, 0.5, 2.0])[:, None]  # of unequal level
    estimates = torch.randn(2, num_outputs, 300)
    estimates[0, 0] += mixtures[1]
    estimates[1, -1] += mixtures[2]
    batch = dataclasses.replace(batch_of(mixtures[:, None]), sources=None)
    loss, metrics = MixIT(max_snr_db=max_snr_db)(Fixed(estimates), batch)
    waves, outputs = mixtures.double().numpy(), estimates.double().numpy()
    expected = []
    for pair in range(2):
        tried = []
        for division in itertools.product((0, 1), repeat=num_outputs):
            losses = []
            for half in (0, 1):
                own = [outputs[pair, m] for m in range(num_outputs) if division[m] == half]
                mixture = waves[2 * pair + half]
                losses.append(decibels(mixture - sum(own, np.zeros(300)), mixture, max_snr_db))
            tried.append(losses)
        expected += min(tried, key=sum)
    assert len(tried) == 2**num_outputs
    np.testing.assert_allclose(metrics["mixture_snr"].numpy(), -np.array(expected), atol=1e-4)
    assert float(loss.detach()) == pytest.approx(np.mean(expected), abs=1e-4)


def test_the_model_gets_the_sums_of_neighbours_and_every_output_a_gradient() -> None:
    batch = unlabelled(batch_of(torch.randn(4, 2, 100)))
    model, given = Fixed(torch.randn(2, 4, 100)), []
    model.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    MixIT(data_set="unlabelled")(model, batch)[0].backward()
    assert torch.equal(
        given[0],
        torch.stack([batch.mixture[0] + batch.mixture[1], batch.mixture[2] + batch.mixture[3]]),
    )
    assert model.estimates.grad.abs().amax(2).min() > 0


def test_outputs_that_add_up_to_both_mixtures_have_the_highest_snr_that_there_is() -> None:
    batch = batch_of(torch.randn(2, 2, 500))
    sources = batch.sources.flatten(0, 1)[None, [2, 0, 3, 1]]
    loss, metrics = MixIT()(Fixed(sources), batch)
    assert float(loss.detach()) == pytest.approx(-30.0, abs=1e-3)
    assert metrics["mixture_snr"].tolist() == pytest.approx([30.0, 30.0], abs=1e-3)


def test_a_labelled_batch_is_scored_by_pit_against_its_sources_and_silence() -> None:
    torch.manual_seed(2)
    sources = torch.randn(2, 2, 300)
    batch, estimates = batch_of(sources), torch.randn(2, 4, 300) * torch.rand(2, 4, 1)
    estimates[0, 2] += sources[0, 0]
    estimates[1, 1] += sources[1, 1]
    objective = MixIT(data_set="unlabelled", unlabelled_weight=0.25)
    loss, metrics = objective(Fixed(estimates), batch)
    waves, outputs, mixtures = (x.double().numpy() for x in (sources, estimates, batch.mixture))
    expected = []
    for item in range(2):
        totals = []
        for first, second, *others in itertools.permutations(range(4)):
            losses = [
                decibels(waves[item, j] - outputs[item, m], waves[item, j], 30.0)
                for j, m in enumerate((first, second))
            ]
            # Silence: 10 log10 (|estimate|^2 + tau |mixture|^2), relative to the mixture's energy.
            losses += [decibels(outputs[item, m], mixtures[item], 30.0) for m in others]
            totals.append(np.mean(losses))
        expected.append(min(totals))
    assert float(loss.detach()) == pytest.approx(np.mean(expected), abs=1e-4)
    assert metrics["mixture_snr"].numel() == 0 and values(metrics["si_snr"]).shape == (2,)


def test_the_loudest_outputs_are_scored_and_also_the_best_ones() -> None:
    torch.manual_seed(3)
    sources = torch.randn(1, 2, 1000)
    right = (sources + 0.3 * torch.randn_like(sources))[0]
    loud, faint = 5 * torch.randn(1000), 0.01 * torch.randn(1000)
    model = Fixed(torch.stack([faint, right[1], loud, right[0]])[None]).eval()
    batch = batch_of(sources)
    _, metrics = MixIT()(model, batch)
    best = float(si_snr(right, sources[0]).mean())
    louder = right[int(right[1].norm() > right[0].norm())]
    loudest = max(
        float(si_snr(torch.stack(two), sources[0]).mean())
        for two in ((louder, loud), (loud, louder))
    )
    assert float(values(metrics["oracle_si_snr"])) == pytest.approx(best, abs=1e-4)
    assert (
        float(values(metrics["si_snr"])) == pytest.approx(loudest, abs=1e-4) and loudest < best - 10
    )
    before = float(si_snr(batch.mixture, sources[0]).mean())
    assert float(values(metrics["si_snri"])) == pytest.approx(loudest - before, abs=1e-4)


def test_batches_of_both_kinds_name_the_same_metrics_and_the_weight_is_of_the_unlabelled() -> None:
    torch.manual_seed(0)
    batch, model = batch_of(torch.randn(2, 2, 200)), Fixed(torch.randn(1, 4, 200))
    whole, one = MixIT(data_set="unlabelled")(model, unlabelled(batch))
    weighted, other = MixIT(data_set="unlabelled", unlabelled_weight=0.25)(model, unlabelled(batch))
    assert float(weighted.detach()) == pytest.approx(0.25 * float(whole.detach()))
    _, labelled = MixIT(data_set="unlabelled")(Fixed(torch.randn(2, 4, 200)), batch)
    assert one.keys() == other.keys() == labelled.keys()
    assert {name for name, value in one.items() if value.numel()} == {"mixture_snr"}
    assert {name for name, value in labelled.items() if not value.numel()} == {"mixture_snr"}


def test_what_does_not_fit_is_refused_with_what_to_set() -> None:
    batch = batch_of(torch.randn(3, 2, 100))
    with pytest.raises(ValueError, match=r"data\.micro_batch=3 must be even"):
        MixIT()(Fixed(torch.randn(1, 4, 100)), batch)
    with pytest.raises(
        ValueError, match=r"no use for data set 'other', only for \('main', 'more'\)"
    ):
        MixIT(data_set="more")(
            Fixed(torch.randn(1, 4, 100)), dataclasses.replace(batch, data_set="other")
        )
    with pytest.raises(ValueError, match=r"2 outputs, the data 3 sources.*num_speakers=2"):
        MixIT()(Fixed(torch.randn(1, 2, 100)).eval(), batch_of(torch.randn(1, 3, 100)))
    with pytest.raises(ValueError, match="needs sources"):
        MixIT()(Fixed(torch.randn(2, 4, 100)).eval(), dataclasses.replace(batch, sources=None))


def test_silence_and_equal_mixtures_give_a_finite_loss_and_gradient() -> None:
    sources = torch.randn(4, 2, 200)
    sources[1] = 0
    sources[3] = sources[2]
    for estimates in (torch.randn(2, 4, 200), torch.zeros(2, 4, 200)):
        model = Fixed(estimates)
        loss, _ = MixIT()(model, batch_of(sources))
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(model.estimates.grad).all()


def test_forty_steps_without_a_source_put_two_mixtures_together_again() -> None:
    torch.manual_seed(0)
    batch = dataclasses.replace(batch_of(voices(2, 2, 2000)), sources=None)
    model = ConvTasNet(4, 64, 20, 10, 16, 32, 16, num_blocks=4, num_repeats=1, compile=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    objective, snrs = MixIT(), []
    for _ in range(40):
        loss, metrics = objective(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        snrs.append(float(metrics["mixture_snr"].mean()))
    assert snrs[-1] > snrs[0] + 8
