"""The state of a run: everything that a checkpoint holds, built, loaded and saved in one place."""

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sepdist import seeding, slots
from sepdist.allocator import keep_freed_memory
from sepdist.config import NEWEST_ORDER, InitConfig, TrainConfig, differences
from sepdist.metrics.switching import SwitchTracker
from sepdist.objectives.contract import OUTPUT_RULES, Objective, with_defaults
from sepdist.training import checkpoint
from sepdist.training.engine import Engine
from sepdist.training.handoff import inherit, load_weights
from sepdist.training.ledger import Ledger, SegmentRef
from sepdist.training.schedule import GradientGuard, Schedule
from sepdist.training.world import World, broadcast_object, broadcast_tensors, gather_to_main

logger = logging.getLogger(__name__)

SMALL_MODEL = 16_000_000  # parameters; above, an optimizer step leaves large gaps in kept memory


class RunState:
    """What a run has learnt and counted so far.

    step       the next one; all that the data position depends on
    engine     weights, their average and optimizer state
    schedule   learning rate and early stopping
    guard      norms of the last gradients, and how many steps in a row were skipped
    switches   label assignments by utterance, on the main rank
    objective  its own state, if it has any
    ledger     positions consumed since the last checkpoint, whose segment `segment` names

    It continues from the newest checkpoint of the run; without one it starts from the weights of
    the parent stage, or from fresh ones. `data_digest` identifies the data sets.
    """

    def __init__(self, cfg: TrainConfig, world: World, data_digest: str) -> None:
        self._cfg = cfg
        self._world = world
        self._data: dict[str, Any] = {  # fixes the data order
            "seed": cfg.seed,
            "num_virtual_shards": cfg.data.num_virtual_shards,
            "micro_batch": cfg.data.micro_batch,
            "manifest": data_digest,
        }
        if cfg.data.order != 1:  # under which checkpoints have no such key
            self._data["order"] = cfg.data.order or NEWEST_ORDER
        torch.manual_seed(seeding.torch_seed(cfg.seed, "weights"))
        model: nn.Module = slots.build("model", cfg.model)
        num_parameters = sum(p.numel() for p in model.parameters())
        if world.device.type == "cpu" and num_parameters <= SMALL_MODEL:
            keep_freed_memory()
        self.objective: Objective = with_defaults(slots.build("objective", cfg.objective))
        saved = load_for_all(cfg.run_dir, world)
        self._lineage = self._fill(model, saved) | self.objective.lineage()
        self.engine: Engine = slots.build(
            "engine",
            cfg.engine,
            model=model,
            objective=self.objective,
            make_optimizer=lambda params: slots.build("optim", cfg.optim, params=params),
            world=world,
            seed=cfg.seed,
            num_virtual_shards=cfg.data.num_virtual_shards,
            micro_batch=cfg.data.micro_batch,
            ema_decay=cfg.training.ema_decay,
        )
        training = cfg.training
        self.schedule = Schedule(
            cfg.optim["lr"],
            early_stop_patience=training.early_stop_patience,
            max_steps=training.max_steps,
            **vars(cfg.schedule),
        )
        self.guard = GradientGuard(training.spike_factor, training.max_skipped)
        self.switches = SwitchTracker()
        self.ledger = Ledger(cfg.data.num_virtual_shards * cfg.data.micro_batch)
        self.step = 0
        self.segment: SegmentRef | None = None
        self._counters: dict[str, Any] = {  # by their keys in state.json
            "schedule": self.schedule,
            "guard": self.guard,
            "objective": self.objective,
        }
        if saved is not None:
            self._load(saved)

    def _fill(self, model: nn.Module, saved: checkpoint.Snapshot | None) -> dict[str, Any]:
        """Fill `model` from the checkpoint or the parent stage; returns the lineage of the run."""
        cfg, fresh, parent = self._cfg, [], None
        if saved is not None:  # the parent may be gone
            source = f"the checkpoint of step {saved.step} in {cfg.run_dir}"
            load_weights(model, saved.weights, source=source)
            fresh, parent = saved.lineage["reinitialised"], saved.lineage["parent"]
        elif cfg.init.weights:
            fresh, parent = inherit_for_all(model, cfg.init, self._world)
            names = ", ".join(fresh) or "none"
            logger.info("weights from %s; re-initialised: %s", parent["url"], names)
        return {"run": cfg.name, "run_dir": cfg.run_dir, "parent": parent, "reinitialised": fresh}

    def _load(self, saved: checkpoint.Snapshot) -> None:
        """Continue from a checkpoint, whose weights the engine has already."""
        had, given = {"order": 1} | saved.state, {"order": 1} | self._data
        if changes := differences({name: had[name] for name in given}, given):
            raise checkpoint.CheckpointError(
                f"the run's data changed since its checkpoint ({', '.join(changes)}); start "
                "another run_dir"
            )
        self.engine.load_optimizer_state(saved.optimizer)
        if self.engine.average and saved.average:  # else it starts from the weights
            self.engine.average.model.load_state_dict(saved.average)
            self.engine.average.num_updates = saved.state["num_averaged"]
        for name, counter in self._counters.items():
            counter.load_state_dict(saved.state[name])
        self.switches.load(saved.tables)
        self.step, self.segment = saved.step, SegmentRef(**saved.state["ledger"])

    def snapshot(self, score: float | None) -> checkpoint.Snapshot:
        """Gather what a checkpoint holds; collective, and complete on the main rank only."""
        weights, optimizer = self.engine.weights(), self.engine.optimizer_state()
        self.switches.add(gather_to_main(self.switches.take(), self._world))
        consumed = [gather_to_main(self.ledger.take(), self._world)]
        samples_per_step = self._data["num_virtual_shards"] * self._data["micro_batch"]
        state = self._data | {name: one.state_dict() for name, one in self._counters.items()}
        state |= {"samples_seen": self.step * samples_per_step, "world_size": self._world.size}
        if self.engine.average:
            state["num_averaged"] = self.engine.average.num_updates
        found = checkpoint.Snapshot(self.step, weights, optimizer, state, score, consumed)
        tables, average = self.switches.tensors(), self.engine.averaged_weights()
        return replace(found, tables=tables, average=average)

    def checkpointer(self) -> checkpoint.Checkpointer:
        """Return the writer of this run's checkpoints."""
        cfg, training = self._cfg, self._cfg.training
        return checkpoint.Checkpointer(
            cfg.run_dir,
            model_node=cfg.model | getattr(self.engine.model, "node_changes", {}),
            sample_rate=cfg.sample_rate,
            outputs={name: getattr(self.objective, name) for name in OUTPUT_RULES},
            lineage=self._lineage,
            keep_last=training.keep_last,
            keep_best=training.keep_best,
            keep_every=training.keep_every,
            patience_seconds=training.storage_patience_seconds,
            previous=self.segment,
        )


def inherit_for_all(model: nn.Module, init: InitConfig, world: World) -> tuple[list[str], Any]:
    """`inherit`, where the main rank alone reads: by turns, ranks could find other weights."""
    found = error = None
    try:
        found = inherit(model, init) if world.is_main else None
    except (ValueError, OSError, RuntimeError) as its_error:
        error = its_error
    found, error = broadcast_object((found, error), world)
    if error:
        raise error
    model.load_state_dict(broadcast_tensors(model.state_dict(), world))
    return found


def load_for_all(run_dir: str, world: World) -> checkpoint.Snapshot | None:
    """Read a run's newest checkpoint on the main rank, for all but its `tables`, or its error."""
    found = error = None
    try:
        found = checkpoint.load_newest(run_dir) if world.is_main else None
    except (checkpoint.CheckpointError, OSError) as its_error:
        error = its_error
    head = found and replace(found, optimizer=replace(found.optimizer, tensors={}))
    head = head and replace(head, weights={}, average={}, tables={})
    head, error = broadcast_object((head, error), world)
    if error:
        raise error
    if head:
        mine = found or head
        head.weights, head.tables = broadcast_tensors(mine.weights, world), mine.tables
        head.average = broadcast_tensors(mine.average, world)
        head.optimizer.tensors = broadcast_tensors(mine.optimizer.tensors, world)
    return head
