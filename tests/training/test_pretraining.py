"""MAMA and CC runs give a separation run its initial weights, all but those of the last layer."""

from pathlib import Path

import safetensors.torch
import torch
import torch.multiprocessing as mp

from sepdist import config
from sepdist.reporting import read_metrics
from sepdist.training.handoff import find_export
from tests.support.runs import TINY, frozen

ONE_PERSON = ["num_speakers=1", "data.num_sources=1", "data.noise=true", "training.max_steps=2"]
CONTEXT = [
    "model=conv_tasnet_context",
    "scale=mini",
    "objective=contrastive",
    "model.num_hidden=16",
    "model.num_targets=32",
]


def run_stages(rank: int, config_files: list[str], store: str) -> None:
    import torch.distributed as dist

    from sepdist.training import loop
    from sepdist.training.world import World

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=1)
    for config_file in config_files:
        loop.train(config.load_frozen(config_file), World(rank, 1, torch.device("cpu")))
    dist.destroy_process_group()


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(find_export(str(run_dir))) / "model.safetensors")


def test_masked_and_contrastive_runs_hand_their_separator_to_a_separation_run(
    tiny_data: dict[str, str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    masked, contrastive, first, second = (
        tmp_path / name for name in ("masked", "contrastive", "first", "second")
    )
    # ZeRO-3 for CC: its network uses one layer several times, and no decoder of the separator.
    inside = [setting.replace("model.", "model.separator.") for setting in TINY]
    partitioned = ["engine.zero_stage=3", "engine.reduction=native"]
    separation = ["num_speakers=2", "init.reinit=[mask_conv]", "training.max_steps=1", "optim.lr=0"]
    separation.append("validation.num_listening=0")
    files = [
        frozen(tiny_data, masked, *ONE_PERSON, "objective=masked", "model.masking=false"),
        frozen(tiny_data, contrastive, *CONTEXT, *ONE_PERSON, *partitioned, settings=inside),
        frozen(tiny_data, first, *separation, f"init.weights={masked}"),
        frozen(
            tiny_data,
            second,
            *separation,
            f"init.weights={contrastive}",
            "init.submodule=separator",
        ),
    ]
    mp.start_processes(
        run_stages, (files, str(tmp_path / "store")), nprocs=1, start_method="forkserver"
    )

    for run_dir, metric in ((masked, "l1"), (contrastive, "accuracy")):
        rows = read_metrics(str(run_dir))
        assert [row["step"] for row in rows if f"train/{metric}" in row] == [1, 2]
        (validation,) = (row for row in rows if f"validation/{metric}" in row)
        assert validation["validation/loss"] > 0
    prefix = "separator."
    parents = {
        first: weights(masked),
        second: {
            k.removeprefix(prefix): v
            for k, v in weights(contrastive).items()
            if k.startswith(prefix)
        },
    }
    for run_dir, parent in parents.items():
        child = weights(run_dir)
        assert child.keys() == parent.keys()
        differing = {name for name in child if not torch.equal(child[name], parent[name])}
        assert differing == {"mask_conv.weight", "mask_conv.bias"}, (
            "nothing was learned at a rate of 0"
        )
        assert "validation/si_snri" in read_metrics(str(run_dir))[-1]
