"""THE loop: a frozen config in; metrics, pictures and committed checkpoints out. It knows nothing of Ray.

    python -m sepdist.training.loop RUN_DIR/config.yaml                        # one process
    torchrun --nproc-per-node 2 -m sepdist.training.loop RUN_DIR/config.yaml   # a GPU box without Ray

`sepdist.training.launch` runs the same function in Ray Train workers.
"""

import argparse
import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from sepdist import config, seeding, storage
from sepdist.config import TrainConfig
from sepdist.data.records import MAIN, Batch
from sepdist.data.stream import TrainStream
from sepdist.metrics.switching import SwitchTracker
from sepdist.reporting import Reporter
from sepdist.training.checkpoint import (
    Checkpointer,
    CheckpointError,
    Snapshot,
    collect_orphans,
    load_newest,
    load_snapshot,
)
from sepdist.training.datasets import open_datasets
from sepdist.training.engine import (
    DeepSpeedEngine,
    StepResult,
    origins,
    restore,
    speaker_outputs,
    state_of,
    stop_reason,
    tell,
)
from sepdist.training.goodput import Goodput
from sepdist.training.guard import GradientGuard, Rollback
from sepdist.training.handoff import inherit, load_weights
from sepdist.training.ledger import APPLIED, LEFT_OUT, SKIPPED, Ledger, Link, merge
from sepdist.training.meter import Meter, readable
from sepdist.training.schedule import PlateauSchedule
from sepdist.training.validation import listen, validate
from sepdist.training.watchdog import Watchdog
from sepdist.training.world import World, gather_objects, join_world

logger = logging.getLogger(__name__)

GOODPUT_FILE = "goodput.json"


def train(
    cfg: TrainConfig,
    world: World,
    report: Callable[[dict[str, float]], None] = lambda metrics: None,
    preempted: Callable[[], bool] = lambda: False,
) -> None:
    """Train until `training.max_steps` or early stop, from the newest committed checkpoint of the run if there is one.

    `report` is called on every rank with the metrics of each validation (Ray Train's report is a barrier). `preempted`
    is called on every rank each `cluster.preemption_check_steps` steps and answers the same on all: whether a machine
    is about to be taken away, so that a checkpoint is committed at once.

    Raises:
        RuntimeError: steps went wrong again after `training.max_rollbacks` rollbacks.
    """
    torch.set_num_threads(cfg.cluster.threads_per_worker)
    watchdog = Watchdog(cfg.cluster.hang_seconds, cfg.cluster.startup_seconds)
    left_out: list[list[int]] = []
    try:
        while True:
            try:
                attempt(cfg, world, report, preempted, watchdog, left_out)
                return
            except Rollback as rollback:  # on all ranks alike
                left_out.append([rollback.first, rollback.stop])
                logger.warning(
                    "%s: going back to the newest checkpoint, to go on without them", rollback
                )
                watchdog.expect_slow()
    finally:
        watchdog.close()


def attempt(
    cfg: TrainConfig,
    world: World,
    report: Callable[[dict[str, float]], None],
    preempted: Callable[[], bool],
    watchdog: Watchdog,
    left_out: list[list[int]],
) -> None:
    """Train from the newest checkpoint to the end, without the steps `left_out` ([first, stop) each).

    Raises:
        Rollback: `training.max_skipped` steps in a row had no usable gradient.
    """
    # 1. Data: the order is a pure function of the position, so the step number is all the state there is.
    feeds, validation_set = open_datasets(cfg)
    stream = TrainStream(
        feeds,
        seed=cfg.seed,
        num_virtual_shards=cfg.data.num_virtual_shards,
        micro_batch=cfg.data.micro_batch,
        rank=world.rank,
        world_size=world.size,
        num_threads=cfg.data.num_threads,
        prefetch_steps=cfg.data.prefetch_steps,
        max_damaged=cfg.data.max_damaged,
        weights={one.name: one.weight for one in cfg.data.extra if one.weight is not None},
        interleave=cfg.data.interleave,
    )
    global_batch = cfg.data.num_virtual_shards * cfg.data.micro_batch
    step_seconds_of_audio = global_batch * cfg.data.crop_seconds

    # 2. Weights: of the newest checkpoint, else of the parent stage, else fresh.
    torch.manual_seed(seeding.torch_seed(cfg.seed, "weights"))
    model = config.build(cfg.model)
    objective = config.build(cfg.objective)
    snapshot = agree_on_newest(cfg.run_dir, world)
    lineage = initialise(model, cfg, snapshot) | origins(objective)

    # 3. Engine, schedule, guard and label-switch table, continued from the checkpoint.
    engine: DeepSpeedEngine = config.build(
        cfg.engine,
        model=model,
        objective=objective,
        make_optimizer=lambda params: config.build(cfg.optim, params=params),
        world=world,
        seed=cfg.seed,
        num_virtual_shards=cfg.data.num_virtual_shards,
        micro_batch=cfg.data.micro_batch,
    )
    schedule = PlateauSchedule(
        cfg.optim["lr"],
        warmup_steps=cfg.schedule.warmup_steps,
        factor=cfg.schedule.factor,
        patience=cfg.schedule.patience,
        min_lr=cfg.schedule.min_lr,
        early_stop_patience=cfg.training.early_stop_patience,
        decay_steps=cfg.schedule.decay_steps,
        max_steps=cfg.training.max_steps,
    )
    guard = GradientGuard(
        spike_factor=cfg.training.spike_factor, max_skipped=cfg.training.max_skipped
    )
    switches = SwitchTracker()
    ledger = Ledger()
    first_step, previous = 0, None
    if snapshot is not None:
        check_same_data(snapshot.state, data_state(cfg, stream, 0))
        first_step = snapshot.step
        engine.load_optimizer_state(snapshot.optimizer)
        schedule.load_state_dict(snapshot.state["schedule"])
        guard.load_state_dict(snapshot.state["guard"])
        switches.load_state_dict(snapshot.state["switches"])
        restore(objective, snapshot.state.get("objective", {}))
        previous = Link(**snapshot.state["ledger"])
        windows = {(first, stop) for first, stop in (*left_out, *snapshot.state["left_out"])}
        left_out[:] = [[first, stop] for first, stop in sorted(windows)]
    if len(left_out) > cfg.training.max_rollbacks:
        raise RuntimeError(
            f"steps {left_out[-1][0]} to {left_out[-1][1] - 1} have no usable gradient either, after "
            f"{cfg.training.max_rollbacks} rollbacks: lower optim.lr, or look at optim/grad_norm in metrics.jsonl"
        )
    reporter = goodput = checkpointer = None
    if world.is_main:
        reporter = Reporter(cfg.run_dir, resume_step=first_step)
        goodput = continue_goodput(reporter, cfg.run_dir)
        collect_orphans(cfg.run_dir)
        checkpointer = Checkpointer(
            cfg.run_dir,
            model_node=cfg.model | getattr(model, "node_changes", {}),
            sample_rate=cfg.sample_rate,
            outputs=speaker_outputs(objective),
            lineage=lineage,
            keep_last=cfg.training.keep_last,
            keep_best=cfg.training.keep_best,
            keep_every=cfg.training.keep_every,
            max_failed=cfg.training.max_failed_checkpoints,
            previous=previous,
        )
    logger.info(
        "training from step %d to %d on %d worker(s)",
        first_step,
        cfg.training.max_steps,
        world.size,
    )

    # 4. The loop.
    meter = Meter(stream, world, goodput)
    steps = stream.steps(first_step)
    try:
        for step in range(first_step, cfg.training.max_steps):
            if schedule.should_stop:
                logger.info(
                    "early stop: no better validation for %d of them",
                    cfg.training.early_stop_patience,
                )
                break
            if reason := stop_reason(objective):
                logger.warning("step %d: the run ends: %s", step, reason)
                break
            positions = range(step * global_batch, (step + 1) * global_batch)
            batches = next(steps)
            rates: dict[str, float] = {}
            if any(first <= step < stop for first, stop in left_out):
                ledger.record(step, LEFT_OUT)
            else:
                engine.set_lr(schedule.lr(step))
                result = engine.step(batches, guard.limit)
                ledger.record(step, APPLIED if result.applied else SKIPPED, batches)
                guard.observe(step, result.grad_norm, result.applied)
                rates = track_switches(switches, batches, result, stream, positions, world)
                meter.add(result)
            watchdog.beat()
            done = step + 1
            last = done == cfg.training.max_steps

            if reporter and rates:
                reporter.log(done, rates)
            if done % cfg.training.log_every == 0 or last:
                metrics = meter.read(step_seconds_of_audio) | {"optim/lr": schedule.lr(step)}
                metrics |= {"optim/rollbacks": float(len(left_out))}
                if reporter and goodput:
                    reporter.log(done, metrics)
                    reporter.note(GOODPUT_FILE, goodput.note(time.time()))
            score = None
            if done % cfg.validation.every_steps == 0 or last:
                watchdog.expect_slow()
                with meter.pause():
                    metrics = validate(
                        engine, objective, validation_set, world, cfg.validation, watchdog.beat
                    )
                    score = metrics["score"]
                    improved = schedule.observe(score)
                    tell(objective, metrics)
                    listen(engine, objective, validation_set, reporter, done, cfg.validation)
                if reporter:
                    reporter.log(
                        done,
                        {f"validation/{name}": v for name, v in metrics.items() if name != "score"},
                    )
                logger.info(
                    "step %d: validation %s%s",
                    done,
                    readable(metrics),
                    " (best so far)" if improved else "",
                )
                report({"step": float(done)} | metrics)
            leaving = done % cfg.cluster.preemption_check_steps == 0 and preempted()
            if leaving:
                logger.warning(
                    "step %d: a machine is about to be taken away; committing a checkpoint", done
                )
            due = score is not None or leaving or done % cfg.training.checkpoint_every == 0
            if last or (
                due and not guard.num_in_a_row
            ):  # in a bad spell the checkpoint before it may be wanted
                if reporter:
                    reporter.flush()  # before the checkpoint: its rows are there when the run goes on from it
                watchdog.expect_slow()
                with meter.checkpointing():
                    if checkpointer:
                        checkpointer.settle()  # here, where the others wait in a collective that may take its time
                    weights, optimizer = (
                        engine.weights(),
                        engine.optimizer_state(),
                    )  # collective at ZeRO >= 1
                    switches.merge(gather_objects(switches.state_dict(), world))
                    consumed = merge(gather_objects(ledger.take(), world))
                    if checkpointer:
                        state = data_state(cfg, stream, done * global_batch)
                        state |= {
                            "schedule": schedule.state_dict(),
                            "switches": switches.state_dict(),
                        }
                        state |= {
                            "guard": guard.state_dict(),
                            "left_out": left_out,
                            "world_size": world.size,
                        }
                        state |= {"objective": state_of(objective)}
                        checkpointer.save(
                            Snapshot(done, weights, optimizer, state, score, consumed)
                        )
                    if leaving:
                        if checkpointer:
                            checkpointer.settle()
                        gather_objects(None, world)
                watchdog.beat()
    finally:
        watchdog.expect_slow()
        stream.close()
        if checkpointer:
            checkpointer.close()
        if reporter:
            reporter.close()
    logger.info("finished")


def agree_on_newest(run_dir: str, world: World) -> Snapshot | None:
    """The newest whole checkpoint as the main rank finds it: an older attempt may still be writing one."""
    snapshot = load_newest(run_dir) if world.is_main else None
    url = gather_objects(snapshot.url if snapshot else "", world)[0]
    return load_snapshot(url) if url and snapshot is None else snapshot


def continue_goodput(reporter: Reporter, run_dir: str) -> Goodput:
    """The account of wall time, continued from the attempt before; what that one lost is noted at once."""
    url = storage.join(run_dir, GOODPUT_FILE)
    last = storage.read_bytes(url).decode() if storage.exists(url) else None
    now = time.time()
    goodput = Goodput(reporter.kept, last, now)
    storage.put_bytes(url, goodput.note(goodput.sign_of_life).encode())
    return goodput


def initialise(
    model: torch.nn.Module, cfg: TrainConfig, snapshot: Snapshot | None
) -> dict[str, Any]:
    """Fill `model` from the checkpoint or the parent stage; returns the lineage that this run's checkpoints carry."""
    parent: dict[str, Any] | None = None
    fresh: list[str] = []
    if cfg.init.weights:
        fresh, parent = inherit(model, cfg.init)
        logger.info(
            "weights from %s; re-initialised: %s", parent["url"], ", ".join(fresh) or "none"
        )
    if snapshot is not None:
        load_weights(
            model,
            snapshot.weights,
            source=f"the checkpoint of step {snapshot.step} in {cfg.run_dir}",
        )
    return {"run": cfg.name, "run_dir": cfg.run_dir, "parent": parent, "reinitialised": fresh}


def data_state(cfg: TrainConfig, stream: TrainStream, samples_seen: int) -> dict[str, Any]:
    """What fixes the data order, and how far it has been consumed."""
    return {
        "samples_seen": samples_seen,
        "seed": cfg.seed,
        "num_virtual_shards": cfg.data.num_virtual_shards,
        "micro_batch": cfg.data.micro_batch,
        "manifest": stream.digest(),
    }


def check_same_data(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to continue a checkpoint on another data order."""
    names = [name for name in current if name != "samples_seen" and saved[name] != current[name]]
    if names:
        changes = ", ".join(f"{name} was {saved[name]}, is {current[name]}" for name in names)
        raise CheckpointError(
            f"the run's data changed since its checkpoint ({changes}); start another run_dir"
        )


def track_switches(
    switches: SwitchTracker,
    batches: list[Batch],
    result: StepResult,
    stream: TrainStream,
    positions: range,
    world: World,
) -> dict[str, float]:
    """Note the label assignments of this step; where the main set's epoch ends in it, its switch rate over all ranks.

    The exchange depends on positions alone, because ranks may have batches of different data sets.
    """
    items = [
        (stream.main_epoch(int(position)), id_, int(label))
        for batch, metrics in zip(batches, result.local_metrics, strict=True)
        if batch.data_set == MAIN and "permutation" in metrics
        for position, id_, label in zip(
            batch.positions, batch.ids, metrics["permutation"], strict=True
        )
    ]
    rates = {}
    last = stream.main_epoch(positions.stop)
    for epoch in range(stream.main_epoch(positions.start), last + 1):
        mine = [(id_, label) for item_epoch, id_, label in items if item_epoch == epoch]
        switches.update([id_ for id_, _ in mine], [label for _, label in mine])
        if epoch < last:
            switches.merge(gather_objects(switches.state_dict(), world))
            rate = switches.end_epoch()
            if rate is not None:
                rates = {"switching/rate": rate, "switching/epoch": float(epoch)}
    return rates


def main() -> None:
    """Run the loop in this process, as torchrun starts it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "config", help="the frozen config of a run, run_dir/config.yaml (a path or s3://)"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    cfg = config.load_frozen(arguments.config)
    train(cfg, join_world())


if __name__ == "__main__":
    main()
