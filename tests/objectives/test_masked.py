"""MAMA: input, counted samples and loss, read off samples that encode their index."""

import contextlib

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sepdist.data.records import Batch
from sepdist.models.conv_tasnet import ConvTasNet
from sepdist.models.dprnn import DPRNN
from sepdist.objectives.masked import Masked
from tests.support.batches import batch_of, voices

LENGTH, SPAN = 4000, 80


class Recorder(nn.Module):
    """Outputs its parameters and keeps its input."""

    def __init__(self, num_items: int, length: int = LENGTH) -> None:
        super().__init__()
        self.estimates = nn.Parameter(
            torch.randn(num_items, 1, length, generator=torch.Generator().manual_seed(9))
        )

    def forward(self, mixture_BT: Tensor) -> Tensor:
        self.given = mixture_BT.detach()
        return self.estimates


def ramps(num_items: int, length: int = LENGTH) -> Tensor:
    """Sources [B, 1, T] of distinct samples: 1, 2, ..., in the next item from a million on."""
    return (torch.arange(length) + 1.0 + 1e6 * torch.arange(num_items)[:, None])[:, None]


def seen(batch: Batch, **options: float) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Input, counted samples (whose estimate has a gradient), loss and metrics."""
    model = Recorder(*batch.mixture.shape)
    loss, metrics = Masked(seed=5, **({"noise_probability": 0.0} | options))(model, batch)
    loss.backward()
    return model.given, model.estimates.grad[:, 0] != 0, loss.detach(), metrics


def runs(mask: Tensor) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.numpy().astype(int), [0]])))
    return list(zip(edges[::2], edges[1::2], strict=True))


def test_the_loss_is_the_mean_error_on_zeroed_spans_of_ten_milliseconds() -> None:
    batch = batch_of(ramps(3))
    given, counts, loss, metrics = seen(batch, replace=0.0, keep=0.0)
    assert torch.equal(given == 0, counts), "what is zero is what counts"
    assert torch.equal(given[~counts], batch.sources[:, 0][~counts])
    for item in counts:
        lengths = [stop - start for start, stop in runs(item)]
        assert min(lengths) >= SPAN and len(lengths) <= round(0.15 * LENGTH / SPAN)
        assert 0.08 * LENGTH < int(item.sum()) <= round(0.15 * LENGTH / SPAN) * SPAN
    estimates = Recorder(3).estimates.detach().double().numpy()[:, 0]
    clean = batch.sources[:, 0].double().numpy()
    per_item = [np.abs(estimates[i] - clean[i])[counts[i].numpy()].mean() for i in range(3)]
    assert metrics["l1"].numpy() == pytest.approx(per_item, rel=1e-6)
    assert loss.item() == pytest.approx(np.mean(per_item), rel=1e-6)
    energies = [
        (np.square(x)[counts[1].numpy()]).sum() for x in (clean[1], estimates[1] - clean[1])
    ]
    assert float(metrics["masked_snr"][1]) == pytest.approx(
        10 * np.log10(energies[0] / energies[1]), abs=1e-4
    )


def test_replaced_spans_are_other_spans_of_the_same_item() -> None:
    batch = batch_of(ramps(3))
    given, counts, _, _ = seen(batch, replace=1.0, keep=0.0)
    places = (
        given - batch.sources[:, 0] + torch.arange(LENGTH)
    )  # from which sample of the item each was taken
    assert places.min() >= 0 and places.max() < LENGTH
    assert torch.equal(given[~counts], batch.sources[:, 0][~counts])
    for item, counted in zip(places, counts, strict=True):
        for start, stop in runs(counted):
            jumps = int((item[start:stop].diff() != 1).sum())
            assert jumps <= 2 * (-(-(stop - start) // SPAN)) and (stop - start) >= SPAN, (
                "copied in whole spans"
            )
        assert (item != torch.arange(LENGTH)).sum() > 0.9 * counted.sum()


def test_kept_spans_count_although_nothing_is_altered() -> None:
    batch = batch_of(ramps(2))
    given, counts, _, _ = seen(batch, replace=0.0, keep=1.0)
    assert torch.equal(given, batch.sources[:, 0])
    assert (counts.sum(1) > 0.08 * LENGTH).all()


def test_of_ten_items_eight_are_zeroed_one_replaced_and_one_kept() -> None:
    batch = batch_of(ramps(1000, 200))
    given, _, _, _ = seen(batch, span_seconds=0.001)
    zeroed = (given == 0).any(1)
    kept = (given == batch.sources[:, 0]).all(1)
    assert float(zeroed.float().mean()) == pytest.approx(0.8, abs=0.04)
    assert float(kept.float().mean()) == pytest.approx(0.1, abs=0.03)


def test_noise_is_added_to_some_items_at_half_its_level_and_the_target_stays_clean() -> None:
    torch.manual_seed(0)
    noise = torch.randn(1000, 200)
    batch = batch_of(torch.zeros(1000, 1, 200), noise)
    given, counts, _, metrics = seen(
        batch, noise_probability=0.15, replace=0.0, keep=0.0, span_seconds=0.001
    )
    noisy = (given != 0).any(1)
    assert float(noisy.float().mean()) == pytest.approx(0.15, abs=0.035)
    assert torch.equal(given[noisy], torch.where(counts, 0.0, 0.5 * noise)[noisy])
    expected = (Recorder(1000, 200).estimates[:, 0].abs() * counts).sum(1) / counts.sum(1)
    assert torch.allclose(metrics["l1"], expected.detach())


def test_a_channel_mask_removes_one_band_from_the_whole_item_and_all_samples_count() -> None:
    torch.manual_seed(0)
    batch = batch_of(torch.randn(40, 1, 400))
    given, counts, _, _ = seen(batch, band_share=0.2, keep=1.0, replace=0.0)
    before, after = torch.fft.rfft(batch.sources[:, 0]).abs(), torch.fft.rfft(given).abs()
    out = after < 1e-3 * before
    widths = out.sum(1)
    assert widths.max() <= 40 and widths.float().mean() == pytest.approx(20, abs=6), (
        "up to a fifth of 201 bins"
    )
    assert all(len(runs(item)) <= 1 for item in out)
    assert torch.allclose(after[~out], before[~out], atol=1e-3)
    assert torch.equal(counts.all(1), widths > 0)


def test_masks_depend_on_the_position_alone() -> None:
    batch = batch_of(ramps(5), torch.randn(5, LENGTH))
    batch.positions = torch.tensor([7, 100, 3, 12, 51])
    objective = Masked(seed=5, noise_probability=0.5)
    together, _, counts = objective.alter(batch)
    for order in ([4, 1, 0, 2, 3], [2], [0, 3]):
        some = batch_of(batch.sources[order], batch.noise[order])
        some.positions = batch.positions[order]
        altered, _, counted = objective.alter(some)
        assert torch.equal(altered, together[order]) and torch.equal(counted, counts[order])
    assert not torch.equal(Masked(seed=6, noise_probability=0.5).alter(batch)[2], counts), (
        "another seed"
    )
    assert not torch.equal(counts[0], counts[1]), "another position"


def test_the_padded_tail_is_never_masked() -> None:
    batch = batch_of(ramps(4))
    batch.lengths = torch.tensor([800, LENGTH, 100, 81])
    _, counts, _, _ = seen(batch, replace=0.0, keep=0.0)
    for item, length in zip(counts, batch.lengths, strict=True):
        assert not item[length:].any() and item[:length].any()


def test_a_network_that_masks_leaves_a_zeroed_span_silent_and_one_that_decodes_fills_it() -> None:
    torch.manual_seed(0)
    mixture = torch.randn(1, 400)
    mixture[0, 100:180] = 0.0
    for masking in (True, False):
        model = ConvTasNet(
            1, 16, 16, 8, 8, 12, 8, num_blocks=2, num_repeats=1, masking=masking, compile=False
        )
        assert (model(mixture)[0, 0, 120:160].abs().max() == 0) == masking
        refused = pytest.raises(ValueError, match=r"ConvTasNet multiplies .*model\.masking=false")
        with refused if masking else contextlib.nullcontext():
            Masked(seed=0).check_model(model)
        Masked(seed=0, replace=0.75, keep=0.25).check_model(model)
    with pytest.raises(ValueError, match="DPRNN multiplies"):
        Masked(seed=0).check_model(DPRNN(1, 8, num_bottleneck=8, num_hidden=8, num_repeats=1))


def test_some_hundred_steps_on_one_batch_learn_to_fill_the_spans() -> None:
    torch.manual_seed(0)
    batch = batch_of(voices(2, 1, 3000), 0.05 * torch.randn(2, 3000))
    sizes = dict(
        num_filters=64, kernel_size=20, stride=10, num_bottleneck=24, num_hidden=48, num_skip=24
    )
    model = ConvTasNet(1, **sizes, num_blocks=4, num_repeats=1, masking=False, compile=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    objective = Masked(seed=0, noise_probability=1.0, replace=0.5, keep=0.0)
    for _ in range(200):
        loss, metrics = objective(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(metrics["masked_snr"].min()) > 5, "silence in the spans gives 0 dB"


def test_what_cannot_work_is_refused_with_the_numbers() -> None:
    batch = batch_of(ramps(1))
    with pytest.raises(ValueError, match=r"noise_probability=0\.15 needs noise"):
        Masked(seed=0)(Recorder(1), batch)
    with pytest.raises(ValueError, match=r"\(1, 2, 4000\).*num_speakers=1"):
        Masked(seed=0, noise_probability=0.0)(lambda x: x[:, None].expand(-1, 2, -1), batch)
    with pytest.raises(ValueError, match=r"length 79 has room for 0 spans of 80"):
        Masked(seed=0, noise_probability=0.0)(Recorder(1, 79), batch_of(ramps(1, 79)))
    with pytest.raises(ValueError, match=r"replace=0\.7, keep=0\.6"):
        Masked(seed=0, replace=0.7, keep=0.6)
    batch.sources = None
    with pytest.raises(ValueError, match="needs sources"):
        Masked(seed=0)(Recorder(1), batch)
