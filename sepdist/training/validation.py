"""Validation: the model as it is and fixed full-length mixtures in; means, and audio and pictures to listen to, out."""

from collections.abc import Callable

import torch
from torch import Tensor

from sepdist.config import ValidationConfig
from sepdist.data.dataset import Dataset
from sepdist.metrics.permutation import best_permutation
from sepdist.metrics.selection import speakers_of
from sepdist.metrics.si_snr import pairwise_si_snr
from sepdist.reporting import Reporter
from sepdist.training.engine import DeepSpeedEngine, Objective, speaker_outputs
from sepdist.training.world import World, sum_over_world


def validate(
    engine: DeepSpeedEngine,
    objective: Objective,
    dataset: Dataset,
    world: World,
    options: ValidationConfig,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Means of the objective's metrics over the first `num_mixtures` full-length mixtures; the same at any world size.

    "score" is the SI-SNR where the objective measures one, else minus the loss: higher is better. `beat` is called
    after every mixture. Collective.
    """
    total = dataset.manifest.num_samples
    count = min(options.num_mixtures or total, total)
    rounds = -(-count // world.size)  # equal on all ranks, because a ZeRO-3 forward is collective
    rows: dict[str, Tensor] = {}
    engine.model.eval()
    for turn in range(rounds):
        index = turn * world.size + world.rank
        batch = dataset.full(min(index, count - 1), options.max_seconds).to(world.device)
        with torch.no_grad(), engine.autocast():
            loss, metrics = objective(engine.model, batch)
        measured = {
            name: value
            for name, value in metrics.items()
            if value.is_floating_point() and value.numel()
        }
        values = {"loss": loss} | measured
        for name, value in values.items():
            row = rows.setdefault(name, torch.zeros(count, dtype=torch.float64))
            if index < count:
                row[index] = value.double().mean().cpu()
        beat()
    names = sorted(rows)
    summed = sum_over_world(torch.stack([rows[name] for name in names]), world)
    means = {name: float(row.mean()) for name, row in zip(names, summed, strict=True)}
    return means | {"score": means.get("si_snr", -means["loss"])}


def listen(
    engine: DeepSpeedEngine,
    objective: Objective,
    dataset: Dataset,
    reporter: Reporter | None,
    step: int,
    options: ValidationConfig,
) -> None:
    """Put the first few mixtures with their estimates into TensorBoard, estimates in the order of the sources.

    The estimates are the data set's where it has some, else the model's.
    Every rank computes them, because a ZeRO-3 forward is collective; only the one with a reporter writes.
    """
    rate = dataset.manifest.sample_rate
    for index in range(min(options.num_listening, dataset.manifest.num_samples)):
        batch = dataset.full(index, options.max_seconds)
        if batch.estimates is not None:  # what the model judges
            estimates = batch.estimates
        else:
            with torch.no_grad(), engine.autocast():
                estimates = engine.model(batch.mixture.to(engine.world.device)).float().cpu()
            estimates = speakers_of(estimates, **speaker_outputs(objective))
        if reporter is None:
            continue
        waves = {"mixture": batch.mixture[0].numpy()}
        if batch.sources is not None and batch.sources.shape == estimates.shape:
            _, order = best_permutation(pairwise_si_snr(estimates, batch.sources))
            estimates = torch.stack([estimates[0, int(i)] for i in order[0]])[None]
            waves |= {f"source {i + 1}": wave.numpy() for i, wave in enumerate(batch.sources[0])}
        waves |= {f"estimate {i + 1}": wave.numpy() for i, wave in enumerate(estimates[0])}
        for name, wave in waves.items():
            reporter.audio(step, f"listen_{index}/{name}", wave, rate)
        reporter.spectrogram(step, f"listen_{index}", waves, rate)
