"""Measure time and memory of a training step of each model and its published implementation.

    python -m benchmarks.models [--models conv_tasnet dprnn] [--seconds 1] [--batch 2] [--threads 2]
    [--no-keep] [--no-sweep] [--quick]
    python -m benchmarks.models --quick --models mini/tf_locoformer mini/dprnn conv_tasnet_small

Prints one JSON line with all cases (a file of configs/model, a batch and a length), the ratios, the
goals and a sweep; each case goes to stderr as it ends. A step is a forward and a backward pass. The
peer (peers.py) runs on the same batch and its weights are copied to our model. Before anything is
timed, the estimates and the gradient of the encoder, which depends on every other gradient, are
compared in float64 on a short piece, and ours in fp32 with the same.

The turns are interleaved, so that other load on the machine affects both sides equally; the best
and the median are given. `operations` counts the operations that PyTorch dispatches in one of our
steps; compiled code counts only its matrix products. Memory is the peak resident size of a process
that takes two steps, less its size before them. The roofline is the time that the peer's matrix
products and convolutions would take at the rate of one large fp32 product, measured in the same
turns: no step of the same arithmetic in fp32 is faster. The process keeps freed memory, as training
does (sepdist/allocator.py), unless --no-keep; both sides gain. If a peer is not installed, the line
names the packages and has our figures alone. The sweep times `conv_tasnet_small` by batch, length
and number of processes side by side, in seconds per second of audio of one process. --quick takes
one turn of each case and no bf16, memory or sweep.
"""

import argparse
import contextlib
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers import PEERS
from sepdist import slots
from sepdist.allocator import keep_freed_memory

PRODUCT_SIZE = 2048
# Model, batch, seconds of audio, and how many times as fast as the peer it shall be.
CASES = (
    ("conv_tasnet", 2, 3.0, 2.5),
    ("conv_tasnet", 2, 1.0, 2.0),
    ("dprnn", 1, 1.0, 1.15),
    ("dptnet", 1, 1.0, 1.15),
    ("sepformer", 1, 1.0, 1.15),
)
SWEPT = "conv_tasnet_small"
CONFIGS = Path(__file__).parent.parent / "configs" / "model"


def build_pair(preset: str) -> tuple[nn.Module, nn.Module | None, str]:
    """Our model, the peer with the same weights or None, and why there is no peer."""
    scale, _, name = preset.rpartition("/")
    node = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) | {"num_speakers": 2}
    if scale:
        small = CONFIGS.parent / "scale" / scale / f"{name}.yaml"
        node |= yaml.safe_load(small.read_text())["model"]
    torch.manual_seed(0)
    ours = slots.build("model", node)
    name = node["_target_"].split(".")[-2]
    if name not in PEERS:
        return ours, None, f"no peer of {name} is known"
    try:
        peer = PEERS[name].build(node)
    except (ImportError, OSError) as error:  # OSError: torchaudio built for another torch
        return ours, None, f"{error}; to compare, pip install --no-deps {PEERS[name].packages}"
    ours.load_state_dict(PEERS[name].weights(peer.state_dict()))
    return ours, peer, ""


def train_step(model: nn.Module, mixture: Tensor, bf16: bool = False) -> Callable[[], Any]:
    """One forward and backward pass."""

    def step() -> None:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else contextlib.nullcontext():
            estimates = model(mixture)
        estimates.float().square().mean().backward()

    return step


def estimates_and_gradient(model: nn.Module, mixture: Tensor) -> tuple[Tensor, Tensor]:
    """The estimates and the gradient of the encoder, [filters, kernel], in float64."""
    first = next(p for name, p in model.named_parameters() if name.startswith("encoder"))
    estimates = model(mixture)
    (gradient,) = torch.autograd.grad(estimates.square().mean(), [first])
    return estimates.detach().double(), gradient.view(len(gradient), -1).double()


def differences(ours: nn.Module, peer: nn.Module, mixture: Tensor) -> tuple[float, float]:
    """Relative difference from the peer in float64 of our float64 and of our fp32 results."""
    copies = [copy.deepcopy(model).double() for model in (ours, peer)]
    for module in copies[0].modules():
        if hasattr(module, "compiled"):
            module.compiled = False
    wide = [estimates_and_gradient(model, mixture.double()) for model in copies]
    narrow = estimates_and_gradient(ours, mixture)
    return tuple(  # type: ignore[return-value]
        max(float((a - b).norm() / b.norm()) for a, b in zip(got, wide[1], strict=True))
        for got in (wide[0], narrow)
    )


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (the peak so far) of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def memory_of(preset: str, side: str, arguments: argparse.Namespace) -> float | None:
    """Memory of two steps in MiB, measured in a process of its own; None if that failed."""
    settings = [f"--{name}={getattr(arguments, name)}" for name in ("seconds", "batch", "threads")]
    settings += ["--keep" if arguments.keep else "--no-keep"]
    command = [
        sys.executable,
        "-m",
        "benchmarks.models",
        "--models",
        preset,
        "--memory-of",
        side,
        *settings,
    ]
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True, check=False
    )
    return float(done.stdout) if done.returncode == 0 else None


class OperationCounter(TorchDispatchMode):
    """Count dispatched operations; inside compiled code, only its calls of PyTorch's kernels."""

    count = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled functions run compiled while the mode is on."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def flop_of(model: nn.Module, mixture: Tensor) -> int:
    """Floating-point operations of a step in products and convolutions, 3 times the forward's."""
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).to("meta")(mixture.to("meta"))  # computes nothing
    return 3 * counter.get_total_flops()


def batch_of(model: nn.Module, arguments: argparse.Namespace) -> Tensor:
    """A batch of whole frames, so that no version pads anything."""
    length = int(arguments.seconds * 8000)
    return 0.1 * torch.randn(arguments.batch, length - (length - model.min_length) % model.stride)


def measure(preset: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one model: its line of JSON."""
    ours, peer, missing = build_pair(preset)
    mixture = batch_of(ours, arguments)
    report: dict[str, Any] = {
        "model": preset,
        "batch": arguments.batch,
        "seconds": arguments.seconds,
        "parameters": sum(p.numel() for p in ours.parameters()),
    }
    began = time.perf_counter()
    train_step(ours, mixture)()
    report["first_step_seconds"] = round(time.perf_counter() - began, 1)
    with OperationCounter() as counter:
        train_step(ours, mixture)()
    report["operations"] = counter.count
    steps = {"ours": train_step(ours, mixture)}
    if not arguments.quick:
        steps["ours_bf16"] = train_step(ours, mixture, bf16=True)
    if peer is None:
        report["peer"] = missing
    else:
        in_float64, in_fp32 = differences(
            ours, peer, mixture[:, : ours.min_length + 250 * ours.stride]
        )
        if in_float64 > 1e-9 or in_fp32 > 1e-3:
            sys.exit(
                f"{preset}: not the same arithmetic: relative differences of {in_float64:.2g} in "
                f"float64 and {in_fp32:.2g} in fp32"
            )
        report |= {
            "difference_float64": float(f"{in_float64:.2g}"),
            "difference_fp32": float(f"{in_fp32:.2g}"),
        }
        steps["peer"] = train_step(peer, mixture)
        square = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE)
        steps["product"] = lambda: square @ square
    times: dict[str, list[float]] = {name: [] for name in steps}
    cpu_times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.repeats + 1):
        for name, step in steps.items():
            began, cpu_began = time.perf_counter(), time.process_time()
            step()
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - began)
                cpu_times[name].append(time.process_time() - cpu_began)
    report["best_seconds"] = {name: round(min(values), 4) for name, values in times.items()}
    report["median_seconds"] = {
        name: round(statistics.median(values), 4) for name, values in times.items()
    }
    report["audio_seconds_per_second"] = round(
        arguments.batch * arguments.seconds / min(times["ours"]), 2
    )
    report["best_cpu_seconds"] = {name: round(min(one), 4) for name, one in cpu_times.items()}
    if not arguments.quick:
        report["memory_mib"] = {
            side: memory_of(preset, side, arguments) for side in ("ours", "peer") if side in steps
        }
    if peer is not None:
        flop, rate = flop_of(peer, mixture), 2 * PRODUCT_SIZE**3 / min(times["product"])
        report |= {"gflop": round(flop / 1e9, 1), "product_gflops": round(rate / 1e9, 1)}
        report["roofline_seconds"] = round(flop / rate, 4)
        report["speedup_at_roofline"] = round(min(times["peer"]) / report["roofline_seconds"], 2)
        report["speedup"] = round(min(times["peer"]) / min(times["ours"]), 2)
        report["speedup_of_medians"] = round(
            statistics.median(times["peer"]) / statistics.median(times["ours"]), 2
        )
        report["speedup_of_cpu"] = round(min(cpu_times["peer"]) / min(cpu_times["ours"]), 2)
        if not arguments.quick:
            report["memory_ratio"] = round(
                report["memory_mib"]["ours"] / report["memory_mib"]["peer"], 2
            )
    return report


def best_step(batch_size: int, seconds: float, turns: int = 5) -> float:
    """The best time of a step of the swept model, per second of audio."""
    ours, _, _ = build_pair(SWEPT)
    step = train_step(ours, 0.1 * torch.randn(batch_size, int(8000 * seconds)))
    times = []
    for _ in range(turns + 1):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return round(min(times[1:]) / (batch_size * seconds), 4)


def sweep() -> dict[str, dict[str, Any]]:
    """Seconds per second of audio by batch (of 2 s), by length (batches of 2), and by processes."""
    command = [sys.executable, "-m", "benchmarks.models", "--threads=1", "--swept-step"]
    side_by_side = {}
    for count in (1, 2):
        started = [
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)
        ]
        side_by_side[str(count)] = [float(process.communicate()[0]) for process in started]
    return {
        "batch": {str(size): best_step(size, 2.0) for size in (1, 2, 4, 8)},
        "length": {str(length): best_step(2, length) for length in (0.5, 1.0, 2.0, 4.0)},
        "processes_of_1_thread": side_by_side,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", help="files of configs/model, or mini/MODEL")
    parser.add_argument("--seconds", type=float, help="of every case")
    parser.add_argument("--batch", type=int, help="of every case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    yes_or_no = argparse.BooleanOptionalAction
    parser.add_argument("--keep", action=yes_or_no, default=True, help="keep freed memory")
    parser.add_argument("--sweep", action=yes_or_no, default=True)
    parser.add_argument("--quick", action="store_true", help="one turn; no bf16, memory, sweep")
    parser.add_argument(
        "--memory-of", choices=["ours", "peer"], help=argparse.SUPPRESS
    )  # what memory_of runs
    parser.add_argument("--swept-step", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def cases_of(arguments: argparse.Namespace) -> list[tuple[str, int, float, float | None]]:
    """The cases that the arguments ask for, with the goal where there is one."""
    known = {name for name, *_ in CASES}
    cases: list[tuple[str, int, float, float | None]] = [
        case for case in CASES if not arguments.models or case[0] in arguments.models
    ]
    cases += [(name, 2, 1.0, None) for name in arguments.models or () if name not in known]
    changed = {
        (name, arguments.batch or size, arguments.seconds or seconds): (size, seconds, goal)
        for name, size, seconds, goal in cases
    }
    return [
        (*case, goal if (size, seconds) == case[1:] else None)
        for case, (size, seconds, goal) in changed.items()
    ]


def main() -> None:
    """Print a line per model, then the summary."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.keep:
        keep_freed_memory()
    if arguments.memory_of:
        ours, peer, _ = build_pair(arguments.models[0])
        step = train_step(
            {"ours": ours, "peer": peer}[arguments.memory_of], batch_of(ours, arguments)
        )
        before = resident("VmRSS")
        step(), step()
        print(resident("VmHWM") - before)
        return
    if arguments.swept_step:
        print(best_step(2, 2.0))
        return
    if arguments.quick:
        arguments.repeats, arguments.sweep = 1, False
    summary: dict[str, Any] = {"name": "models", "torch": torch.__version__}
    summary |= {name: getattr(arguments, name) for name in ("threads", "repeats", "keep")}
    ratios = ("speedup", "speedup_of_cpu", "speedup_at_roofline", "memory_ratio")
    goals: dict[str, dict[str, Any]] = {}
    summary |= {ratio: {} for ratio in ratios}
    summary["cases"] = {}
    for preset, batch_size, seconds, goal in cases_of(arguments):
        arguments.batch, arguments.seconds = batch_size, seconds
        report = measure(preset, arguments)
        case = f"{preset} {batch_size} x {seconds:g} s"
        print(case, json.dumps(report), file=sys.stderr, flush=True)
        summary["cases"][case] = report
        for ratio in ratios:
            if ratio in report:
                summary[ratio][case] = report[ratio]
        if goal and "speedup" in report:
            met = report["speedup"] >= goal
            goals[case] = {"goal": goal, "measured": report["speedup"], "met": met}
    if arguments.sweep:
        summary["sweep"] = sweep()
    print(json.dumps(summary | {"goals": goals}))


if __name__ == "__main__":
    main()
