"""Semi-supervised runs: batches of different kinds, restarts, and an estimator that is fooled."""

import io
import json
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import yaml
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from sepdist import config, slots
from sepdist.config import ConfigError
from sepdist.data.records import Batch
from sepdist.inference.export import load_estimator
from sepdist.metrics.si_snr import si_snr
from sepdist.models.conv_tasnet import ConvTasNet
from sepdist.objectives.contract import with_defaults
from sepdist.objectives.semisupervised import SemiSupervised
from sepdist.reporting import read_metrics
from sepdist.training.checkpoint import find_committed, load_snapshot
from sepdist.training.run import freeze, summarise
from tests.support.batches import Listener
from tests.support.exports import write_export
from tests.support.runs import final_hash, frozen

# One step after the other by hand.

SHARE, EPOCH, RAMP = 0.5, 4, 4


class Separator(nn.Module):
    """Two filters of the mixture."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 9, padding=4)

    def forward(self, mixture_BT: torch.Tensor) -> torch.Tensor:
        return self.conv(mixture_BT[:, None])


def batch_of(step: int, shard: int) -> Batch:
    """Of two virtual shards of two items the first is labelled."""
    position = 4 * step + 2 * shard
    sources = torch.randn(2, 2, 200, generator=torch.Generator().manual_seed(position))
    return Batch(
        ids=["a", "b"],
        positions=torch.arange(position, position + 2),
        mixture=sources.sum(1),
        sources=None if shard else sources,
        noise=None,
        lengths=torch.full((2,), 200),
        data_set="unlabelled" if shard else "main",
    )


def engine_rank(rank: int, world_size: int, folder: str) -> None:
    import torch.distributed as dist

    from sepdist.training.engine import DeepSpeedEngine
    from sepdist.training.world import World

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    for stage in (0, 1):
        torch.manual_seed(0)
        engine = DeepSpeedEngine(
            Separator(),
            SemiSupervised(Listener(), epoch_samples=EPOCH, ramp_epochs=RAMP, labelled_share=SHARE),
            lambda params: torch.optim.Adam(params, lr=1e-2),
            World(rank, world_size, torch.device("cpu")),
            seed=0,
            num_virtual_shards=2,
            micro_batch=2,
            zero_stage=stage,
            clip_norm=0.0,
        )
        results = [engine.step([batch_of(step, rank)])[-1] for step in range(3)]
        weights = engine.weights()
        if rank == 0:
            losses, metrics = (
                [result.loss for result in results],
                [result.means for result in results],
            )
            torch.save(
                {"weights": weights, "losses": losses, "metrics": metrics},
                f"{folder}/stage-{stage}.pt",
            )
    dist.barrier()
    dist.destroy_process_group()


def test_labelled_and_unlabelled_batches_on_different_ranks_make_the_step_of_equation_5(
    tmp_path: Path,
) -> None:
    mp.start_processes(engine_rank, (2, str(tmp_path)), nprocs=2, start_method="forkserver")
    found, same = (
        torch.load(tmp_path / f"stage-{stage}.pt", weights_only=True) for stage in (0, 1)
    )
    assert found["losses"] == same["losses"] and found["metrics"] == same["metrics"]
    assert all(
        torch.equal(value, same["weights"][name]) for name, value in found["weights"].items()
    )
    torch.manual_seed(0)
    model, estimator = Separator(), Listener().eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(3):
        f = step / RAMP
        labelled, other = batch_of(step, 0), batch_of(step, 1)
        estimates = model(labelled.mixture)
        orders = [
            si_snr(estimates[:, order], labelled.sources).mean(1) for order in ([0, 1], [1, 0])
        ]
        supervised = -torch.maximum(*orders).mean()
        unsupervised = -estimator(other.mixture, model(other.mixture)).mean()
        loss = (1 - f) * supervised + f * unsupervised
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert found["losses"][step] == pytest.approx(loss.item(), rel=1e-4)
        assert found["metrics"][step]["si_snr"] == pytest.approx(-supervised.item(), rel=1e-4)
        assert found["metrics"][step]["predicted_si_snr"] == pytest.approx(
            -unsupervised.item(), rel=1e-4
        )
        assert found["metrics"][step]["unsupervised_weight"] == f
    for name, value in model.state_dict().items():
        # Adam divides by the size of a gradient, so the rounding of a small one shows.
        torch.testing.assert_close(found["weights"][name], value, rtol=1e-3, atol=1e-5)


# Whole runs.

UNLABELLED = "num_sources: 2, noise: false"


def run_rank(rank: int, world_size: int, config_file: str, store: str) -> None:
    import os

    import torch.distributed as dist

    from sepdist.training import loop
    from sepdist.training.world import World

    os.environ["DS_ACCELERATOR"] = "cpu"
    slots.use_plugins(["tests"])  # where the estimator is
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    loop.train(config.load_frozen(config_file), World(rank, world_size, torch.device("cpu")))
    dist.barrier()
    dist.destroy_process_group()


def run(data: dict[str, str], folder: Path, world_size: int, on_gap: str, *more: str) -> list[dict]:
    """Train up to 8 steps, half of the batches unlabelled, with too wide a gap; returns the log."""
    options = [
        "objective=semisupervised",
        "objective.estimator.url=x",
        "objective.estimator._target_=tests.support.batches.Listener",
        "objective.labelled_share=0.5",
        "objective.epoch_samples=4",
        "objective.ramp_epochs=10",
        "objective.max_gap_db=-1000",
        f"objective.on_gap={on_gap}",
        "data.interleave=even",
        f"data.extra=[{{name: unlabelled, url: {data['train']}, {UNLABELLED}, weight: 1.0}}]",
        "training.max_steps=8",
        "validation.every_steps=2",
        "validation.num_mixtures=1",
    ]
    path = frozen(data, folder, *options, *more)
    mp.start_processes(
        run_rank,
        (world_size, path, str(folder / f"store-{world_size}")),
        nprocs=world_size,
        start_method="forkserver",
    )
    return read_metrics(str(folder))


def state_of(folder: Path) -> dict:
    return load_snapshot(find_committed(f"{folder}/checkpoints")[-1].url).state["objective"]


def test_a_run_that_is_cut_and_goes_on_at_another_world_size_keeps_the_weight_that_a_gap_left(
    tiny_data: dict[str, str], tmp_path: Path
) -> None:
    rows = run(tiny_data, tmp_path / "whole", 1, "down-weight")
    weights = [
        row["train/unsupervised_weight"] for row in rows if "train/unsupervised_weight" in row
    ]
    assert weights == [0.5 ** (step // 2) * step / 10 for step in range(8)]
    assert state_of(tmp_path / "whole") == {"factor": 0.5**4, "stop_reason": None}
    validation = [row for row in rows if "validation/gap" in row]
    assert len(validation) == 4
    for row in validation:
        gap = row["validation/predicted_si_snr"] - row["validation/si_snr"]
        assert row["validation/gap"] == pytest.approx(gap, abs=1e-4)

    run(tiny_data, tmp_path / "cut", 1, "down-weight", "training.max_steps=4")
    cut = run(tiny_data, tmp_path / "cut", 2, "down-weight", "engine.zero_stage=1")
    assert final_hash(tmp_path / "cut") == final_hash(tmp_path / "whole")
    assert state_of(tmp_path / "cut") == state_of(tmp_path / "whole")
    assert [
        row["train/unsupervised_weight"] for row in cut if "train/unsupervised_weight" in row
    ] == weights
    both = [row for row in cut if "loss/total" in row]
    assert all({"train/si_snr", "train/predicted_si_snr"} <= row.keys() for row in both), (
        "both kinds in every step"
    )


def test_a_run_whose_estimator_is_fooled_ends_with_the_figures_and_so_it_does_again(
    tiny_data: dict[str, str], tmp_path: Path
) -> None:
    for _ in range(2):
        rows = run(tiny_data, tmp_path, 1, "stop")
        assert max(row["step"] for row in rows) == 2
        (tmp_path / "store-1").unlink()
    shown = io.StringIO()
    summarise(
        config.load_frozen(str(tmp_path / "config.yaml")), Console(file=shown, soft_wrap=True)
    )
    row = next(row for row in rows if "validation/gap" in row)
    predicted = row["validation/predicted_si_snr"]
    assert f"ended at step 2: the SI-SNR estimator predicts {predicted:.2f} dB" in shown.getvalue()
    assert f"{row['validation/gap']:.2f} dB, above objective.max_gap_db=-1000" in shown.getvalue()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2


def test_a_relative_estimator_is_made_absolute_and_a_run_from_before_a_key_of_the_config_goes_on(
    tiny_data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    node = {
        "_target_": "sepdist.models.conv_tasnet.ConvTasNet",
        "num_filters": 4,
        "num_blocks": 1,
        "compile": False,
    }
    (tmp_path / "estimator").mkdir()
    (tmp_path / "estimator" / "model.yaml").write_text(
        yaml.safe_dump({"model": node, "sample_rate": 8000})
    )
    save_file(slots.build("model", node).state_dict(), tmp_path / "estimator" / "model.safetensors")
    options = [
        "objective=semisupervised",
        "objective.estimator.url=estimator",
        "objective.labelled_share=0.5",
    ]
    options += ["objective.epoch_samples=4", "training.max_steps=1"]
    options += [f"data.extra=[{{name: unlabelled, url: {tiny_data['train']}, {UNLABELLED}}}]"]
    cfg = config.load_frozen(frozen(tiny_data, tmp_path / "composed", *options))
    cfg.run_dir = str(tmp_path / "run")
    with pytest.raises(ValueError, match=r"is a ConvTasNet, .*set objective\.estimator\.url"):
        freeze(cfg, Console(quiet=True))
    monkeypatch.setattr(ConvTasNet, "estimates_si_snr", True, raising=False)
    card = {"model": node, "sample_rate": 16000}
    (tmp_path / "estimator" / "model.yaml").write_text(yaml.safe_dump(card))
    with pytest.raises(ConfigError, match="estimator works at 16000 Hz, sample_rate=8000"):
        freeze(cfg, Console(quiet=True))
    card["sample_rate"] = 8000
    (tmp_path / "estimator" / "model.yaml").write_text(yaml.safe_dump(card))
    freeze(cfg, Console(quiet=True))
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert f"url: {tmp_path}/estimator\n" in text
    older = yaml.safe_load(text)
    del older["data"]["interleave"]
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(older))
    freeze(cfg, Console(quiet=True))
    cfg.data.interleave = "even"
    with pytest.raises(ConfigError, match=r"another config: data\.interleave was drawn, is even"):
        freeze(cfg, Console(quiet=True))


def test_the_lineage_names_the_estimator_and_the_step_that_it_was_trained_to(
    tmp_path: Path,
) -> None:
    write_export(tmp_path / "estimator")
    estimator = load_estimator(str(tmp_path / "estimator"))
    objective = SemiSupervised(estimator, epoch_samples=1, labelled_share=0.5)
    assert with_defaults(objective).lineage() == {
        "estimator": {"url": str(tmp_path / "estimator"), "run": "toy", "step": 12}
    }
    other = SemiSupervised(Listener(), epoch_samples=1, labelled_share=0.5)
    assert with_defaults(other).lineage() == {}
