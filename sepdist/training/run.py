"""Run a training stage from the driver: freeze the config, launch workers, show progress."""

import contextlib
import inspect
import json
import os
import platform
import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console

from sepdist import config, slots, storage
from sepdist.config import NEWEST_ORDER, ConfigError, TrainConfig
from sepdist.console import progress_bar, signals_to
from sepdist.objectives.contract import with_defaults
from sepdist.reporting import read_from, to_json, versions
from sepdist.training.checkpoint import best_of, find_committed, read_file
from sepdist.training.datasets import open_datasets
from sepdist.training.engine import check_engine_options, refuse_slow_bf16
from sepdist.training.handoff import inherit
from sepdist.training.lease import lease
from sepdist.training.stopping import StopRequest

# What may change between the first start of a run and a later one; anything else makes it another
# run. run_dir: it may have been moved. data_root: the paths that came of it are in `data`.
FREE_TO_CHANGE: tuple[str, ...] = ("training", "cluster", "validation", "engine.zero", "data_root")
FREE_TO_CHANGE += ("engine.merge_shards", "engine.tf32", "engine.determinism", "engine.cuda_graphs")
FREE_TO_CHANGE += ("data.cache", "data.prefetch", "data.num_threads", "run_dir")
FREE_TO_CHANGE += ("engine.checkpoint_activations",)
PARTS = {slot: slot for slot in slots.SLOTS}
# Arguments of an engine that do not come from its config (sepdist/training/state.py).
ENGINE_GETS = (
    *("model", "objective", "make_optimizer", "world"),
    *("seed", "num_virtual_shards", "micro_batch", "ema_decay"),
)


def run(cfg: TrainConfig, console: Console) -> float | None:
    """Freeze a stage and train it in Ray Train workers; returns its best validation score."""
    from sepdist.training import launch

    slots.make_paths_absolute(cfg)
    request = StopRequest()
    with signals_to(request.heard), lease(cfg.run_dir, request.lose, console.print):
        cfg = freeze(cfg, console)
        console.print(f"run {cfg.name}: {cfg.run_dir}")
        with follow(cfg, console):
            launch.launch(cfg, request, console.print)
    return summarise(cfg, console)


def freeze(cfg: TrainConfig, console: Console) -> TrainConfig:
    """Check the config as far as possible without a worker, and write it to run_dir/config.yaml.

    ConfigError if an object cannot be built, data is missing, or run_dir holds another run.
    """
    slots.make_paths_absolute(cfg)
    frozen = storage.join(cfg.run_dir, "config.yaml")
    if cfg.data.order is None:
        begun = storage.exists(frozen)
        cfg.data.order = config.load_frozen(frozen).data.order if begun else NEWEST_ORDER
        if cfg.data.order == 1:
            console.print("data.order=1: the run began under it and goes on under it")
    _check_engine(cfg)
    if "lr" not in cfg.optim:
        raise ConfigError("no value given for optim.lr (pass optim.lr=... on the command line)")
    slots.build("optim", cfg.optim, params=[torch.nn.Parameter(torch.zeros(1))])
    objective = with_defaults(slots.build("objective", cfg.objective))
    model = slots.build("model", cfg.model)
    objective.check_model(model)
    for name in getattr(objective, "parts", ()):
        rate = getattr(getattr(objective, name, None), "sample_rate", cfg.sample_rate)
        if rate != cfg.sample_rate:
            raise ConfigError(f"objective.{name} works at {rate} Hz, sample_rate={cfg.sample_rate}")
    _check_lengths(cfg, getattr(model, "min_length", 1))
    feeds, validation_set = open_datasets(cfg)
    if absent := set(objective.data_sets) - feeds.keys():
        needs = f"needs data.extra with the name {', '.join(sorted(absent))}"
        raise ConfigError(f"objective {cfg.objective['_target_']} {needs}")
    if not cfg.init.weights and (cfg.init.submodule or cfg.init.reinit):
        raise ConfigError("init.submodule and init.reinit choose from init.weights: give it too")
    if cfg.init.weights and not find_committed(storage.join(cfg.run_dir, "checkpoints")):
        fresh, parent = inherit(model, cfg.init)
        names = ", ".join(fresh) or "none"
        console.print(f"weights from {parent['url']}; re-initialised: {names}")
    digests = {name: feed.digest() for name, feed in feeds.items()}
    _write(cfg, digests | {"validation": validation_set.manifest.digest()})
    return cfg


def _check_engine(cfg: TrainConfig) -> None:
    """Refuse engine options that do not work, at every world size that an elastic run may have."""
    slots.bind("engine", cfg.engine, **dict.fromkeys(ENGINE_GETS))
    fewest, most = config.worker_range(cfg.cluster)
    for world_size in (most, *range(fewest, most)):
        check_engine_options(cfg.engine, cfg.data.num_virtual_shards, world_size)
    elsewhere = cfg.cluster.address or os.environ.get("RAY_ADDRESS")  # then workers check their CPU
    on_this_cpu = not cfg.cluster.use_gpu and not elsewhere
    slow = cfg.engine.get("precision") == "bf16" and not cfg.engine.get("allow_slow_bf16")
    if slow and on_this_cpu:
        refuse_slow_bf16()


def _check_lengths(cfg: TrainConfig, least: int) -> None:
    """Refuse examples that are shorter than what the model takes."""
    given = {"data.crop_seconds": cfg.data.crop_seconds}
    given |= {"validation.max_seconds": cfg.validation.max_seconds}
    for key, seconds in given.items():
        if (length := round(seconds * cfg.sample_rate)) < least:
            takes = f"the model takes {least} samples or more, which are {least / cfg.sample_rate}"
            raise ConfigError(f"{key}={seconds}: these are {length} samples; {takes} s")


def _write(cfg: TrainConfig, digests: dict[str, str]) -> None:
    """Write config.yaml and environment.json, unless run_dir holds a run of another config."""
    url = storage.join(cfg.run_dir, "config.yaml")
    environment_url = storage.join(cfg.run_dir, "environment.json")
    if storage.exists(url):
        # Read as dataclasses, so that keys that are younger than the run have their defaults.
        before, after = asdict(config.load_frozen(url)), asdict(cfg)
        known = storage.exists(environment_url) and json.loads(storage.read_bytes(environment_url))
        if known and "data" in known:  # a data set is what its digest says, wherever it lies
            before, after = _without_places(before), _without_places(after)
            before["data"]["digests"], after["data"]["digests"] = known["data"], digests
        fill_in(before, after)
        free = FREE_TO_CHANGE
        if find_committed(storage.join(cfg.run_dir, "checkpoints")):  # it has the weights
            free += ("init.weights",)
        if changed := config.differences(before, after, free):
            holds = f"{cfg.run_dir} holds a run of another config"
            raise ConfigError(f"{holds}: {'; '.join(changed)}. Choose another run_dir (or name)")
    storage.put_bytes(url, config.to_yaml(cfg).encode())
    environment: Any = versions("torch", "ray", "deepspeed", "webdataset", "numpy")
    environment |= {"platform": platform.platform(), "data": digests}
    environment["command"] = " ".join([sys.argv[0], *map(shlex.quote, sys.argv[1:])])
    storage.put_bytes(environment_url, to_json(environment, indent=1).encode())


def fill_in(*cfgs: dict[str, Any], parts: Mapping[str, str] = PARTS) -> None:
    """Give parts of one class the arguments that they leave out: some are younger than the run.

    `parts` maps keys of the configs, at any depth, to the slots of what stands there.
    """
    for key in set.intersection(*map(set, cfgs)):
        nodes = [cfg[key] for cfg in cfgs]
        if not all(isinstance(one, dict) for one in nodes):
            continue
        inner, targets = parts, [one.get("_target_") for one in nodes]
        if key in parts:
            if targets[0] is None or len({*targets}) > 1:
                continue
            target = slots.resolve(parts[key], targets[0])
            parameters = inspect.signature(target).parameters
            defaults = {name: one.default for name, one in parameters.items()}
            nodes, inner = [defaults | one for one in nodes], getattr(target, "parts", {})
            for cfg, node in zip(cfgs, nodes, strict=True):
                cfg[key] = node
        fill_in(*nodes, parts=inner)


def _without_places(cfg: dict[str, Any]) -> dict[str, Any]:
    """Return a config without the urls of its data sets."""
    data = {name: one for name, one in cfg["data"].items() if name not in ("train", "validation")}
    data["extra"] = [one | {"url": None} for one in data["extra"]]
    if isinstance(data["mixing"], dict) and data["mixing"].get("noise"):
        data["mixing"] = data["mixing"] | {"noise": True}
    return cfg | {"data": data}


@contextlib.contextmanager
def follow(cfg: TrainConfig, console: Console) -> Iterator[None]:
    """Show a progress bar and validations inside, from metrics.jsonl as the workers write it."""
    url = storage.join(cfg.run_dir, "metrics.jsonl")
    stopped = threading.Event()
    with progress_bar(console, cfg.name, cfg.training.max_steps) as advance:

        def watch() -> None:
            latest: dict[str, float] = {"step": 0, "validated": -1}
            place, ended = 0, False  # the first byte that was not read
            while not ended:
                ended = stopped.wait(30.0 if storage.is_remote(url) else 1.0)
                try:
                    text = read_from(url, place)
                    rows = [json.loads(line) for line in text.splitlines()]
                    latest = _show(rows, console, advance, latest)
                    place += len(text)
                except (OSError, ValueError):  # not there yet, or written anew after a restart
                    place = 0

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()


def _show(
    rows: list[dict], console: Console, advance: Callable[..., None], latest: dict[str, float]
) -> dict[str, float]:
    """Print new validations and advance the bar; returns the latest values, with those of rows."""
    before = latest["step"]
    for row in rows:
        latest = latest | row
        if "validation/loss" in row and row["step"] > latest["validated"]:
            latest["validated"] = row["step"]
            named = {k: v for k, v in row.items() if k.startswith("validation/") and v is not None}
            values = "  ".join(f"{name} {value:.2f}" for name, value in named.items())
            console.print(f"step {row['step']}  {values}")
    formats = {
        "loss/total": "loss {:.2f}",
        "train/si_snri": "SI-SNRi {:.2f} dB",
        "validation/si_snri": "val {:.2f} dB",
    }
    known = {name: latest[name] for name in formats if latest.get(name) is not None}
    text = "  ".join(formats[name].format(value) for name, value in known.items())
    advance(int(latest["step"] - before), text=text)
    return latest


def summarise(cfg: TrainConfig, console: Console) -> float | None:
    """Print how the run ended, its best checkpoint, how to look at it; returns the best score."""
    committed = find_committed(storage.join(cfg.run_dir, "checkpoints"))
    state = json.loads(read_file(committed[-1], "state.json")) if committed else {}
    if reason := state.get("objective", {}).get("stop_reason"):
        console.print(f"ended at step {committed[-1].step}: {reason}")
    if best := best_of(committed):
        console.print(f"best validation score {best.score:.3g} at step {best.step}: {best.url}")
    tensorboard = storage.join(cfg.run_dir, "tensorboard")
    console.print(f"look at it: tensorboard --logdir {shlex.quote(tensorboard)}")
    return best.score if best else None
