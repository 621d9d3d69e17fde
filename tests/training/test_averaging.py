"""The average of the weights is what its formula says, is exported, and survives a resume."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from sepdist.config import load_frozen
from sepdist.inference.export import load_separator
from sepdist.training.averaging import WeightAverage
from sepdist.training.checkpoint import find_committed, load_newest
from sepdist.training.datasets import open_datasets
from sepdist.training.handoff import read_export
from tests.support.checkpoints import assert_equal, save, snapshot
from tests.support.runs import final_files, frozen, loop

EVERY = ["training.max_steps=4", "training.checkpoint_every=1", "training.keep_every=1"]


def decays(limit: float, count: int) -> list[float]:
    return [min(limit, (1 + n) / (10 + n)) for n in range(1, count + 1)]


def test_an_average_is_that_of_the_formula_and_buffers_are_the_models() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average, expected = WeightAverage(model, 0.25), model[0].weight.detach().double()
    for decay in decays(0.25, 6):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(2, 3))
        model(torch.randn(4, 3))
        average.update(model)
        expected = decay * expected + (1 - decay) * model[0].weight.detach().double()
    assert decays(0.25, 6)[0] == 2 / 11 and decays(0.25, 6)[-1] == 0.25
    torch.testing.assert_close(average.model[0].weight.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(average.model[1].running_mean, model[1].running_mean)
    assert not any(p.requires_grad for p in average.model.parameters())


def weights_of(run_dir: Path, name: str) -> list[dict[str, Tensor]]:
    """A file of tensors of every checkpoint that has it, by step."""
    committed = find_committed(str(run_dir / "checkpoints"))
    return [
        safetensors.torch.load_file(Path(one.url) / name) for one in committed if name in one.files
    ]


def test_a_checkpoint_exports_the_average_and_resumes_from_the_weights(tmp_path: Path) -> None:
    made, average = snapshot(3, 1.0), snapshot(4).weights
    made.average = average
    save(tmp_path, made)
    found = load_newest(str(tmp_path))
    assert found is not None
    assert_equal(found, made)
    torch.testing.assert_close(found.average, average, rtol=0, atol=0)
    torch.testing.assert_close(read_export(str(tmp_path))[0], average, rtol=0, atol=0)
    save(tmp_path / "plain", snapshot(3))
    [one] = find_committed(str(tmp_path / "plain" / "checkpoints"))
    assert "raw.safetensors" not in one.files
    assert load_newest(str(tmp_path / "plain")).average == {}


@pytest.mark.slow
def test_a_checkpoint_holds_both_and_validation_scores_and_exports_the_average(
    tiny_data: dict[str, str], tmp_path: Path
) -> None:
    every = [*EVERY, "validation.every_steps=4", "training.ema_decay=0.25"]
    path = frozen(tiny_data, tmp_path, *every)
    loop(path)
    averages, raws = (weights_of(tmp_path, f"{one}.safetensors") for one in ("model", "raw"))
    assert len(averages) == len(raws) == 4
    expected = averages[0]
    for decay, raw in zip(decays(0.25, 4)[1:], raws[1:], strict=True):
        expected = {name: decay * expected[name] + (1 - decay) * raw[name] for name in raw}
    torch.testing.assert_close(averages[-1], expected, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(averages[-1][name], raws[-1][name]) for name in raws[-1])

    found = load_newest(str(tmp_path))
    assert found and all(torch.equal(found.weights[name], raws[-1][name]) for name in raws[-1])
    torch.testing.assert_close(read_export(str(tmp_path))[0], averages[-1], rtol=0, atol=0)
    model, (_, dev) = load_separator(str(tmp_path)).model, open_datasets(load_frozen(path))
    scores = []
    for number in range(3):
        batch = dev.full(number, 30.0)
        with torch.no_grad():
            estimates = model(batch.mixture)
        scores.append(best_mean(estimates[0].double(), batch.sources[0].double()))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["validation/si_snr"] == pytest.approx(sum(scores) / 3, abs=1e-3)


def best_mean(estimates_ST: Tensor, sources_ST: Tensor) -> float:
    """Mean SI-SNR in dB of two estimates in the better order, worked out here."""

    def score(estimate: Tensor, source: Tensor) -> float:
        estimate, source = estimate - estimate.mean(), source - source.mean()
        target = (estimate @ source) / (source @ source) * source
        return float(
            10 * torch.log10(target @ target / ((estimate - target) @ (estimate - target)))
        )

    orders = ((0, 1), (1, 0))
    return max(sum(score(estimates_ST[i], sources_ST[o[i]]) for i in (0, 1)) / 2 for o in orders)


@pytest.mark.slow
def test_a_run_goes_on_from_the_raw_weights_with_the_bits_of_one_never_stopped(
    tiny_data: dict[str, str], tmp_path: Path
) -> None:
    """And so does one that takes the average up, or gives it up, on the way."""
    options = ["validation.every_steps=2", "training.ema_decay=0.9"]
    for name, steps in (("whole", [6]), ("parts", [3, 6]), ("plain", [6]), ("dropped", [3, 6])):
        for part, last in enumerate(steps):
            off = name == "plain" or (name == "dropped" and part == 1)
            more = [*options, f"training.max_steps={last}", *["training.ema_decay=0"] * off]
            loop(frozen(tiny_data, tmp_path / name, *more))
    assert final_files(tmp_path / "parts") == final_files(tmp_path / "whole")
    raws = [weights_of(tmp_path / name, "raw.safetensors")[-1] for name in ("parts", "whole")]
    plain = weights_of(tmp_path / "plain", "model.safetensors")[-1]
    for other in (raws[1], plain, weights_of(tmp_path / "dropped", "model.safetensors")[-1]):
        assert all(torch.equal(raws[0][name], other[name]) for name in other)
    loop(frozen(tiny_data, tmp_path / "plain", *options, "training.max_steps=8"))
    assert not torch.equal(
        *[weights_of(tmp_path / "plain", f"{one}.safetensors")[-1]["encoder.weight"]
          for one in ("model", "raw")]
    )  # fmt: skip
