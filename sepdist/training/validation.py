"""Validate the model on fixed full-length mixtures, and save audio and spectrograms of some."""

from collections.abc import Callable

import torch
from torch import Tensor

from sepdist.config import ValidationConfig
from sepdist.data.dataset import Dataset
from sepdist.metrics.permutation import best_permutation, reorder
from sepdist.metrics.si_snr import pairwise_si_snr, si_snr
from sepdist.objectives.contract import OUTPUT_RULES, Objective, mean_of, speakers_of
from sepdist.reporting import LISTEN, Reporter
from sepdist.training.engine import Engine
from sepdist.training.world import World, sum_over_world


def validate(
    engine: Engine,
    objective: Objective,
    dataset: Dataset,
    world: World,
    options: ValidationConfig,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return the means of the objective's metrics over the first `num_mixtures`; collective.

    They are the same at any world size. "score", higher is better, is the mean SI-SNR if the
    objective measures it, else minus the loss. "silent_sources", which it leaves out, are counted;
    ValueError if all are silent. `beat` is called after every mixture.
    """
    total = dataset.manifest.num_samples
    count = min(options.num_mixtures or total, total)
    rounds = -(-count // world.size)  # equal on all ranks, because a ZeRO-3 forward is collective
    rows: dict[str, Tensor] = {}
    nothing = torch.zeros(2, count, dtype=torch.float64, device=world.device)
    engine.evaluated.eval()
    for turn in range(rounds):
        index = turn * world.size + world.rank
        batch = dataset.full(min(index, count - 1), options.max_seconds).to(world.device)
        with torch.no_grad(), engine.autocast():
            loss, metrics = objective(engine.evaluated, batch)
        silent = nothing.new_full((), batch.num_silent)
        for name, value in (metrics | {"loss": loss, "silent_sources": silent}).items():
            row = rows.setdefault(name, nothing.clone())
            if index < count and value.is_floating_point():
                row[:, index] = torch.stack(mean_of(value))
        beat()
    names = sorted(rows)
    summed = sum_over_world(torch.stack([rows[name] for name in names]), world)
    found = {name: row[0, row[1] > 0] for name, row in zip(names, summed, strict=True)}
    num_silent = float(found.pop("silent_sources").sum())
    means = {name: float(values.mean()) for name, values in found.items() if len(values)}
    if num_silent and "si_snr" in found.keys() - means.keys():
        raise ValueError(f"nothing to score: raise validation.max_seconds={options.max_seconds}")
    means |= {"silent_sources": num_silent} if num_silent else {}
    return means | {"score": means.get("si_snr", -means["loss"])}


def listen(
    engine: Engine,
    objective: Objective,
    dataset: Dataset,
    reporter: Reporter | None,
    step: int,
    options: ValidationConfig,
) -> None:
    """Save some mixtures with estimates, in the order of the sources, to TensorBoard; collective.

    If the data set has estimates, as for an SI-SNR estimator, they are saved, else the model's.
    """
    rate = dataset.manifest.sample_rate
    for index in range(min(options.num_listening, dataset.manifest.num_samples)):
        batch = dataset.full(index, options.max_seconds)
        estimates = batch.estimates
        if estimates is None:
            with torch.no_grad(), engine.autocast():
                outputs = engine.evaluated(batch.mixture.to(engine.world.device)).float().cpu()
            rules = {name: getattr(objective, name) for name in OUTPUT_RULES}
            estimates = speakers_of(outputs, **rules)
        if reporter is None:  # but a ZeRO-3 forward is collective
            continue
        waves, titles = {"mixture": batch.mixture[0].numpy()}, dict[str, str]()
        if batch.sources is not None and batch.sources.shape == estimates.shape:
            _, order = best_permutation(pairwise_si_snr(estimates, batch.sources))
            estimates = reorder(estimates, order)
            scores = enumerate(si_snr(estimates, batch.sources)[0].tolist(), 1)
            titles = {f"estimate {i}": f"estimate {i}: {score:.1f} dB" for i, score in scores}
            waves |= {f"source {i + 1}": wave.numpy() for i, wave in enumerate(batch.sources[0])}
        waves |= {f"estimate {i + 1}": wave.numpy() for i, wave in enumerate(estimates[0])}
        for name, wave in waves.items():
            reporter.audio(step, f"{LISTEN} {batch.ids[0]}/{name}", wave, rate)
        waves = {titles.get(name, name): wave for name, wave in waves.items()}
        if titles:  # few panels, which a card has room for
            del waves["mixture"]
        reporter.spectrogram(step, f"{LISTEN} {batch.ids[0]}", waves, rate)
