"""Whole runs of an SI-SNR estimator on a separator's estimates; its checkpoint stands alone."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console

from sepdist import config
from sepdist.config import EvaluateConfig, ShardConfig
from sepdist.data.sharding import write_data_set
from sepdist.inference.estimation import evaluate_estimator
from sepdist.models.ssqp import SSQPNet
from sepdist.objectives.quality import Quality
from sepdist.reporting import read_metrics
from sepdist.training.engine import DeepSpeedEngine
from sepdist.training.world import World
from tests.support.batches import batch_of, voices
from tests.support.exports import write_export
from tests.support.runs import final_hash, frozen
from tests.support.ssqp import TINY, stored


def run_rank(rank: int, world_size: int, config_file: str, store: str) -> None:
    import os

    from sepdist.training import loop

    os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    loop.train(config.load_frozen(config_file), World(rank, world_size, torch.device("cpu")))
    dist.barrier()
    dist.destroy_process_group()


def test_an_estimator_trains_to_the_same_bits_at_any_world_size_and_its_checkpoint_stands_alone(
    tiny_data: dict[str, str], tmp_path: Path
) -> None:
    write_export(tmp_path / "separator")
    for split in ("train", "dev"):
        corpus = {
            "_target_": "sepdist.inference.separated.Separated",
            "data": tiny_data[split],
            "model": str(tmp_path / "separator"),
        }
        cfg = ShardConfig(
            corpus=corpus, split=split, output=str(tmp_path / split), samples_per_shard=4
        )
        write_data_set(cfg, Console(quiet=True))
    stored("wav2vec2", tmp_path / "hub")
    settings = ["model=ssqp_wav2vec2", f"model.pretrained={tmp_path / 'hub'}", "objective=quality"]
    settings += [
        "data.crop_seconds=0.3",
        "data.micro_batch=1",
        "data.num_virtual_shards=2",
        "data.noise=true",
    ]
    settings += ["training.max_steps=3", "training.log_every=1", "validation.every_steps=3"]
    settings += [
        "validation.num_mixtures=3",
        "validation.num_listening=1",
        "validation.max_seconds=0.5",
    ]
    data = {"train": str(tmp_path / "train"), "dev": str(tmp_path / "dev")}
    for size in (1, 2):
        folder = tmp_path / f"run-{size}"
        path = frozen(data, folder, settings=settings)
        mp.start_processes(
            run_rank, (size, path, str(folder / "store")), nprocs=size, start_method="forkserver"
        )
    assert final_hash(tmp_path / "run-1") == final_hash(tmp_path / "run-2")
    row = {
        name: value for row in read_metrics(str(tmp_path / "run-1")) for name, value in row.items()
    }
    assert row["validation/loss"] == pytest.approx(row["validation/mae"], rel=1e-6)
    assert "validation/true_si_snr" in row and "validation/si_snr" not in row

    (tmp_path / "hub").rename(tmp_path / "gone")
    cfg = EvaluateConfig(
        str(tmp_path / "run-1"), data["dev"], str(tmp_path / "scores"), noise=True, num_workers=0
    )
    assert evaluate_estimator(cfg, Console(quiet=True))["num_mixtures"] == 4


def zero_rank(rank: int, folder: str, family: str) -> None:
    """Losses and weights at ZeRO 0 and 3, of an encoder large enough to be partitioned."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    wide = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "conv_dim": [64] * 7,
        "num_conv_pos_embeddings": 32,
    }
    wide = {"d_model": 128, "encoder_ffn_dim": 256} if family == "whisper" else wide
    found = []
    for stage in (0, 3):
        torch.manual_seed(0)
        model = SSQPNet(
            encoder=TINY[family] | wide, gradient_checkpointing=stage == 3, freeze="convolutions"
        )
        names = set(model.state_dict())
        engine = DeepSpeedEngine(
            model,
            Quality(),
            lambda params: torch.optim.Adam(params, lr=1e-3),
            World(rank, 2, torch.device("cpu")),
            seed=0,
            num_virtual_shards=2,
            micro_batch=1,
            zero_stage=stage,
            reduction="native",
        )
        losses = []
        for step in range(3):
            batch = batch_of(voices(1, 2, 2000, seed=2 * step + rank))
            batch.estimates = batch.sources + 0.2 * batch.sources.flip(1)
            losses.append(engine.step([batch])[-1].loss)
        weights = engine.weights()
        assert rank or set(weights) == names
        found.append((losses, weights))
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["wav2vec2", "wavlm", "whisper"])
def test_zero_3_with_checkpointing_trains_as_zero_0_and_keeps_what_is_frozen(
    family: str, tmp_path: Path
) -> None:
    mp.start_processes(zero_rank, (str(tmp_path), family), nprocs=2, start_method="forkserver")
    (losses, weights), (again, weights_again) = torch.load(tmp_path / "found.pt", weights_only=True)
    assert again == pytest.approx(losses, rel=1e-5)
    assert weights.keys() == weights_again.keys()
    for name, value in weights.items():
        torch.testing.assert_close(
            weights_again[name], value, atol=2e-3, rtol=0
        )  # Adam's steps of 1e-3 may turn
