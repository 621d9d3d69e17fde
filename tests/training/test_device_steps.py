"""The step as it runs on a GPU, here with its tensors on the CPU: it waits only when it is read."""

import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from sepdist.models import compiling
from sepdist.reporting import read_metrics
from sepdist.training import engine as engine_module
from sepdist.training import world as world_module
from sepdist.training.checkpoint import find_committed, read_file
from sepdist.training.engine import DeepSpeedEngine, StepResult
from sepdist.training.ledger import SegmentRef, read_history
from sepdist.training.world import World
from tests.support.runs import frozen
from tests.support.steps import MICRO_BATCH, NUM_SHARDS, SquaredError, Toy, batch_of

NUM_STEPS, POISONED = 6, 3


class Waits(TorchDispatchMode):
    """Notes operations for whose result the host would have to wait for a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.met: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.").partition(".")[0]
        # Whole numbers are the positions of the batches, which stay on the host.
        on_host = name == "_local_scalar_dense" and args[0].dtype == torch.int64
        masks = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if masks or (name.startswith(self.WAITING) and not on_host):
            self.met.append(name)
        return func(*args, **(kwargs or {}))


class LabelledError(SquaredError):
    """Has a label of each item too, as separation has the rank of its permutation."""

    def __call__(self, model: Any, batch: Any) -> Any:
        loss, metrics = super().__call__(model, batch)
        return loss, metrics | {"permutation": torch.arange(len(batch.ids))}


def new_engine(on_device: bool, **options: Any) -> DeepSpeedEngine:
    torch.manual_seed(0)
    model = Toy()
    model.drop.p = 0.0  # merged passes have other dropout
    engine = DeepSpeedEngine(
        model,
        LabelledError(0, POISONED),
        lambda params: torch.optim.Adam(params, lr=1e-2, fused=on_device),
        World(0, 1, torch.device("cpu")),
        seed=0,
        num_virtual_shards=NUM_SHARDS,
        micro_batch=MICRO_BATCH,
        clip_norm=0.5,
        **options,
    )
    engine._guarded = on_device
    return engine


def train(engine: DeepSpeedEngine, reads: set[int], first: int = 0) -> dict[str, Any]:
    """Make steps and note what waits, the results at each step, and whether weights changed."""
    counted = [0]

    def to_host(values: Any) -> Any:
        counted[0] += 1
        return copy(values)

    copy, engine_module.to_host = engine_module.to_host, to_host
    waits, results, weights = [], list[list[StepResult]](), []
    for step in range(first, NUM_STEPS):
        engine.set_lr(1e-2 / (1 + step))
        batches, counted[0] = [batch_of(step, shard) for shard in range(NUM_SHARDS)], 0
        with Waits() as noted:
            results.append(engine.step(batches, math.inf, step == 4, step in reads))
        waits.append([*noted.met, *["read"] * counted[0]])
        state = engine.optimizer_state()
        weights.append((engine.weights(), state.tensors, state.scalars))
    engine_module.to_host = copy
    return {"waits": waits, "results": results, "states": weights}


def run_all(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    device: dict[str, Any] = {"reduction": "native", "merge_shards": 0}
    found = {
        "host": train(new_engine(False, reduction="canonical"), set()),
        "device": train(new_engine(True, **device), {0, NUM_STEPS - 1}),
        "canonical": train(new_engine(True, reduction="canonical"), {NUM_STEPS - 1}),
        "three": train(new_engine(False, reduction="native", merge_shards=3), set()),
    }
    half, rest = new_engine(True, **device), new_engine(True, **device)
    batches = [[batch_of(step, shard) for shard in range(NUM_SHARDS)] for step in (0, 1)]
    for step in (0, 1):
        half.set_lr(1e-2 / (1 + step))
        half.step(batches[step])
    rest.model.load_state_dict(half.weights())
    rest.load_optimizer_state(half.optimizer_state())
    found["resumed"] = train(rest, set(range(NUM_STEPS)), first=2)
    world_module.choose_kernels(tf32=True, determinism=True)
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    found["kernels"] = {
        "tf32": (torch.get_float32_matmul_precision(), cudnn.allow_tf32),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic),
        "attentions": [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()],
        "plain attention": cuda.math_sdp_enabled(),
        "workspace": os.environ["CUBLAS_WORKSPACE_CONFIG"],
    }
    Path(folder, "found.pickle").write_bytes(pickle.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("device")
    mp.start_processes(run_all, (str(folder),), nprocs=1, start_method="forkserver")
    return pickle.loads((folder / "found.pickle").read_bytes())


def flat(run: dict[str, Any]) -> list[StepResult]:
    return [result for results in run["results"] for result in results]


@pytest.mark.parametrize("name", ["device", "canonical"])
def test_a_step_waits_for_nothing_and_one_reading_brings_the_results_of_all(
    name: str, found: dict[str, Any]
) -> None:
    run, reads = found[name], {"device": {0, 5}, "canonical": {5}}[name]
    assert run["waits"] == [["read"] if step in reads else [] for step in range(NUM_STEPS)]
    assert len(flat(run)) == NUM_STEPS
    expected = [1, 0, 0, 0, 0, 5] if name == "device" else [0, 0, 0, 0, 0, 6]
    assert [len(results) for results in run["results"]] == expected
    assert [one.stopping for one in flat(run)] == [step == 4 for step in range(NUM_STEPS)]


@pytest.mark.parametrize("name", ["device", "canonical", "three"])
def test_what_is_read_is_what_a_step_on_the_host_returns(name: str, found: dict[str, Any]) -> None:
    for step, (one, other) in enumerate(zip(flat(found[name]), flat(found["host"]), strict=True)):
        assert one.applied is other.applied is (step != POISONED)
        assert [metrics["permutation"].tolist() for metrics in one.local_metrics] == [[0, 1]] * 4
        if step != POISONED:
            assert one.loss == pytest.approx(other.loss, rel=1e-5)
            assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
            assert one.means == pytest.approx(other.means, rel=1e-5)
    last, host = found[name]["states"][-1][0], found["host"]["states"][-1][0]
    torch.testing.assert_close(last, host, rtol=1e-3, atol=1e-5)


def test_a_step_left_out_on_the_device_moves_neither_weights_nor_the_optimizer(
    found: dict[str, Any],
) -> None:
    for name in ("device", "canonical"):
        states = found[name]["states"]
        torch.testing.assert_close(states[POISONED], states[POISONED - 1], rtol=0, atol=0)
        counts = [scalars["step"] for _, _, scalars in states]
        assert counts == [1, 2, 3, 3, 4, 5]


def test_a_resumed_run_goes_on_as_if_it_had_not_been_cut(found: dict[str, Any]) -> None:
    torch.testing.assert_close(
        found["resumed"]["states"][-1], found["device"]["states"][-1], rtol=0, atol=0
    )


def test_kernels_on_a_gpu_are_those_that_the_options_ask_for(found: dict[str, Any]) -> None:
    assert found["kernels"] == {
        "tf32": ("high", True),
        "deterministic": (True, True),
        "attentions": [False, False],
        "plain attention": True,
        "workspace": ":16:8",  # the one that torch names for cuBLAS and for cuDNN's LSTM
    }


def test_compiled_models_are_kept_below_the_cache_unless_the_user_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    compiling.keep_compiled(str(tmp_path))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    compiling.keep_compiled(str(tmp_path))
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent == tmp_path / "inductor"


def run_loop(rank: int, config_file: str, on_device: bool) -> None:
    from sepdist import config
    from sepdist.training import loop

    def start(self: DeepSpeedEngine) -> None:
        made(self)
        self._guarded = on_device

    made, DeepSpeedEngine.__post_init__ = DeepSpeedEngine.__post_init__, start
    os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    loop.train(config.load_frozen(config_file), World(0, 1, torch.device("cpu")))


@pytest.mark.slow
def test_a_run_that_reads_once_per_log_line_logs_and_records_what_one_does_that_reads_each_step(
    tiny_data: dict[str, str], tmp_path: Path
) -> None:
    every = ["training.max_steps=10", "training.checkpoint_every=4", "validation.every_steps=7"]
    rows, histories = [], []
    for name, on_device in (("device", True), ("host", False)):
        more = [*every, "training.log_every=3", "optim.fused=true", f"run_dir={tmp_path}/{name}"]
        path = frozen(tiny_data, tmp_path / name, *more)
        mp.start_processes(run_loop, (path, on_device), nprocs=1, start_method="forkserver")
        rows.append(read_metrics(str(tmp_path / name)))
        newest = find_committed(str(tmp_path / name / "checkpoints"))[-1]
        segment = SegmentRef(**json.loads(read_file(newest, "state.json"))["ledger"])
        histories.append(list(read_history(str(tmp_path / name), segment)))
    assert histories[0] == histories[1]
    rates = [[row for row in one if "switching/rate" in row] for one in rows]
    assert [row["switching/rate"] for row in rates[0]] == [
        row["switching/rate"] for row in rates[1]
    ]
    # An epoch's end is logged when its step is read.
    assert all(late["step"] >= row["step"] for late, row in zip(*rates, strict=True))
    logged = [[row for row in one if "switching/rate" not in row] for one in rows]
    assert [row["step"] for row in logged[0]] == [row["step"] for row in logged[1]]
    for one, other in zip(*logged, strict=True):
        kept = [name for name in other if name.startswith(("loss", "train", "valid", "optim"))]
        assert {name: one[name] for name in kept} == pytest.approx(
            {name: other[name] for name in kept}, rel=1e-4, nan_ok=True
        )
