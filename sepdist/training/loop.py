"""The training loop: from a run's frozen config to metrics, audio examples and checkpoints.

    python -m sepdist.training.loop RUN_DIR/config.yaml                        # one process
    torchrun --nproc-per-node 2 -m sepdist.training.loop RUN_DIR/config.yaml   # without Ray

It knows nothing of Ray; sepdist.training.launch runs `train` in Ray Train workers.
"""

import argparse
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Mapping

import torch

from sepdist import config, slots, storage
from sepdist.config import TrainConfig
from sepdist.console import Stopped, signals_to, user_console
from sepdist.data.records import MAIN, Batch, on_device
from sepdist.data.stream import TrainStream
from sepdist.models.compiling import keep_compiled
from sepdist.reporting import Reporter
from sepdist.training.checkpoint import collect_orphans
from sepdist.training.datasets import open_datasets, open_stream
from sepdist.training.describing import describe
from sepdist.training.engine import StepResult
from sepdist.training.lease import lease
from sepdist.training.ledger import APPLIED, SKIPPED
from sepdist.training.meter import GOODPUT_FILE, Meter, continue_goodput
from sepdist.training.pace import Pace
from sepdist.training.state import RunState
from sepdist.training.stopping import StopRequest
from sepdist.training.validation import listen, validate
from sepdist.training.watchdog import Watchdog
from sepdist.training.world import World, broadcast_object, gather_to_main, join_world

logger = logging.getLogger(__name__)


def train(
    cfg: TrainConfig,
    world: World,
    report: Callable[[dict[str, float]], None] = lambda metrics: None,
    preempted: Callable[[], bool] = lambda: False,
    stopping: Callable[[], bool] = lambda: False,
    publish: Callable[[Mapping[str, float]], None] = lambda metrics: None,
) -> bool:
    """Train until `training.max_steps` or early stop, from the run's newest checkpoint if any.

    Every rank calls `report` with the metrics of each validation (Ray Train's is a barrier), and
    `preempted` each `cluster.preemption_check_steps` steps. `preempted` returns, the same on all
    ranks, whether a node is about to be taken away; then a checkpoint is committed at once.
    `stopping`, called at each step, returns whether this rank was asked to stop; once one was, all
    commit a checkpoint of the same step and return False; otherwise the result is True. The main
    rank calls `publish` with the metrics of each row that it writes.
    RuntimeError if `training.max_skipped` steps in a row had no usable gradient, and at the end if
    no validation had a finite score.
    """
    torch.set_num_threads(cfg.cluster.threads_per_worker)
    keep_compiled(cfg.data.cache_dir)
    stopped = False
    with contextlib.ExitStack() as stack:
        # 1. Data: the order depends on the position alone, so the step is all the state there is.
        watchdog = Watchdog(cfg.cluster.hang_seconds, cfg.cluster.startup_seconds)
        stack.callback(watchdog.close)
        patience, waiting = cfg.training.storage_patience_seconds, watchdog.expect_slow
        stack.enter_context(storage.patient(patience, whole_process=True, waiting=waiting))
        feeds, validation_set = open_datasets(cfg)
        stream = open_stream(cfg, feeds, world)
        stack.callback(stream.close)

        # 2. State: from the newest checkpoint, else from the parent stage, else fresh.
        state = RunState(cfg, world, stream.digest())
        engine, schedule, objective = state.engine, state.schedule, state.objective

        # 3. Outputs, of the main rank.
        reporter = goodput = checkpointer = None
        if world.is_main:
            begun, url = state.step, cfg.run_dir
            reporter = Reporter(url, cfg.name, resume_step=begun, patience_seconds=patience)
            stack.callback(reporter.close)
            if not begun:
                describe(reporter, cfg, engine.model, feeds)
            goodput = continue_goodput(cfg.run_dir, reporter.kept)
            collect_orphans(cfg.run_dir)
            checkpointer = state.checkpointer()
            stack.callback(checkpointer.close)

        def log(metrics: Mapping[str, float]) -> None:
            if reporter and metrics:
                reporter.log(state.step, metrics)
                publish(metrics)

        # 4. The loop.
        last = cfg.training.max_steps
        logger.info("training from step %d to %d on %d worker(s)", state.step, last, world.size)
        global_batch = cfg.data.num_virtual_shards * cfg.data.micro_batch
        meter, pace = Meter(stream, world, goodput), Pace(cfg.training, state.step, world)
        steps = on_device(stream.steps(state.step), world.device)
        first, unread = state.step, list[tuple[int, list[Batch]]]()
        for step in range(first, last):
            if schedule.should_stop:
                stagnant = cfg.training.early_stop_patience
                logger.info("early stop: %d validations without improvement", stagnant)
                break
            if objective.stop_reason:
                logger.warning("step %d: the run ends: %s", step, objective.stop_reason)
                break
            batches, done = next(steps), step + 1
            logs = done % cfg.training.log_every == 0 or done == last
            validates = done % cfg.validation.every_steps == 0 or done == last
            due = pace.due(done) or done == last
            leaving = done % cfg.cluster.preemption_check_steps == 0 and preempted()
            engine.set_lr(schedule.lr(step))
            read = step == first or logs or validates or due or leaving
            results = engine.step(batches, state.guard.limit, stopping(), read)
            state.step = done
            unread.append((step, [batch.without_audio() for batch in batches]))
            for (number, own), result in zip(unread, results, strict=bool(results)):
                state.ledger.record(number, APPLIED if result.applied else SKIPPED, own)
                state.guard.observe(number, result.grad_norm, result.applied)
                positions = range(number * global_batch, (number + 1) * global_batch)
                log(track_switches(state, own, result, stream, positions))
                meter.add(result)
            unread = [] if results else unread
            watchdog.beat()

            if logs:
                metrics = meter.read(global_batch * cfg.data.crop_seconds)
                log(metrics | {"optim/lr": schedule.lr(step)})
                if reporter and goodput:
                    reporter.note(GOODPUT_FILE, goodput.note(time.time()))

            score = None
            if validates:
                watchdog.expect_slow()
                with meter.timing("validation"):
                    metrics = validate(
                        engine, objective, validation_set, world, cfg.validation, watchdog.beat
                    )
                    score = metrics["score"]
                    best = " (best so far)" if schedule.observe(score, done) else ""
                    objective.observe(metrics)
                    listen(engine, objective, validation_set, reporter, done, cfg.validation)
                log({f"validation/{k}": v for k, v in metrics.items() if k != "score"})
                values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
                logger.info("step %d: validation %s%s", done, values, best)
                report({"step": float(done)} | metrics)

            if leaving:
                logger.warning("step %d: a node is about to go; committing a checkpoint", done)
            stopped = any(result.stopping for result in results) and done < last
            if not (due or leaving or stopped or score is not None):
                continue
            rows = reporter.flush() if reporter else None
            watchdog.expect_slow()
            with meter.timing("checkpoint"), pace.saving(done):
                if checkpointer:
                    checkpointer.settle()  # here, as the others wait in a collective operation
                snapshot = state.snapshot(score)
                if checkpointer:
                    # After the rows, so that a run that goes on from here has them.
                    checkpointer.save(snapshot, after=rows)
                if checkpointer and (leaving or stopped):
                    checkpointer.settle(also_failing=True)
                if leaving or stopped:
                    broadcast_object(None, world)  # nobody leaves before it is committed
            watchdog.beat()
            if stopped:
                break
        watchdog.close()  # what follows waits for storage only, as long as it is patient
    if not stopped:
        schedule.check_end()
    logger.info("stopped at step %d" if stopped else "finished at step %d", state.step)
    return not stopped


def track_switches(
    state: RunState, batches: list[Batch], result: StepResult, stream: TrainStream, positions: range
) -> dict[str, float]:
    """Record the label assignments of a step; the main rank gets the rate if an epoch ended.

    Epochs are those of the main data set. When ranks gather their notes depends on positions
    alone, because they may have batches of different data sets.
    """
    items = [
        (stream.main_epoch(int(position)), id_, int(rank), int(position))
        for batch, metrics in zip(batches, result.local_metrics, strict=True)
        if batch.data_set == MAIN and "permutation" in metrics
        for position, id_, rank in zip(
            batch.positions, batch.ids, metrics["permutation"], strict=True
        )
    ]
    rates = {}
    last = stream.main_epoch(positions.stop)
    for epoch in range(stream.main_epoch(positions.start), last + 1):
        mine = [item for item_epoch, *item in items if item_epoch == epoch]
        state.switches.update(*zip(*mine, strict=True)) if mine else None
        if epoch < last:
            state.switches.add(gather_to_main(state.switches.take(), state.engine.world))
            if (rate := state.switches.end_epoch()) is not None:
                rates = {"switching/rate": rate, "switching/epoch": float(epoch)}
    return rates


def main() -> None:
    """Run the loop in this process, alone or as one of torchrun's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="the frozen config of a run, a path or s3:// url")
    plugins = "a package whose classes the config may name; may be given several times"
    parser.add_argument("--plugins", action="append", default=[], metavar="PACKAGE", help=plugins)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    todo = "the same command goes on from the newest checkpoint"
    with user_console(RuntimeError, stopped=todo) as console:
        slots.use_plugins(arguments.plugins)
        cfg = config.load_frozen(arguments.config)
        world, request = join_world(), StopRequest()
        request.first = lambda: logger.warning("stopping; a second signal ends at once")
        with signals_to(request.heard), contextlib.ExitStack() as stack:
            if world.is_main:
                stack.enter_context(lease(cfg.run_dir, request.lose, console.print))
            if not train(cfg, world, stopping=request.asked):
                raise Stopped(request.number or signal.SIGTERM)


if __name__ == "__main__":
    main()
