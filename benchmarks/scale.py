"""Play one rank of 8, 64 and 1,024 in one process, and simulate a month of failures on 512 GPUs.

    python -m benchmarks.scale [--quick] [--figure goodput.svg]

No audio is written: the data set is a manifest of 100,000 shards with 10 million samples, V = 1,024
virtual shards of 3 samples. Prints one JSON line:

start       CPU seconds and memory to read the manifest and to plan the order (new process)
resume      CPU seconds to the first sample at 99 % of an epoch
order1, 2   bytes that the middle rank announces in an epoch over its fair share of the data set, by
            version of the order; a shard counts again if it was not wanted in between
step        CPU milliseconds of a step's bookkeeping: order, reduction plan, ledger, label switches;
            the median. Collective operations, decoding and arithmetic are left out.
checkpoint  what a checkpoint each 500 steps gathers from 1,024 ranks, the main rank's CPU seconds,
            the ledger's segment; the label-switch table of 10 million utterances
month       goodput by checkpoint interval: exponential failures at the rates of two published runs
"""

import argparse
import hashlib
import inspect
import json
import math
import multiprocessing
import pickle
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import safetensors.torch
import torch

from sepdist.data import manifest as manifests
from sepdist.data import order as orders
from sepdist.data.manifest import Manifest, ShardInfo, read_manifest
from sepdist.data.order import Order, owned_virtual_shards, positions_of
from sepdist.data.records import Batch
from sepdist.metrics.switching import SwitchTracker
from sepdist.training import reduction
from sepdist.training.ledger import APPLIED, Ledger, put_segment
from sepdist.training.reduction import TreeSum, plan, reduce_canonically

NUM_SHARDS, V, B = 100_000, 1024, 3
WORLDS = (8, 64, 1024)
CHECKPOINT_STEPS = 500
# GPUs, days, interruptions: Llama 3 (Dubey et al. 2024, table 5: 419 were unexpected) and OPT-175B
# (Zhang et al. 2022, 2.5: at least 35 manual and 70 automatic restarts in two months).
PUBLISHED = {"llama3": (16_384, 54, 419), "opt175b": (992, 60, 105)}
GPUS = 512
RESTART_SECONDS = 120.0  # twice that of benchmarks.chaos, per fault, on two busy cores
COST_SECONDS = 2.0  # training held up: benchmarks.resume has 0.03 to 0.7 s for one to two workers
WRITE_SECONDS = 30.0  # until a checkpoint that no longer holds training up is committed
INTERVALS = (10, 30, 60, 120, 300, 600, 1200, 2400, 3600, 7200, 14_400, 28_800)  # seconds


def write_manifest(folder: str) -> None:
    draw = np.random.default_rng(0)
    sizes = draw.integers(60, 140, NUM_SHARDS)
    sizes[-1] += 100 * NUM_SHARDS - sizes.sum()  # 10 million
    names = (hashlib.sha256(str(i).encode()).hexdigest() for i in range(2 * NUM_SHARDS))
    infos = [
        ShardInfo(
            f"big-train-{i:06d}.tar", 130_000 * int(size), int(size), next(names), next(names)
        )
        for i, size in enumerate(sizes)
    ]
    speakers = tuple(f"speaker-{i}" for i in range(2000))
    found = Manifest(
        1, "big", "train", 8000, ("s1", "s2"), int(sizes.sum()), 1e4, 2000, speakers, tuple(infos)
    )
    text = manifests.dump(found.as_dict() | {"digest": found.digest()})
    Path(folder, manifests.MANIFEST).write_bytes(text)


def make_order(shards: Sequence[ShardInfo], version: int) -> Order | None:
    """Return an order; None of a version that this sepdist does not have."""
    sizes = tuple(shard.num_samples for shard in shards)
    if version == 1:
        return Order(0, sizes)
    if "blend" not in inspect.signature(Order).parameters:
        return None
    return Order(0, sizes, blend=orders.Blend(0, (1,), B, num_lanes=V))  # type: ignore[call-arg]


def announced(order: Order, positions: range, owned: range, version: int) -> list[int]:
    return order.upcoming(positions, owned) if version == 2 else order.upcoming(positions)  # type: ignore[call-arg]


def begin(folder: str, results: Any) -> None:
    """Measure a start and a resume late in an epoch, in a process of its own."""

    def memory() -> float:
        """The most that this process had, in MB; ru_maxrss would include that of its parent."""
        status = Path("/proc/self/status").read_text()
        return float(status.partition("VmHWM:")[2].split()[0]) / 1e3

    before, began = memory(), time.process_time()
    manifest = read_manifest(folder)
    seconds = {"manifest": time.process_time() - began}
    began = time.process_time()
    manifest.digest()
    seconds["digest_again"] = time.process_time() - began
    for version in (1, 2):
        began = time.process_time()
        order = make_order(manifest.shards, version)
        if order is None:
            continue
        order.locate(0)
        seconds[f"order{version}"] = time.process_time() - began
        began = time.process_time()
        fresh = make_order(manifest.shards, version)
        assert fresh is not None
        fresh.locate(int(3.99 * fresh.num_samples))
        seconds[f"resume{version}"] = time.process_time() - began
    results.put({"seconds": seconds, "memory_mb": memory() - before})


def traffic(manifest: Manifest, order: Order, world: int, version: int, chunk: int) -> float:
    """Bytes announced by the middle rank in the second epoch, over its share of the data set."""
    owned = owned_virtual_shards(V, world // 2, world)
    sizes = [shard.bytes for shard in manifest.shards]
    first, stop = (epoch * order.num_samples // (V * B) for epoch in (1, 2))
    fetched, wanted = 0, set[int]()
    for step in range(first - chunk, stop, chunk):
        positions = range(step * V * B, min(step + chunk, stop) * V * B)
        now = set(announced(order, positions, owned, version))
        if step >= first:
            fetched += sum(sizes[shard] for shard in now - wanted)
        wanted = now
    return fetched / (sum(sizes) / world)


class Rank:
    """The bookkeeping of one rank's steps."""

    def __init__(self, order: Order, world: int, version: int) -> None:
        self.order, self.world, self.version = order, world, version
        self.rank = world // 2
        self.owned = owned_virtual_shards(V, self.rank, world)
        self.ledger, self.switches = Ledger(V * B), SwitchTracker()
        self.leaves = torch.zeros(world)  # a number for each rank: no time for arithmetic

    def step(self, step: int) -> dict[str, float]:
        """Keep the books of a step; returns CPU seconds by kind."""
        batches = []
        for shard in self.owned:
            positions = positions_of(step, shard, V, B)
            ids = [f"utterance-{position}" for position in positions]
            batches.append(
                Batch(ids, torch.tensor(positions), self.leaves, None, None, self.leaves)
            )
        tree = TreeSum(V)
        for shard in self.owned:
            tree.push((0, shard), self.leaves.clone())

        def find() -> None:
            announced(self.order, range(step * V * B, (step + 5) * V * B), self.owned, self.version)
            for batch in batches:
                for position in batch.positions.tolist():
                    self.order.locate(position)

        def note() -> None:
            for batch in batches:
                self.switches.update(batch.ids, [0] * B, batch.positions)

        return {
            "order": cpu(find),
            "reduction": cpu(lambda: reduce_canonically(tree, self.rank, self.world)),
            "ledger": cpu(lambda: self.ledger.record(step, APPLIED, batches)),
            "switches": cpu(note),
        }


def cpu(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def steps(order: Order, world: int, version: int, number: int) -> dict[str, float]:
    """Median CPU milliseconds of a step by kind, across the end of an epoch."""
    one = Rank(order, world, version)
    first = order.num_samples // (V * B) - number // 2
    measured = [one.step(first + i) for i in range(number)]
    kinds = {kind: [step[kind] for step in measured] for kind in measured[0]}
    kinds["total"] = [sum(step.values()) for step in measured]
    result = {kind: round(statistics.median(each) * 1e3, 3) for kind, each in kinds.items()}
    return result | {"total_mean": round(statistics.mean(kinds["total"]) * 1e3, 3)}


def checkpoint(num_utterances: int) -> dict[str, float]:
    """What the main rank gathers each 500 steps of 1,024 ranks, and the table that it keeps."""
    world, ledgers, notes = V, [], []
    for rank in range(world):
        ledger, tracker = Ledger(V * B), SwitchTracker()
        for step in range(3):
            positions = torch.tensor(positions_of(step, rank, V, B))
            ledger.record(step, APPLIED, [Batch([], positions, positions, None, None, positions)])
        runs = ledger.take()
        runs[0][1] = CHECKPOINT_STEPS
        ledgers.append(runs)
        steps = np.arange(CHECKPOINT_STEPS)[:, None] * V * B + positions_of(0, rank, V, B)
        rows = np.stack([steps.ravel(), steps.ravel() * 7919, steps.ravel() % 2], axis=1)
        notes.append(rows)
    tracker = SwitchTracker()
    add = cpu(lambda: tracker.add(notes))
    with tempfile.TemporaryDirectory() as folder:
        segment = put_segment(folder, "step", [ledgers], None)
        size = Path(folder, segment.name).stat().st_size
    received = sum(len(pickle.dumps(one)) for pair in (ledgers, notes) for one in pair)
    sent = max(len(pickle.dumps(one)) for one in notes)
    draw, big, seconds = np.random.default_rng(0), SwitchTracker(), 0.0
    keys = draw.integers(-(2**63), 2**63 - 1, num_utterances)
    for _ in range(2):
        big.add([np.stack([np.arange(len(keys)), keys, draw.integers(0, 2, len(keys))], axis=1)])
        seconds = cpu(big.end_epoch)
    saved = safetensors.torch.save(big.tensors())
    return {
        "gathered_mb": round(received / 1e6, 2),
        "sent_by_a_rank_kb": round(sent / 1e3, 1),
        "main_rank_seconds": round(add, 3),
        "ledger_kb": round(size / 1e3, 1),
        "utterances": num_utterances,
        "table_mb": round(len(saved) / 1e6, 1),
        "table_epoch_end_seconds": round(seconds, 2),
    }


def goodput(interval: float, mtbf: float, months: int) -> list[float]:
    """Share of the time in which work was done that was not lost, by simulated month.

    Every interval is followed by a pause of COST_SECONDS; what was saved counts WRITE_SECONDS
    later. A failure, also one in a restart, is followed by a restart.
    """
    draw, month, shares = np.random.default_rng(1), 30 * 86_400.0, []
    for _ in range(months):
        now = saved = 0.0
        while now < month:
            lived = min(draw.exponential(mtbf), month - now)
            whole = math.floor(max(lived - WRITE_SECONDS, 0.0) / (interval + COST_SECONDS))
            at_end = now + lived >= month  # what is not lost counts, without a checkpoint
            worked = lived - math.floor(lived / (interval + COST_SECONDS)) * COST_SECONDS
            saved += worked if at_end else whole * interval
            now += lived
            restart = RESTART_SECONDS
            while now < month and (again := draw.exponential(mtbf)) < restart:
                now += again
            now += restart
        shares.append(saved / month)
    return shares


def month(months: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (gpus, days, failures) in PUBLISHED.items():
        mtbf = gpus * days * 86_400 / failures / GPUS
        ratio = COST_SECONDS / (2 * mtbf)
        young = math.sqrt(2 * COST_SECONDS * mtbf)
        daly = young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - COST_SECONDS
        means = {one: statistics.mean(goodput(one, mtbf, months)) for one in INTERVALS}
        optima = {"young": young, "daly": daly, "auto": min(young, 3600.0)}
        found[name] = {
            "mtbf_hours": round(mtbf / 3600, 1),
            "gpu_mtbf_hours": round(mtbf * GPUS / 3600),
            "goodput": {str(one): round(mean, 5) for one, mean in means.items()},
            **{
                kind: {
                    "seconds": round(one),
                    "goodput": round(statistics.mean(goodput(one, mtbf, months)), 5),
                }
                for kind, one in optima.items()
            },
        }
    return found


def draw_figure(found: dict[str, Any], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    labels = {"llama3": "Llama 3's failure rate", "opt175b": "OPT-175B's failure rate"}
    for name, one in found.items():
        curve = [(float(seconds), 100 * share) for seconds, share in one["goodput"].items()]
        (line,) = axis.plot(*zip(*curve, strict=True), "o-", markersize=3, label=labels[name])
        for kind, marker in (("young", "s"), ("daly", "^")):
            place = one[kind]["seconds"], 100 * one[kind]["goodput"]
            axis.plot(*place, marker, color=line.get_color(), markerfacecolor="none", markersize=9)
    axis.set(
        xscale="log", xlabel="seconds between checkpoints", ylabel="goodput, %", ylim=(85, 100)
    )
    axis.set_title(
        f"A month on {GPUS} GPUs; square: Young's interval, triangle: Daly's", fontsize=9
    )
    axis.legend(frameon=False, loc="lower center")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps, months and utterances")
    parser.add_argument("--figure", help="draw goodput by interval into this file")
    arguments = parser.parse_args()
    quick = arguments.quick
    result: dict[str, Any] = {"name": "scale", "shards": NUM_SHARDS, "virtual_shards": V}
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(folder)
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        process = context.Process(target=begin, args=(folder, results))
        process.start()
        began = results.get()
        process.join()
        result["start"] = {name: round(value, 3) for name, value in began["seconds"].items()}
        result["start"]["memory_mb"] = round(began["memory_mb"])
        manifest = read_manifest(folder)
    silent = {
        name: lambda *_, **__: None for name in ("all_to_all_single", "all_gather_into_tensor")
    }
    reduction.dist = SimpleNamespace(**silent)  # type: ignore[assignment]
    for version in (1, 2):
        order = make_order(manifest.shards, version)
        if order is None:
            continue
        name = f"order{version}"
        result[name], result[f"step_ms_{name}"] = {}, {}
        for world in WORLDS:
            exact = world == WORLDS[-1] and not quick
            share = traffic(manifest, order, world, version, 1 if exact else 64)
            result[name][str(world)] = round(share, 3)
            number = (20 if quick else 60) if world < V else (40 if quick else 400)
            plan(V, world)  # made once in a run
            result[f"step_ms_{name}"][str(world)] = steps(order, world, version, number)
    result["plan_ms"] = round(cpu(lambda: plan.__wrapped__(V, V)) * 1e3, 2)
    result["checkpoint"] = checkpoint(1_000_000 if quick else 10_000_000)
    result["month"] = month(20 if quick else 200)
    if arguments.figure:
        draw_figure(result["month"], arguments.figure)
    result["peak_memory_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
    result["goals"] = goals(result)
    print(json.dumps(result))


def goals(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    newest = "order2" if "order2" in result else "order1"
    step = result[f"step_ms_{newest}"][str(V)]
    behind = max(
        max(one["goodput"].values()) - one["auto"]["goodput"] for one in result["month"].values()
    )
    wanted = {
        "bytes over fair share at 1,024 ranks": (1.1, result[newest][str(V)]),
        "host milliseconds per step at 1,024 ranks": (2.0, step["total"]),
        "of these, of the reduction": (0.5, step["reduction"]),
        "kilobytes of a ledger segment": (100.0, result["checkpoint"]["ledger_kb"]),
        "goodput of auto below the best interval": (0.001, round(behind, 5)),
    }
    return {
        what: {"goal": goal, "measured": measured, "met": measured <= goal}
        for what, (goal, measured) in wanted.items()
    }


if __name__ == "__main__":
    main()
