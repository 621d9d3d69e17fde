"""Multi-task: each batch trains its own task's outputs, and one model learns both at once."""

import dataclasses

import pytest
import torch

from sepdist.data.records import Batch
from sepdist.metrics.si_snr import si_snr
from sepdist.models.conv_tasnet import ConvTasNet
from sepdist.objectives.multitask import MultiTask
from tests.support.batches import Fixed, batch_of, values, voices


def of(data_set: str, batch: Batch) -> Batch:
    return dataclasses.replace(batch, data_set=data_set)


@pytest.mark.parametrize("num_speakers", [2, 3])
def test_a_batch_of_the_main_set_is_scored_by_pit_over_all_outputs_but_the_last(
    num_speakers: int,
) -> None:
    torch.manual_seed(0)
    sources = torch.randn(2, num_speakers, 1000)
    shuffled = sources.flip(1) + 0.2 * torch.randn_like(sources)
    model = Fixed(torch.cat([shuffled, torch.randn(2, 1, 1000)], 1))
    loss, metrics = MultiTask()(model, batch_of(sources))
    expected = si_snr(shuffled.flip(1), sources).mean(1)
    assert torch.allclose(values(metrics["si_snr"]), expected, atol=1e-4)
    assert float(loss.detach()) == pytest.approx(-float(expected.mean()), abs=1e-4)
    assert metrics["permutation"].tolist() == [{2: 1, 3: 5}[num_speakers]] * 2
    loss.backward()
    assert (
        model.estimates.grad[:, :-1].abs().amax((0, 2)).min() > 0
        and model.estimates.grad[:, -1].abs().max() == 0
    )


def test_a_batch_of_the_other_set_is_scored_by_the_last_output_against_the_first_source() -> None:
    torch.manual_seed(0)
    sources, noise = torch.randn(2, 1, 1000), torch.randn(2, 1000)
    estimate = sources + 0.3 * torch.randn(2, 1, 1000)
    model = Fixed(torch.cat([torch.randn(2, 2, 1000), estimate], 1))
    batch = of("libri1mix", batch_of(sources, noise))
    loss, metrics = MultiTask(data_set="libri1mix")(model, batch)
    expected = si_snr(estimate, sources)[:, 0]
    assert torch.allclose(values(metrics["enhancement_si_snr"]), expected)
    assert torch.allclose(
        values(metrics["enhancement_si_snri"]), expected - si_snr(batch.mixture, sources[:, 0])
    )
    assert float(loss.detach()) == pytest.approx(-float(expected.mean()), abs=1e-5)
    loss.backward()
    assert (
        model.estimates.grad[:, :-1].abs().max() == 0
        and model.estimates.grad[:, -1].abs().min() >= 0
    )


def test_both_tasks_name_the_same_metrics_and_leave_the_other_ones_empty() -> None:
    batch, model = batch_of(torch.randn(2, 2, 300)), Fixed(torch.randn(2, 3, 300))
    names = {"si_snr": 2, "si_snri": 2, "enhancement_si_snr": 0, "enhancement_si_snri": 0}
    _, metrics = MultiTask()(model, batch)
    assert {name: values(metrics[name]).numel() for name in names} == names
    _, metrics = MultiTask()(model, of("enhancement", batch))
    assert {name: values(metrics[name]).numel() for name in names} == {
        name: 2 - size for name, size in names.items()
    }


def test_what_does_not_fit_is_refused_with_what_to_set() -> None:
    batch = batch_of(torch.randn(1, 2, 100))
    with pytest.raises(ValueError, match=r"2 outputs.*model\.num_speakers=3"):
        MultiTask()(Fixed(torch.randn(1, 2, 100)), batch)
    with pytest.raises(ValueError, match=r"no use for data set 'typo'"):
        MultiTask()(Fixed(torch.randn(1, 3, 100)), of("typo", batch))
    batch.sources = None
    for data_set in ("main", "enhancement"):
        with pytest.raises(ValueError, match="mixtures only"):
            MultiTask()(Fixed(torch.randn(1, 3, 100)), of(data_set, batch))


def test_fifty_steps_on_one_batch_of_each_task_learn_both() -> None:
    torch.manual_seed(0)
    separation = batch_of(voices(1, 2, 2000))
    enhancement = of(
        "enhancement", batch_of(voices(1, 1, 2000, seed=1), 0.2 * torch.randn(1, 2000))
    )
    model = ConvTasNet(3, 64, 20, 10, 16, 32, 16, num_blocks=4, num_repeats=1, compile=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    objective = MultiTask()
    for _ in range(50):
        results = [objective(model, batch) for batch in (separation, enhancement)]
        optimizer.zero_grad()
        (results[0][0] + results[1][0]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    assert float(values(results[0][1]["si_snri"]).min()) > 8
    assert float(values(results[1][1]["enhancement_si_snri"]).min()) > 5
