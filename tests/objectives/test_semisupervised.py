"""SSLM-SS: equation 5 over a step, an estimator that is not trained, and the limit on its gap."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sepdist.data.order import Blend
from sepdist.data.records import Batch
from sepdist.metrics.permutation import best_permutation
from sepdist.metrics.si_snr import pairwise_si_snr, si_snr
from sepdist.models.conv_tasnet import ConvTasNet
from sepdist.objectives.semisupervised import SemiSupervised
from sepdist.objectives.separation import Separation
from tests.support.batches import Fixed, Listener, batch_of, values, voices


class Oracle(nn.Module):
    """An SI-SNR estimator that knows the sources and adds `bias` dB to the truth."""

    def __init__(self, sources: Tensor, bias: float = 0.0) -> None:
        super().__init__()
        self.sources, self.bias = sources, bias

    def forward(self, mixture_BT: Tensor, estimates_BST: Tensor) -> Tensor:
        best_B, _ = best_permutation(pairwise_si_snr(estimates_BST, self.sources))
        return best_B[:, None].expand(estimates_BST.shape[:2]) + self.bias


def objective(estimator: nn.Module | None = None, **options: object) -> SemiSupervised:
    arguments = {
        "epoch_samples": 100,
        "labelled_share": 0.5,
        "estimator": Listener() if estimator is None else estimator,
    }
    return SemiSupervised(**(arguments | options))  # type: ignore[arg-type]


def unlabelled(batch: Batch) -> Batch:
    return dataclasses.replace(batch, sources=None, data_set="unlabelled")


def at(position: int, batch: Batch) -> Batch:
    return dataclasses.replace(batch, positions=torch.arange(position, position + len(batch.ids)))


@pytest.mark.parametrize(
    ("epoch", "expected"), [(0, 0.0), (1, 1 / 300), (75, 0.25), (150, 0.5), (300, 1.0), (900, 1.0)]
)
def test_the_weight_is_the_epoch_over_three_hundred(epoch: int, expected: float) -> None:
    found = objective(epoch_samples=13900)
    assert found.weight(epoch * 13900) == found.weight(epoch * 13900 + 13899) == expected
    assert objective(epoch_samples=13900, max_weight=0.4).weight(epoch * 13900) == min(
        expected, 0.4
    )
    batch = at(epoch * 13900, batch_of(torch.randn(1, 2, 100)))
    for one in (batch, unlabelled(batch)):
        _, metrics = found(Fixed(torch.randn(1, 2, 100)), one)
        assert float(metrics["unsupervised_weight"]) == expected


@pytest.mark.parametrize(("num_virtual_shards", "share"), [(4, 0.5), (8, 0.25), (10, 0.1)])
def test_the_mean_over_a_step_is_equation_5(num_virtual_shards: int, share: float) -> None:
    """In NumPy, from the scores of all items of a step that an even blend has composed."""
    torch.manual_seed(0)
    labelled_units = round(share * 20)
    blend = Blend(0, (labelled_units, 20 - labelled_units), 2, "even")
    estimator, step, f = Listener(), 7, 0.25
    first = step * num_virtual_shards * 2
    trained = objective(estimator, labelled_share=share, epoch_samples=first // 3, ramp_epochs=12)
    losses, true, predicted = [], [], []
    for shard in range(num_virtual_shards):
        position = first + 2 * shard
        sources, estimates = torch.randn(2, 2, 200), torch.randn(2, 2, 200)
        batch = at(position, batch_of(sources))
        labelled = blend.locate(position)[0] == 0
        loss, metrics = trained(Fixed(estimates), batch if labelled else unlabelled(batch))
        losses.append(float(loss.detach()))
        if labelled:
            scores = pairwise_si_snr(estimates.double(), sources.double()).numpy()
            true += [max(one[0, 0] + one[1, 1], one[0, 1] + one[1, 0]) / 2 for one in scores]
            assert values(metrics["si_snr"]).tolist() == pytest.approx(true[-2:], abs=1e-4)
        else:
            with torch.no_grad():
                predicted += estimator(batch.mixture, estimates).double().mean(1).tolist()
            assert values(metrics["predicted_si_snr"]).tolist() == pytest.approx(
                predicted[-2:], abs=1e-5
            )
    assert len(true) == 2 * share * num_virtual_shards
    assert np.mean(losses) == pytest.approx(
        -(1 - f) * np.mean(true) - f * np.mean(predicted), abs=1e-4
    )


def test_the_estimator_is_frozen_without_dropout_and_passes_the_gradient_to_the_separator() -> None:
    torch.manual_seed(0)
    estimator = Listener().train()
    trained = objective(estimator, epoch_samples=1)
    batch, estimates = unlabelled(at(30, batch_of(torch.randn(2, 2, 400)))), torch.randn(2, 2, 400)
    model = Fixed(estimates)
    loss, _ = trained(model, batch)
    loss.backward()
    assert not estimator.training and all(
        p.grad is None and not p.requires_grad for p in estimator.parameters()
    )
    again, _ = trained(Fixed(estimates), batch)
    assert torch.equal(loss.detach(), again.detach()), "no dropout"
    # Oracle: a difference quotient along the gradient, of -f / (1 - p) times the mean prediction.
    direction = model.estimates.grad / model.estimates.grad.norm()
    f = 30 / 300

    def by_hand(shift: float) -> float:
        with torch.no_grad():
            values = estimator.double()(
                batch.mixture.double(), (estimates + shift * direction).double()
            )
        return -f / 0.5 * float(values.mean())

    slope = (by_hand(1e-3) - by_hand(-1e-3)) / 2e-3
    assert slope == pytest.approx(float(model.estimates.grad.norm()), rel=1e-3)


def test_under_autocast_the_estimator_stays_in_fp32() -> None:
    batch, estimates = unlabelled(at(50, batch_of(torch.randn(1, 2, 400)))), torch.randn(1, 2, 400)
    seen = []
    estimator = Listener()
    estimator.conv.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    plain, _ = objective(estimator)(Fixed(estimates), batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, _ = objective(estimator)(Fixed(estimates), batch)
    assert seen == [torch.float32] * 2 and torch.equal(plain.detach(), mixed.detach())


def test_evaluation_measures_true_and_predicted_si_snr_of_the_same_estimates() -> None:
    torch.manual_seed(0)
    sources = torch.randn(3, 2, 500)
    estimates = (sources + 0.3 * torch.randn_like(sources)).flip(1)
    calls = []
    model = Fixed(estimates).eval()
    model.register_forward_hook(lambda *arguments: calls.append(1))
    loss, metrics = objective(Oracle(sources, bias=2.5))(model, batch_of(sources))
    true = si_snr(estimates.flip(1), sources).mean(1)
    assert calls == [1]
    torch.testing.assert_close(values(metrics["si_snr"]), true)
    torch.testing.assert_close(values(metrics["predicted_si_snr"]), true + 2.5)
    torch.testing.assert_close(values(metrics["gap"]), torch.full((3,), 2.5), atol=1e-5, rtol=0)
    supervised, expected = Separation()(model, batch_of(sources))
    assert torch.equal(loss, supervised) and all(
        torch.equal(metrics[name], expected[name]) for name in expected
    )
    assert "unsupervised_weight" not in metrics, (
        "positions of validation are not positions of training"
    )


def test_batches_of_both_kinds_name_the_same_metrics() -> None:
    batch, model = batch_of(torch.randn(2, 2, 200)), Fixed(torch.randn(2, 2, 200))
    found = [objective()(model, one)[1] for one in (batch, unlabelled(batch))]
    floats = [
        {name for name, value in metrics.items() if value.is_floating_point()} for metrics in found
    ]
    assert (
        floats[0] == floats[1] == {"si_snr", "si_snri", "predicted_si_snr", "unsupervised_weight"}
    )
    assert [values(metrics["si_snr"]).numel() for metrics in found] == [2, 0]
    assert [values(metrics["predicted_si_snr"]).numel() for metrics in found] == [0, 2]


def means(gap: float) -> dict[str, float]:
    return {"si_snr": 8.0, "predicted_si_snr": 8.0 + gap, "gap": gap, "score": 8.0}


def test_a_gap_halves_the_weight_while_it_lasts_and_the_weight_recovers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watched = objective(max_gap_db=3.0, on_gap="down-weight")
    factors = []
    for gap in (1.0, 3.5, 4.0, np.nan, 2.9, -7.0, 3.0, 0.0):
        watched.observe(means(gap))
        factors.append(watched.factor)
    assert factors == [1.0, 0.5, 0.25, 0.125, 0.25, 0.5, 1.0, 1.0]
    assert "predicts 11.50 dB where 8.00 dB are true: a gap of 3.50 dB" in caplog.text
    watched.observe(means(9.0))
    resumed = objective(max_gap_db=3.0, on_gap="down-weight")
    resumed.load_state_dict(watched.state_dict())
    assert resumed.weight(15000) == watched.weight(15000) == 0.25 and resumed.stop_reason is None
    for _ in range(30):
        resumed.observe(means(9.0))
    assert resumed.factor == 1 / 64, "so that a bad start can be made good in time"


def test_a_gap_only_warns_or_ends_the_run_where_that_is_asked_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        for watched in (objective(), objective(max_gap_db=3.0)):
            watched.observe(means(3.5))
            assert watched.factor == 1.0 and watched.stop_reason is None
    assert len(caplog.records) == 1, "no limit, no warning"
    watched = objective(max_gap_db=3.0, on_gap="stop")
    watched.observe(means(2.0))
    assert watched.stop_reason is None
    watched.observe(means(3.5))
    assert "predicts 11.50 dB where 8.00 dB are true" in str(watched.stop_reason)
    resumed = objective(max_gap_db=3.0, on_gap="stop")
    resumed.load_state_dict(watched.state_dict())
    assert resumed.stop_reason == watched.stop_reason


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"labelled_share": 1.0}, "labelled_share=1.0"),
        ({"epoch_samples": 0}, "epoch_samples=0"),
        ({"max_weight": 1.5}, "max_weight=1.5"),
        ({"on_gap": "pray"}, "on_gap='pray'"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        objective(**options)


def test_batches_and_estimators_that_do_not_fit_are_refused() -> None:
    batch, model = batch_of(torch.randn(1, 2, 100)), Fixed(torch.randn(1, 2, 100))
    with pytest.raises(ValueError, match="no use for data set 'other'"):
        objective()(model, dataclasses.replace(batch, data_set="other"))
    with pytest.raises(ValueError, match="needs sources"):
        objective()(model, dataclasses.replace(batch, sources=None))

    class OneForAll(nn.Module):
        def forward(self, mixture_BT: Tensor, estimates_BST: Tensor) -> Tensor:
            return estimates_BST.mean((1, 2))[:, None]

    with pytest.raises(ValueError, match=r"gives \(1, 1\) for estimates \(1, 2, 100\)"):
        objective(OneForAll())(model, unlabelled(batch))


def test_sixty_steps_on_a_batch_of_each_kind_learn_both() -> None:
    torch.manual_seed(0)
    labelled, other = batch_of(voices(1, 2, 2000)), batch_of(voices(1, 2, 2000, seed=1))
    trained = objective(Oracle(other.sources), epoch_samples=1)
    batches = [at(150, labelled), at(150, unlabelled(other))]
    model = ConvTasNet(2, 64, 20, 10, 16, 32, 16, num_blocks=4, num_repeats=1, compile=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    before = float(si_snr(other.mixture[:, None], other.sources).mean())
    for _ in range(60):
        results = [trained(model, batch) for batch in batches]
        optimizer.zero_grad()
        (sum(loss for loss, _ in results) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    assert float(values(results[0][1]["si_snri"])) > 6
    assert float(results[1][1]["predicted_si_snr"]) > before + 6


def test_the_lineage_is_the_origin_of_the_estimator() -> None:
    assert objective().lineage() == {}
    estimator = Listener()
    estimator.origin = {"url": "runs/ssqp", "step": 7}  # type: ignore[assignment]
    assert objective(estimator).lineage() == {"estimator": {"url": "runs/ssqp", "step": 7}}


def test_a_model_that_estimates_no_si_snr_is_refused_as_the_estimator() -> None:
    objective().check_model(Fixed(torch.zeros(1)))
    with pytest.raises(ValueError, match=r"objective\.estimator is a Conv1d.*estimator\.url"):
        objective(nn.Conv1d(1, 1, 1)).check_model(Fixed(torch.zeros(1)))
