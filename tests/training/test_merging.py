"""Batches merged into one pass of the model give the losses and gradients of each alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sepdist.data.records import Batch
from sepdist.objectives.contract import with_defaults
from sepdist.objectives.contrastive import Contrastive
from sepdist.objectives.enhancement import Enhancement
from sepdist.objectives.fixed_permutations import FixedPermutations
from sepdist.objectives.masked import Masked
from sepdist.objectives.mixit import MixIT
from sepdist.objectives.multitask import MultiTask
from sepdist.objectives.quality import Quality
from sepdist.objectives.semisupervised import SemiSupervised
from sepdist.objectives.separation import Separation
from sepdist.objectives.soft_pit import SoftPit
from sepdist.training.merging import run_merged
from tests.support.batches import Listener, batch_of, voices
from tests.support.context import tiny_context

NUM_BATCHES, LENGTH = 3, 800


class Separator(nn.Module):
    """Separate items one by one; counts its calls."""

    masking = False

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Conv1d(1, 4, 9, padding=4)
        self.head = nn.Conv1d(4, num_outputs, 1)
        self.calls = 0

    def forward(self, mixture_BT: Tensor) -> Tensor:
        self.calls += 1
        return self.head(torch.tanh(30 * self.body(mixture_BT[:, None])))


class Context(nn.Module):
    """A context network that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = tiny_context().eval(), 0
        self.num_frames = self.inner.num_frames

    def forward(self, *inputs: Tensor) -> Any:
        self.calls += 1
        return self.inner(*inputs)


class Estimator(nn.Module):
    """An SI-SNR estimator that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = Listener().eval(), 0

    def forward(self, *inputs: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(*inputs)


def batches(data_sets: tuple[str, ...] = ("main",) * NUM_BATCHES) -> list[Batch]:
    """Batches of two items with noise; a source of the second batch is silent."""
    made = []
    for number, data_set in enumerate(data_sets):
        sources = voices(2, 2, LENGTH, seed=number)
        if number == 1:
            sources[0, 1] = 0
        noise = 0.01 * torch.randn(2, LENGTH, generator=torch.Generator().manual_seed(number))
        positions = torch.arange(2 * number, 2 * number + 2)
        plain = replace(batch_of(sources, noise), positions=positions, data_set=data_set)
        made.append(replace(plain, estimates=sources + 0.1 * sources.flip(1)))
    return made


def semisupervised() -> SemiSupervised:
    return SemiSupervised(Listener(), epoch_samples=1, labelled_share=0.5, ramp_epochs=10)


def multitask() -> tuple[Any, nn.Module, list[Batch]]:
    mixed = batches(("main", "enhancement", "main"))
    one_source = replace(mixed[1], sources=mixed[1].sources[:, :1])
    return MultiTask(), Separator(3), [mixed[0], replace(one_source, ids=["a", "b"]), mixed[2]]


def fixed(folder: Path) -> FixedPermutations:
    (folder / "given.csv").write_text("id,permutation\nutterance0,1\nutterance1,0\n")
    return FixedPermutations(str(folder / "given.csv"))


CASES: dict[str, Callable[[Path], tuple[Any, nn.Module, list[Batch]]]] = {
    "separation": lambda _: (Separation(), Separator(2), batches()),
    "threshold": lambda _: (Separation(5.0, skip_silent=True), Separator(2), batches()),
    "soft_pit": lambda _: (SoftPit(), Separator(2), batches()),
    "fixed": lambda folder: (fixed(folder), Separator(2), batches()),
    "enhancement": lambda _: (Enhancement(), Separator(1), batches()),
    "masked": lambda _: (Masked(seed=1), Separator(1), batches()),
    "mixit of labelled and unlabelled batches": lambda _: (
        MixIT(data_set="unlabelled"), Separator(4), batches(("main", "unlabelled", "main"))
    ),
    "semisupervised of both kinds": lambda _: (
        semisupervised(), Separator(2), batches(("unlabelled", "main", "unlabelled"))
    ),
    "multitask": lambda _: multitask(),
    "contrastive": lambda _: (Contrastive(seed=1), Context(), batches()),
    "quality": lambda _: (Quality(), Estimator(), batches()),
}  # fmt: skip


def gradients(losses: list[Tensor], model: nn.Module) -> list[Tensor]:
    params = [p for p in model.parameters() if p.requires_grad]
    total = torch.stack(losses).sum()
    return list(torch.autograd.grad(total, params, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("name", CASES)
def test_losses_metrics_and_gradients_are_those_of_separate_passes(
    name: str, tmp_path: Path
) -> None:
    objective, model, given = CASES[name](tmp_path)
    with_defaults(objective)
    separate = [objective(model, batch) for batch in given]
    num_separate, model.calls = model.calls, 0
    merged = run_merged(objective, model, given)
    assert num_separate == NUM_BATCHES
    assert model.calls == 1
    mean = torch.stack([loss for loss, _ in separate]).mean()
    for (loss, metrics), (loss_alone, metrics_alone) in zip(merged, separate, strict=True):
        expected = mean if objective.mean_of_items else loss_alone
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(metrics, metrics_alone, rtol=1e-3, atol=1e-3)
    expected = gradients([loss for loss, _ in separate], model)
    found = gradients([loss for loss, _ in merged], model)
    scale = max(float(one.abs().max()) for one in expected)
    assert scale > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * scale)


def test_calls_that_cannot_merge_are_made_apart_and_several_calls_in_turn() -> None:
    """The second call's input is the first one's output; the last batch is shorter."""
    model = Separator(1)

    def twice(model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            once = model(batch.mixture)
        assert not once.requires_grad
        again = model(once[:, 0])
        return again.square().mean(), {"level": again.detach().abs().mean((1, 2))}

    given = batches()
    given[2] = replace(given[2], mixture=given[2].mixture[:, :400])
    separate = [twice(model, batch) for batch in given]
    model.calls = 0
    merged = run_merged(twice, model, given)
    assert model.calls == 4  # two calls of each of two lengths
    torch.testing.assert_close(merged, separate)
    expected, found = (gradients([loss for loss, _ in one], model) for one in (separate, merged))
    torch.testing.assert_close(found, expected)


def test_an_objective_that_is_a_mean_over_items_is_called_once_for_batches_that_are_alike() -> None:
    given, calls = batches(), []

    class Counted(Separation):
        mean_of_items = True  # of its own `__call__`

        def __call__(self, model: Any, batch: Batch) -> Any:
            calls.append(batch)
            return super().__call__(model, batch)

    merged = run_merged(Counted(), Separator(2), given)
    assert [one.ids for one in calls] == [[name for batch in given for name in batch.ids]]
    assert calls[0].positions.tolist() == [*range(2 * NUM_BATCHES)]
    assert [metrics["permutation"].shape for _, metrics in merged] == [(2,)] * NUM_BATCHES
    calls.clear()
    elsewhere = replace(given[1], data_set="other")
    run_merged(Counted(), Separator(2), [given[0], elsewhere, given[2]])
    assert {len(one.ids) for one in calls} == {2}


def test_metrics_of_a_mean_may_be_one_number_or_none_at_all() -> None:
    class Level:
        mean_of_items = True

        def __init__(self, *names: str) -> None:
            self.names = names

        def __call__(self, model: Any, batch: Batch) -> Any:
            loss = batch.mixture.square().mean()
            return loss, {name: loss.sqrt() for name in self.names}

    given = batches()
    for names in ((), ("level",)):
        merged = run_merged(Level(*names), Separator(2), given)
        assert [list(metrics) for _, metrics in merged] == [[*names]] * NUM_BATCHES
        assert len({float(loss) for loss, _ in merged}) == 1
        assert all(metrics["level"].ndim == 0 for _, metrics in merged if names)


@pytest.mark.parametrize("base", [Separation, SoftPit, Enhancement])
def test_a_subclass_with_a_loss_of_its_own_inherits_no_claim_that_it_is_a_mean(base: type) -> None:
    """The largest loss of an item is no mean over them: merged, all batches would get one."""

    class Worst(base):
        def __call__(self, model: Any, batch: Batch) -> Any:
            _, metrics = super().__call__(model, batch)
            level_B = (model(batch.mixture) ** 2).mean((1, 2))
            return level_B.max(), metrics

    class Renamed(base):
        """Without a loss of its own."""

    model, given = Separator(1 if base is Enhancement else 2), batches()
    objective = with_defaults(Worst())
    expected = [objective(model, batch)[0] for batch in given]
    found = [loss for loss, _ in run_merged(objective, model, given)]
    torch.testing.assert_close(found, expected)
    model.calls = 0
    run_merged(with_defaults(Renamed()), model, given)
    assert model.calls == 1
