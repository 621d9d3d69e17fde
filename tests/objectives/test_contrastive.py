"""CC: the loss against brute force in float64, hidden and compared frames, a model that learns."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sepdist.data.records import Batch
from sepdist.models.conv_tasnet import ConvTasNet
from sepdist.objectives.contrastive import Contrastive
from sepdist.seeding import rng
from tests.support.batches import batch_of, voices
from tests.support.context import tiny_context


class Frames(nn.Module):
    """Outputs its parameters, one frame per 10 samples, and keeps its inputs."""

    def __init__(self, num_items: int, num_frames: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.features = nn.Parameter(torch.randn(num_items, num_frames, 6, generator=generator))
        self.predictions = nn.Parameter(torch.randn(num_items, num_frames, 6, generator=generator))

    def num_frames(self, num_samples: int) -> int:
        return num_samples // 10

    def forward(self, mixture_BT: Tensor, hidden_BN: Tensor) -> tuple[Tensor, Tensor]:
        self.given, self.hidden = mixture_BT, hidden_BN
        return self.features, self.predictions


def clean(num_items: int, num_frames: int) -> Batch:
    return batch_of(
        torch.randn(num_items, 1, 10 * num_frames, generator=torch.Generator().manual_seed(2))
    )


def brute_force(
    features: np.ndarray, predictions: np.ndarray, places: list[int], temperature: float
) -> float:
    """Compare every target with all others, after equation 3 of wav2vec 2.0."""

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    losses = []
    for place in places:
        weights = {
            other: np.exp(cosine(predictions[place], features[other]) / temperature)
            for other in places
        }
        losses.append(-np.log(weights[place] / sum(weights.values())))
    return float(np.mean(losses))


@pytest.mark.parametrize(("span", "all_frames", "num_negatives"), [(1, False, 29), (7, True, None)])
def test_the_loss_is_the_cross_entropy_of_every_target_among_its_negatives(
    span: int, all_frames: bool, num_negatives: int | None
) -> None:
    batch, model = clean(2, 200), Frames(2, 200)
    options = {"span": span, "all_frames": all_frames, "noise_probability": 0.0}
    losses = []
    for item in range(2):
        one = batch_of(batch.sources[item : item + 1])
        one.positions = torch.tensor([40 + item])
        alone = Frames(1, 200)
        alone.features, alone.predictions = (
            nn.Parameter(p[item : item + 1].detach().clone())
            for p in (model.features, model.predictions)
        )
        Contrastive(0, **options)(alone, one)
        places = alone.hidden[0].nonzero()[:, 0].tolist()
        loss, metrics = Contrastive(0, **options, num_negatives=num_negatives or len(places) - 1)(
            alone, one
        )
        features, predictions = (
            p.detach()[0].double().numpy() for p in (alone.features, alone.predictions)
        )
        expected = brute_force(features, predictions, places, 0.1)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        best = [max(places, key=lambda other, p=p: unit[other] @ predictions[p]) for p in places]
        assert float(metrics["accuracy"][0]) == pytest.approx(
            np.mean([p == b for p, b in zip(places, best, strict=True)])
        )
        losses.append(expected)
    if not all_frames:
        batch.positions = torch.tensor([40, 41])
        both, _ = Contrastive(0, **options, num_negatives=29)(model, batch)
        assert float(both.detach()) == pytest.approx(np.mean(losses), rel=1e-5), (
            "the mean over items"
        )


def test_spans_of_seven_frames_are_hidden_and_their_centres_are_the_targets() -> None:
    batch, model = clean(4, 750), Frames(4, 750)
    loss, _ = Contrastive(0, noise_probability=0.0)(model, batch)
    loss.backward()
    targets = model.predictions.grad.abs().sum(-1) > 0
    assert (targets.sum(1) == 16).all(), "3 s at 4 ms: round(750 * 0.15 / 7)"
    dilated = torch.nn.functional.max_pool1d(targets.float(), 7, 1, 3).bool()
    assert torch.equal(dilated, model.hidden)
    compared = model.features.grad.abs().sum(-1) > 0
    assert torch.equal(compared, targets), "negatives come from the other targets of the same item"


@pytest.mark.parametrize(
    ("wanted", "num_targets", "expected"), [(100, 16, 8), (5, 16, 5), (15, 16, 15), (100, 2, 1)]
)
def test_negatives_are_different_other_targets_half_of_them_where_they_are_too_few(
    wanted: int, num_targets: int, expected: int
) -> None:
    rows = Contrastive(0, num_negatives=wanted)._negatives(rng(0, "x"), num_targets)
    assert rows.shape == (num_targets, expected)
    for target, row in enumerate(rows.tolist()):
        assert (
            len(set(row)) == expected and target not in row and set(row) <= set(range(num_targets))
        )
    many = torch.cat(
        [Contrastive(0, num_negatives=1)._negatives(rng(i, "x"), 4) for i in range(300)], 1
    )
    for target, row in enumerate(many.tolist()):
        assert all(abs(row.count(other) - 100) < 35 for other in range(4) if other != target), (
            "each as often"
        )


def test_the_temperature_decays_by_epochs_of_positions() -> None:
    batch, model = clean(1, 300), Frames(1, 300)
    batch.positions = torch.tensor([25])
    decaying = Contrastive(0, noise_probability=0.0, temperature_decay=0.5, epoch_samples=10)(
        model, batch
    )[0]
    assert torch.equal(
        decaying, Contrastive(0, noise_probability=0.0, temperature=0.025)(model, batch)[0]
    )


def test_noise_is_added_to_the_configured_share_of_items() -> None:
    batch = batch_of(torch.zeros(400, 1, 100), torch.ones(400, 100))
    model = Frames(400, 10)
    Contrastive(0, span=1)(model, batch)
    assert set(model.given.flatten().tolist()) == {0.0, 1.0}
    assert float(model.given.mean()) == pytest.approx(0.2, abs=0.05)


def test_loss_and_masks_of_an_item_depend_on_its_position_alone() -> None:
    model = tiny_context().eval()
    batch = batch_of(voices(3, 1, 3000), 0.1 * torch.randn(3, 3000))
    batch.positions = torch.tensor([5, 90, 17])
    objective = Contrastive(3, noise_probability=0.5, span=3)
    loss, metrics = objective(model, batch)
    alone = []
    for item in (2, 0, 1):
        one = batch_of(batch.sources[item : item + 1], batch.noise[item : item + 1])
        one.positions = batch.positions[item : item + 1]
        loss_alone, its_metrics = objective(model, one)
        alone.append(float(loss_alone.detach()))
        assert float(its_metrics["accuracy"][0]) == float(metrics["accuracy"][item])
    assert float(loss.detach()) == pytest.approx(np.mean(alone), rel=1e-5)


def test_the_padded_tail_is_not_hidden() -> None:
    batch, model = clean(2, 100), Frames(2, 100)
    batch.lengths = torch.tensor([1000, 300])
    Contrastive(0, noise_probability=0.0)(model, batch)
    assert not model.hidden[1, 30:].any() and model.hidden[1, :30].any()


def test_the_gradient_reaches_all_of_the_model_but_the_separators_decoder() -> None:
    model = tiny_context()
    loss, _ = Contrastive(0, noise_probability=0.0)(model, batch_of(voices(2, 1, 4000)))
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == ["separator.decoder.weight"]


def test_some_hundred_steps_on_one_batch_learn_to_distinguish_hidden_frames() -> None:
    model = tiny_context(dropout=0.0)
    batch = batch_of(voices(2, 1, 2000), 0.01 * torch.randn(2, 2000))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    objective = Contrastive(0, span=3, noise_probability=1.0)
    first = float(objective(model, batch)[1]["accuracy"].mean())
    for _ in range(150):
        loss, metrics = objective(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first < 0.5 and float(metrics["accuracy"].min()) > 0.9


def test_what_cannot_work_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="ContextModel"):
        Contrastive(0).check_model(ConvTasNet(1, 16, compile=False))
    Contrastive(0).check_model(tiny_context())
    with pytest.raises(ValueError, match="length 7 has room for 1 spans of 7, not for 2"):
        Contrastive(0, noise_probability=0.0)(Frames(1, 7), clean(1, 7))
    with pytest.raises(ValueError, match="needs noise"):
        Contrastive(0)(Frames(1, 100), clean(1, 100))
    with pytest.raises(ValueError, match="temperature=0"):
        Contrastive(0, temperature=0)
