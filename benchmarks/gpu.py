"""Measure training steps on a GPU: six models in three precisions, their peers, both reductions.

    python -m benchmarks.gpu [--device cuda] [--quick] [--limit 300]

Prints one JSON line and ends with status 1 if a part failed. Each part runs in its own process; one
that takes too long is ended, and its figures until then are in the line. All models are compiled
first, in parallel (`compile_seconds`, by precision), together with `repeat` and, with `--tests`,
tests/gpu; later parts take the compiled code from the cache.

- `peak`: TFLOP/s of one large product in each precision, and GB/s of a copy, in and out.
- each model at its paper's batch (halved while memory is short): seconds of the first step,
  milliseconds per step (forward and backward), audio seconds per second, GiB at the peak, and the
  share of `peak` that the model's products and convolutions take; the same of the peer (peers.py).
  `bf16` is autocast, `tf32` fp32 with TF32 products, `graphs` bf16 with `engine.cuda_graphs`.
  What there was no time or memory for is null.
- `engine`: milliseconds of a whole step of 8 virtual shards of 3 x 3 s in canonical and in native
  reduction (merged), also with `engine.cuda_graphs`.
- `repeat`: whether two canonical runs with determinism end with the same bits.

`--device cpu --quick` tries the program itself, with small models, where there is no GPU.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.models import CONFIGS
from benchmarks.peers import PEERS
from sepdist import slots
from sepdist.data.records import Batch
from sepdist.objectives.separation import Separation
from sepdist.training.capture import Captured
from sepdist.training.engine import DeepSpeedEngine
from sepdist.training.world import join_world

RATE = 8000
BATCHES = {  # items and seconds
    "conv_tasnet": (24, 3.0),
    "dprnn": (24, 3.0),
    "dptnet": (24, 3.0),
    "sandglasset": (24, 3.0),
    "sepformer": (8, 4.0),
    "tf_locoformer": (4, 3.0),
}
CALCULATED_MS = {"conv_tasnet": 12.7, "sepformer": 35.0}  # in bf16 on an H100, fused
PRECISIONS = ("bf16", "tf32", "fp32")
PART_SECONDS = 70.0  # the most that a part may take
COMPILE = "compile "  # before the name of a model: a part of its own
BESIDE_SECONDS = 240.0  # and what goes side by side: compilations, tests


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def milliseconds(step: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """The median of repeated steps that take about `seconds` together, three at least."""
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 50):
        synchronize(device)
        began = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def set_precision(precision: str) -> None:
    """Choose whether fp32 products are in TF32."""
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"


def peak(device: torch.device, quick: bool) -> dict[str, float]:
    """The rates of one product (TFLOP/s, by precision) and of a copy (GB/s)."""
    size, found = 512 if quick else 8192, {}
    for precision in PRECISIONS:
        set_precision(precision)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        torch.mm(a, b)
        took = milliseconds(partial(torch.mm, a, b), device, 0.05 if quick else 1.0) / 1000
        found[precision] = round(2 * size**3 / took / 1e12, 3)
    source = torch.ones(2**22 if quick else 2**28, device=device)
    target = torch.empty_like(source)
    took = milliseconds(partial(target.copy_, source), device, 0.05 if quick else 1.0) / 1000
    return found | {"gb_per_second": round(2 * 4 * source.numel() / took / 1e9, 1)}


def node_of(preset: str, quick: bool) -> dict[str, Any]:
    """The config of a model for two speakers; of its small size if `quick`."""
    node = yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text()) | {"num_speakers": 2}
    small = CONFIGS.parent / "scale" / "mini" / f"{preset}.yaml"
    return node | (yaml.safe_load(small.read_text())["model"] if quick else {})


def training_step(
    model: Any, mixture: Tensor, precision: str, begin: Callable[[], None] = lambda: None
) -> Callable[[], None]:
    """A forward and a backward pass."""

    def step() -> None:
        begin()
        model.zero_grad(set_to_none=True)
        with torch.autocast(mixture.device.type, torch.bfloat16, precision == "bf16"):
            estimates = model(mixture)
        estimates.float().square().mean().backward()

    return step


def compile_part(preset: str, device: torch.device, quick: bool) -> dict[str, Any]:
    """Seconds of the first step in each precision, on a short mixture."""
    torch.manual_seed(0)
    model = slots.build("model", node_of(preset, quick)).to(device)
    mixture, found = 0.1 * torch.randn(2, RATE // 2, device=device), {}
    for precision in PRECISIONS:
        set_precision(precision)
        began = time.perf_counter()
        training_step(model, mixture, precision)()
        synchronize(device)
        found[precision] = round(time.perf_counter() - began, 1)
    return found


def measure(model: nn.Module, mixture: Tensor, kind: str, quick: bool) -> dict[str, Any]:
    """Speed and memory of a model in one precision, or of its captured passes (`graphs`)."""
    device, precision = mixture.device, "bf16" if kind == "graphs" else kind
    set_precision(precision)
    step = training_step(model, mixture, precision)
    if kind == "graphs":
        captured = Captured(model)
        step = training_step(captured, mixture, precision, captured.begin)
    if device.type != "cpu":
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats()
    began = time.perf_counter()
    step()
    synchronize(device)
    first = time.perf_counter() - began
    step()  # warm
    took = milliseconds(step, device, 0.1 if quick else 1.5)
    memory = torch.accelerator.max_memory_allocated() if device.type != "cpu" else 0
    return {
        "first_step_seconds": round(first, 2),
        "ms": round(took, 2),
        "audio_seconds_per_second": round(mixture.numel() / RATE / took * 1000, 1),
        "peak_gib": round(memory / 2**30, 2),
    }


def largest_batch(models: Iterable[nn.Module], items: int, length: int) -> int:
    """The most items, `items` or half as many and so on, of which every model makes a step."""
    while items > 1:
        try:
            for model in models:
                mixture = torch.randn(items, length, device=next(model.parameters()).device)
                training_step(model, mixture, PRECISIONS[0])()
            break
        except torch.OutOfMemoryError:
            items //= 2
    return items


def flop_of(model: nn.Module, mixture: Tensor) -> int:
    """Floating-point operations of a step in products, convolutions, recurrences: 3 forwards'."""
    recurrent = 0

    def add(lstm: nn.LSTM, inputs: tuple[Tensor, ...], output: Any) -> None:
        nonlocal recurrent
        num_steps = inputs[0].shape[0] * inputs[0].shape[1]
        recurrent += 2 * num_steps * sum(p.numel() for p in lstm.parameters() if p.ndim == 2)

    for module in model.modules():
        if hasattr(module, "compiled"):  # the counter does not see into compiled code
            module.compiled = False  # type: ignore[assignment]
        if isinstance(module, nn.LSTM):
            module.register_forward_hook(add)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.to(mixture.device)(mixture)
    return 3 * (counter.get_total_flops() + recurrent)


def model_part(preset: str, device: torch.device, quick: bool, seconds: float) -> dict[str, Any]:
    """One model and its peer on the same batch, with the weights that each starts with."""
    deadline = time.monotonic() + 0.7 * seconds  # starting and the last measurement take the rest
    node = node_of(preset, quick)
    items, length = (2, 0.5) if quick else BATCHES[preset]
    torch.manual_seed(0)
    models = {"ours": slots.build("model", node)}
    report: dict[str, Any] = {"parameters": sum(p.numel() for p in models["ours"].parameters())}
    if peer := PEERS.get(node["_target_"].split(".")[-2]):
        try:
            models["peer"] = peer.build(node)
        except ImportError as error:
            report["no_peer"] = f"{error}; pip install --no-deps {peer.packages}"
    on_device = {name: model.to(device) for name, model in models.items()}
    items = largest_batch(on_device.values(), items, int(length * RATE))
    mixture = 0.1 * torch.randn(items, int(length * RATE), device=device)
    report["batch"] = [items, length]
    report["gflop"] = round(flop_of(slots.build("model", node), mixture) / 1e9, 2)
    report |= {name: dict.fromkeys(PRECISIONS) for name in models}
    for kind in (PRECISIONS[0], "graphs", *PRECISIONS[1:]):
        for name, model in on_device.items():
            graphs = kind == "graphs" and (name == "peer" or device.type == "cpu")
            if time.monotonic() < deadline and not graphs:
                with contextlib.suppress(torch.OutOfMemoryError):
                    report[name][kind] = measure(model, mixture, kind, quick)
                print(json.dumps(report), flush=True)
    return report


def new_engine(device: torch.device, quick: bool, **options: Any) -> DeepSpeedEngine:
    """The engine with Conv-TasNet and 8 virtual shards."""
    torch.manual_seed(0)
    return DeepSpeedEngine(
        slots.build("model", node_of("conv_tasnet", quick)),
        Separation(),
        partial(torch.optim.Adam, lr=1e-3, fused=device.type == "cuda"),
        join_world(),
        seed=0,
        num_virtual_shards=8,
        micro_batch=3,
        allow_slow_bf16=True,
        **options,
    )


def batches_of(quick: bool) -> list[Batch]:
    """The batches of 8 virtual shards."""
    length = int((0.5 if quick else 3.0) * RATE)
    batches = []
    for shard in range(8):
        sources = 0.1 * torch.randn(3, 2, length, generator=torch.Generator().manual_seed(shard))
        positions = torch.arange(3 * shard, 3 * shard + 3)
        ids, lengths = [str(int(one)) for one in positions], torch.full((3,), length)
        batches.append(Batch(ids, positions, sources.sum(1), sources, None, lengths))
    return batches


def engine_part(device: torch.device, quick: bool) -> dict[str, Any]:
    """Whole steps by reduction."""
    batches = batches_of(quick)
    found: dict[str, Any] = {}
    for name, options in (
        ("canonical", {"reduction": "canonical"}),
        ("native", native := {"reduction": "native", "merge_shards": 0}),
        ("graphs", native | {"cuda_graphs": True}),
    ):
        engine = new_engine(device, quick, precision="bf16", tf32=True, **options)
        began = time.perf_counter()
        engine.step(batches)
        found[f"{name}_first_step_seconds"] = round(time.perf_counter() - began, 2)
        step = partial(engine.step, batches, read=False)
        step()
        found[f"{name}_ms"] = round(milliseconds(step, device, 0.1 if quick else 4.0), 2)
        engine.step(batches)
        del engine
        print(json.dumps(found), flush=True)
    found["canonical_over_native"] = round(found["canonical_ms"] / found["native_ms"], 3)
    return found


def repeat_part(device: torch.device, quick: bool) -> dict[str, bool]:
    """Whether two canonical runs with determinism end with the same bits."""
    ended = []
    for _ in range(2):
        engine = new_engine(device, quick, determinism=True)
        for _ in range(2 if quick else 5):
            engine.step(batches_of(quick))
        ended.append(torch.cat([one.flatten().double() for one in engine.weights().values()]))
    return {"equal": torch.equal(*ended)}


def run_part(part: str, device: torch.device, quick: bool, seconds: float) -> dict[str, Any]:
    """Measure one part in this process."""
    if part.startswith(COMPILE):
        return compile_part(part.removeprefix(COMPILE), device, quick)
    if part == "peak":
        return peak(device, quick)
    if part == "repeat":
        return repeat_part(device, quick)
    if part == "engine":
        return engine_part(device, quick)
    return model_part(part, device, quick, seconds)


def call(command: list[str], seconds: float, **environment: str) -> tuple[int, str, str]:
    """Status, output and errors of a Python program, which is killed when its time is over."""
    started = subprocess.Popen(
        [sys.executable, *command],
        cwd=Path(__file__).parent.parent,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said, problem = started.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        started.kill()
        said, problem = started.communicate()[0], f"ended after {seconds:.0f} s"
    return started.returncode, said, problem.strip()


def in_a_process(part: str, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What a process of its own reports of a part, and the `error` if it failed."""
    if part == "tests":
        command = ["-m", "pytest", "-m", "gpu", "-v", "-n", "8", "--durations=0", "tests/gpu"]
        status, said, _ = call(command, seconds)
        summary = said.strip().splitlines()[-1:]
        return {"summary": summary} | ({"error": said[-3000:]} if status else {})
    command = ["-m", "benchmarks.gpu", f"--part={part}", f"--limit={seconds:.0f}"]
    command += [f"--device={arguments.device}", *["--quick"] * arguments.quick]
    if seconds < 1:
        return {"error": "no time was left for it"}
    kind = torch.device(arguments.device).type
    status, said, problem = call(command, seconds, DS_ACCELERATOR=kind, LOCAL_RANK="0")
    lines = [line for line in said.splitlines() if line.startswith("{") and line.endswith("}")]
    found = json.loads(lines[-1]) if lines else {}
    return found | ({"error": problem[-800:] or "no result"} if status or not lines else {})


def add_utilisation(report: dict[str, Any], rates: dict[str, float]) -> None:
    """Add the share of the peak rate at which each side's products and convolutions ran."""
    for side in ("ours", "peer"):
        for kind, values in report.get(side, {}).items():
            if values is not None:
                rate = report["gflop"] / values["ms"]  # GFLOP per ms: TFLOP/s
                values["utilisation"] = round(rate / rates.get(kind, rates["bf16"]), 3)


def goals_of(reports: dict[str, Any], device_name: str) -> dict[str, dict[str, Any]]:
    """The goals and what was measured; those of an H100 only there."""
    goals: dict[str, dict[str, Any]] = {}

    def add(name: str, goal: Any, measured: Any, met: bool) -> None:
        goals[name] = {"goal": goal, "measured": measured, "met": met}

    for preset, goal in CALCULATED_MS.items():
        if "H100" in device_name and "ours" in reports.get(preset, {}):
            ours = reports[preset]["ours"]
            took = min(ours[kind]["ms"] for kind in ("bf16", "graphs") if ours.get(kind))
            at_full_batch = reports[preset]["batch"] == list(BATCHES[preset])
            add(f"{preset}, bf16, ms per step", goal, took, at_full_batch and took <= goal)
    for preset, report in reports.items():
        if "peer" in report and report["peer"]["bf16"]:
            ratio = round(report["peer"]["bf16"]["ms"] / report["ours"]["bf16"]["ms"], 2)
            add(f"{preset}, bf16, times the peer's speed", 1.0, ratio, ratio >= 1)
    if "equal" in reports["repeat"]:
        equal = reports["repeat"]["equal"]
        add("two canonical runs have the same bits", True, equal, equal)
    return goals


def main() -> None:
    """Run every part and print the line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small models, few repeats")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for all parts")
    parser.add_argument("--tests", action="store_true", help="run tests/gpu beside the compilation")
    parser.add_argument("--models", nargs="*", default=list(BATCHES), choices=[*BATCHES])
    parser.add_argument("--part", help=argparse.SUPPRESS)  # what in_a_process runs
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type != "cpu" and not torch.accelerator.is_available():
        sys.exit("no GPU that torch can use; --device cpu --quick tries the program without one")
    if arguments.part:
        print(json.dumps(run_part(arguments.part, device, arguments.quick, arguments.limit)))
        return
    deadline, reports = time.monotonic() + arguments.limit, dict[str, Any]()
    beside = ["repeat", *(COMPILE + model for model in arguments.models)]
    beside += ["tests"] * arguments.tests
    with ThreadPoolExecutor(len(beside)) as pool:
        done = pool.map(lambda part: in_a_process(part, arguments, BESIDE_SECONDS), beside)
        reports |= zip(beside, done, strict=True)
    for part in ("peak", "engine", *arguments.models):
        left = deadline - time.monotonic()
        reports[part] = in_a_process(part, arguments, min(PART_SECONDS, left))
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    for preset in arguments.models:
        if "gflop" in reports[preset] and "fp32" in reports["peak"]:
            add_utilisation(reports[preset], reports["peak"])
    errors = {part: report["error"] for part, report in reports.items() if "error" in report}
    line = {"name": "gpu", "device": name, "torch": torch.__version__, "quick": arguments.quick}
    line["compile_seconds"] = {one: reports[COMPILE + one] for one in arguments.models}
    others = ("repeat", *["tests"] * arguments.tests, "peak", "engine")
    line |= {part: reports[part] for part in others}
    line["models"] = {preset: reports[preset] for preset in arguments.models}
    with contextlib.suppress(KeyError):
        line["goals"] = goals_of(reports, name)
    print(json.dumps(line | {"errors": errors}))
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    main()
