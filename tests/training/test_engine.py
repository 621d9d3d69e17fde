"""A step of the engine is one over the global batch, at any world size, stage and reduction."""

import hashlib
import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from torch import Tensor, nn

from sepdist import config
from sepdist.config import ConfigError
from sepdist.data.order import owned_virtual_shards
from sepdist.data.records import Batch
from sepdist.training.checkpoint import OptimizerState
from sepdist.training.engine import DeepSpeedEngine, check_engine_options
from sepdist.training.run import freeze
from sepdist.training.world import World
from tests.support.runs import frozen, program
from tests.support.steps import MICRO_BATCH, NUM_SHARDS, SquaredError, Toy, batch_of


def run_steps(rank: int, world_size: int, folder: str, options: dict) -> None:
    """Steps [first, last) of a run, its state taken from and left in `folder`."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    store = f"file://{folder}/store-{options['key']}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    torch.manual_seed(0)
    model, saved = Toy(), None
    model.drop.p = options.get("dropout", 0.2)
    num_shards = options.get("num_shards", NUM_SHARDS)
    if options["first"]:
        saved = torch.load(f"{folder}/state.pt", weights_only=True)
        model.load_state_dict(saved["weights"])
    objective = SquaredError(options.get("branching", 0), options.get("poisoned", -1))
    calls = Path(folder, f"{options['key']}.calls")

    def noted(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with calls.open("a") as file:
            file.write(f"{rank}\n")
        return objective(model, batch)

    engine = DeepSpeedEngine(
        model,
        noted,
        lambda params: torch.optim.Adam(params, lr=1e-2),
        World(rank, world_size, torch.device("cpu")),
        seed=0,
        num_virtual_shards=num_shards,
        micro_batch=MICRO_BATCH,
        zero_stage=options["stage"],
        precision=options.get("precision", "fp32"),
        allow_slow_bf16=True,
        reduction=options.get("reduction", "canonical"),
        merge_shards=options.get("merge_shards", 1),
        clip_norm=0.5,
        ema_decay=options.get("ema_decay", 0.0),
    )
    if saved:
        engine.load_optimizer_state(OptimizerState(saved["tensors"], saved["scalars"]))
        if engine.average:
            engine.average.model.load_state_dict(saved["average"])
            engine.average.num_updates = options["first"]
    losses, norms, applied, changed = [], [], [], []
    for step in range(options["first"], options["last"]):
        engine.set_lr(1e-2 / (1 + step))
        owned = owned_virtual_shards(num_shards, rank, world_size)
        before = engine.weights()
        [result] = engine.step([batch_of(step, shard, num_shards) for shard in owned])
        losses.append(result.loss.hex())
        norms.append(result.grad_norm)
        applied.append(result.applied)
        after = engine.weights()
        changed.append(any(not torch.equal(before[name], after[name]) for name in before))
    weights, optimizer = engine.weights(), engine.optimizer_state()
    average = engine.averaged_weights()
    if rank == 0:
        state = {"weights": weights, "tensors": optimizer.tensors, "scalars": optimizer.scalars}
        torch.save(state | {"average": average}, f"{folder}/state.pt")
        digest, average_digest = (
            hashlib.sha256(b"".join(x.numpy().tobytes() for x in one.values())).hexdigest()
            for one in (weights, average)
        )
        text = json.dumps(
            {
                "losses": losses,
                "norms": norms,
                "applied": applied,
                "changed": changed,
                "digest": digest,
                "average": average_digest,
            }
        )
        Path(f"{folder}/{options['key']}.json").write_text(text)
    dist.barrier()
    dist.destroy_process_group()


def run(
    folder: Path, world_size: int, stage: int, first: int = 0, last: int = 6, **options: object
) -> dict:
    key = f"{world_size}-{stage}-{first}-{last}-{'-'.join(map(str, options.values()))}"
    arguments = {"key": key, "stage": stage, "first": first, "last": last} | options
    mp.start_processes(
        run_steps,
        (world_size, str(folder), arguments),
        nprocs=world_size,
        start_method="forkserver",
    )
    return json.loads((folder / f"{key}.json").read_text())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return run(tmp_path_factory.mktemp("reference"), 1, 0)


def test_one_step_is_adam_on_the_clipped_mean_gradient(tmp_path: Path) -> None:
    """Worked out here with plain torch: mean loss over the global batch, clip, Adam."""
    ours = run(tmp_path, 1, 0, last=3, branching=0)
    torch.manual_seed(0)
    model = Toy()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    from sepdist import seeding

    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        losses = []
        for shard in range(NUM_SHARDS):
            batch = batch_of(step, shard)
            torch.manual_seed(seeding.torch_seed(0, "dropout", int(batch.positions[0])))
            losses.append(SquaredError(0)(model, batch)[0])
        loss = torch.stack(losses).mean()
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            [p for p in model.parameters() if p.grad is not None], 0.5
        )
        optimizer.step()
        assert float.fromhex(ours["losses"][step]) == pytest.approx(loss.item(), rel=1e-5)
        assert ours["norms"][step] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize(("world_size", "stage"), [(2, 0), (3, 0), (2, 1), (4, 1), (2, 2)])
def test_canonical_steps_have_the_same_bits_at_any_world_size_and_stage(
    world_size: int, stage: int, tmp_path: Path, uninterrupted: dict
) -> None:
    assert run(tmp_path, world_size, stage) == uninterrupted


def test_a_run_cut_and_continued_at_another_world_size_and_stage_has_the_same_bits(
    tmp_path: Path, uninterrupted: dict
) -> None:
    parts = [run(tmp_path, 2, 1, 0, 2), run(tmp_path, 1, 0, 2, 4), run(tmp_path, 3, 1, 4, 6)]
    assert [loss for part in parts for loss in part["losses"]] == uninterrupted["losses"]
    assert parts[-1]["digest"] == uninterrupted["digest"]


def test_bf16_has_the_same_bits_at_any_world_size_too(tmp_path: Path, uninterrupted: dict) -> None:
    one = run(tmp_path, 1, 0, precision="bf16")
    assert run(tmp_path, 2, 1, precision="bf16") == one
    assert one["digest"] != uninterrupted["digest"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1])
def test_eight_virtual_shards_have_the_same_bits_at_one_to_eight_workers(
    stage: int, precision: str, tmp_path: Path
) -> None:
    runs = [
        run(tmp_path, size, stage, precision=precision, num_shards=8) for size in (1, 2, 3, 4, 8)
    ]
    assert all(found == runs[0] for found in runs)


@pytest.mark.parametrize("stage", [0, 1])
def test_batches_that_take_different_branches_on_different_ranks_never_mix_gradients(
    stage: int, tmp_path: Path
) -> None:
    assert run(tmp_path, 2, stage, branching=2) == run(tmp_path, 1, 0, branching=2)


def test_native_reduction_without_zero_is_right_where_ranks_take_different_branches(
    tmp_path: Path,
) -> None:
    ours = run(tmp_path, 2, 0, last=3, reduction="native", branching=2)
    expected = run(tmp_path, 1, 0, last=3, branching=2)
    losses = [float.fromhex(loss) for loss in ours["losses"]]
    assert losses == pytest.approx([float.fromhex(loss) for loss in expected["losses"]], rel=1e-4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_native_reduction_refuses_branches_whose_gradients_zero_would_mix(
    stage: int, tmp_path: Path
) -> None:
    with pytest.raises(
        mp.ProcessRaisedException, match=r"(head|other)\.\w+ and .*engine\.reduction=canonical"
    ):
        run(tmp_path, 2, stage, last=1, reduction="native", branching=2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_native_reduction_agrees_to_rounding_and_resumes(
    stage: int, tmp_path: Path, uninterrupted: dict
) -> None:
    whole = run(tmp_path, 2, stage, 0, 3, reduction="native")
    rest = run(tmp_path, 2, stage, 3, 6, reduction="native")
    losses = [float.fromhex(loss) for loss in whole["losses"] + rest["losses"]]
    assert losses == pytest.approx(
        [float.fromhex(loss) for loss in uninterrupted["losses"]], rel=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_merged_virtual_shards_give_the_steps_of_separate_ones(stage: int, tmp_path: Path) -> None:
    """Without dropout, whose masks are other ones; 6 virtual shards in passes of 2 and 1."""
    options = {"last": 4, "num_shards": 6, "dropout": 0.0}
    expected = run(tmp_path, 1, 0, **options)
    ours = run(tmp_path, 2, stage, reduction="native", merge_shards=2, **options)
    for name in ("losses", "norms"):
        found, wanted = (
            [float.fromhex(one) if name == "losses" else one for one in made[name]]
            for made in (ours, expected)
        )
        assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_the_average_has_the_same_bits_at_any_world_size_and_stage(tmp_path: Path) -> None:
    whole = run(tmp_path, 1, 0, ema_decay=0.9)
    expected = torch.load(tmp_path / "state.pt", weights_only=True)["average"]
    assert whole["average"] != whole["digest"]
    for world_size, stage in ((2, 0), (3, 1), (2, 2)):
        assert run(tmp_path, world_size, stage, ema_decay=0.9) == whole
    run(tmp_path, 2, 1, 0, 3, ema_decay=0.9)
    assert run(tmp_path, 1, 0, 3, 6, ema_decay=0.9)["average"] == whole["average"]
    bf16 = [run(tmp_path, size, 0, ema_decay=0.9, precision="bf16") for size in (1, 2)]
    assert bf16[0] == bf16[1] and bf16[0]["average"] != whole["average"]
    for stage in (0, 1, 2, 3):
        run(tmp_path, 2, stage, 0, 3, ema_decay=0.9, reduction="native")
        run(tmp_path, 2, stage, 3, 6, ema_decay=0.9, reduction="native")
        found = torch.load(tmp_path / "state.pt", weights_only=True)["average"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_one_rank_of_a_node_runs_a_pass_before_the_others_begin(tmp_path: Path) -> None:
    run(tmp_path, 3, 0, last=1)
    calls = (tmp_path / "3-0-0-1-.calls").read_text().split()
    assert calls[0] == "0" and sorted(calls) == ["0", "0", "0", "1", "2"]


@pytest.mark.parametrize(
    ("stage", "reduction"),
    [
        (0, "canonical"),
        (1, "canonical"),
        (0, "native"),
        (1, "native"),
        (2, "native"),
        (3, "native"),
    ],
)
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all_and_the_next_step_is_sound(
    stage: int, reduction: str, tmp_path: Path
) -> None:
    met = run(tmp_path, 2, stage, last=4, reduction=reduction, poisoned=1)
    assert met["applied"] == [True, False, True, True] == met["changed"]
    assert not math.isfinite(met["norms"][1])
    assert all(math.isfinite(float.fromhex(loss)) for loss in met["losses"][2:])


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ((4, "fp32", "native", 1), r"zero_stage=4: choose one of \(0, 1, 2, 3\)"),
        ((0, "fp16", "native", 1), r"\('fp32', 'bf16'\)"),
        ((0, "fp32", "ring", 1), r"\('canonical', 'native'\)"),
        ((0, "fp32", "canonical", 5), "num_virtual_shards"),
        ((3, "fp32", "canonical", 2), "reduction=native"),
        ((0, "fp32", "native", 3), "divides"),
        ((1, "bf16", "native", 2, True), "zero_stage=0, not 1.*cuda_graphs=false"),
        ((0, "bf16", "native", 2, True, True), "checkpoint_activations=true.*cuda_graphs=false"),
    ],
)
def test_options_that_cannot_work_are_refused_with_what_to_set(options: tuple, advice: str) -> None:
    stage, precision, reduction, world_size, *more = options
    given = {"zero_stage": stage, "precision": precision, "reduction": reduction}
    given |= dict(zip(("cuda_graphs", "checkpoint_activations"), more, strict=False))
    with pytest.raises(ConfigError, match=advice):
        check_engine_options(given, 4, world_size)


def test_settings_that_cannot_work_are_refused_before_a_worker_starts(
    tiny_data: dict[str, str], tmp_path: Path
) -> None:
    path = frozen(tiny_data, tmp_path / "run")
    for section, key, value, words in (
        ("engine", "clip_norm", -5, r"engine\.clip_norm=-5: it is at least 0"),
        ("engine", "merge_shards", -1, r"engine\.merge_shards=-1: it is at least 0"),
        ("engine", "bucket_elements", 0, r"engine\.bucket_elements=0: it is at least 1"),
        ("engine", "clip_norm", "abc", r"engine\.clip_norm='abc': it must be of type float"),
        ("engine", "tf32", "maybe", r"engine\.tf32='maybe': it must be of type bool"),
        ("engine", "foo", 1, r"DeepSpeedEngine: .*'foo'; it takes"),
        ("data", "crop_seconds", 0.001, r"data\.crop_seconds=0\.001: .* 8 samples; .* takes 32 "),
        ("validation", "max_seconds", 0.001, r"validation\.max_seconds=0\.001: .* 8 samples"),
        ("init", "reinit", ["nonsense"], r"init\.reinit choose from init\.weights"),
    ):
        cfg = config.load_frozen(path)
        part = getattr(cfg, section)
        (part if section == "engine" else vars(part))[key] = value
        with pytest.raises(ConfigError, match=words):
            freeze(cfg, Console(quiet=True))


def test_bf16_is_refused_on_a_cpu_without_bf16_arithmetic_unless_the_user_insists(
    tiny_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the driver, and in the worker, whose CPU may be another one."""
    path = frozen(tiny_data, tmp_path / "run", "engine.precision=bf16", "training.max_steps=1")
    old_cpu = {"ONEDNN_MAX_CPU_ISA": "AVX2", "DS_ACCELERATOR": "cpu"}
    worker = program("-m", "sepdist.training.loop", path, expect=1, **old_cpu)
    assert "this CPU has no bf16 arithmetic" in worker and "engine.precision=fp32" in worker

    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    cfg = config.load_frozen(path)
    with pytest.raises(ConfigError, match=r"50\.7 s.*engine\.allow_slow_bf16=true"):
        freeze(cfg, Console(quiet=True))
    cfg.cluster.address = "elsewhere:6379"  # its workers' CPUs are not known here
    freeze(cfg, Console(quiet=True))
    (tmp_path / "run" / "config.yaml").unlink()
    cfg.cluster.address, cfg.engine["allow_slow_bf16"] = None, True
    freeze(cfg, Console(quiet=True))
