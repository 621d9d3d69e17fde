"""Measure time and memory of a training step of each model and its published implementation.

    python -m benchmarks.models [--models conv_tasnet dprnn] [--seconds 1] [--batch 2] [--threads 2]
    [--keep]

Prints one JSON line per model (a file of configs/model) and a last one with the ratios. A step is a
forward and a backward pass. The peer (peers.py) runs on the same batch and its weights are copied
to our model. Before anything is timed, the estimates and the gradient of the encoder, which depends
on every other gradient, are compared in float64 on a short piece, and ours in fp32 with the same.

The turns are interleaved, so that other load on the machine affects both sides equally; the best
and the median are given. `operations` counts the operations that PyTorch dispatches in one of our
steps; compiled code counts only its matrix products. Memory is the peak resident size of a process
that takes two steps, less its size before them. The roofline is the time that the peer's matrix
products and convolutions would take at the rate of one large fp32 product, measured in the same
turns: no step of the same arithmetic in fp32 is faster. With --keep the process keeps freed memory,
as evaluation does (sepdist/allocator.py); both sides gain. If a peer is not installed, the line
names the packages and has our figures alone.
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
CONFIGS = Path(__file__).parent.parent / "configs" / "model"


def build_pair(preset: str) -> tuple[nn.Module, nn.Module | None, str]:
    """Our model, the peer with the same weights or None, and why there is no peer."""
    node = yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text()) | {"num_speakers": 2}
    torch.manual_seed(0)
    ours = slots.build("model", node)
    name = node["_target_"].split(".")[-2]
    if name not in PEERS:
        return ours, None, f"no peer of {name} is known"
    try:
        peer = PEERS[name].build(node)
    except ImportError as error:
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
    settings += ["--keep"] * arguments.keep
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
        "parameters": sum(p.numel() for p in ours.parameters()),
    }
    began = time.perf_counter()
    train_step(ours, mixture)()
    report["first_step_seconds"] = round(time.perf_counter() - began, 1)
    with OperationCounter() as counter:
        train_step(ours, mixture)()
    report["operations"] = counter.count
    steps = {"ours": train_step(ours, mixture), "ours_bf16": train_step(ours, mixture, bf16=True)}
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
    for turn in range(arguments.repeats + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - began)
    report["best_seconds"] = {name: round(min(values), 4) for name, values in times.items()}
    report["median_seconds"] = {
        name: round(statistics.median(values), 4) for name, values in times.items()
    }
    report["audio_seconds_per_second"] = round(
        arguments.batch * arguments.seconds / min(times["ours"]), 2
    )
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
        report["memory_ratio"] = round(
            report["memory_mib"]["ours"] / report["memory_mib"]["peer"], 2
        )
    return report


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(PEERS), help="files of configs/model")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="keep freed memory in the process")
    parser.add_argument(
        "--memory-of", choices=["ours", "peer"], help=argparse.SUPPRESS
    )  # what memory_of runs
    return parser.parse_args()


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
    reports = []
    for preset in arguments.models:
        reports.append(measure(preset, arguments))
        print(json.dumps(reports[-1]), flush=True)
    summary = {"benchmark": "models", "torch": torch.__version__}
    summary |= {
        name: getattr(arguments, name)
        for name in ("seconds", "batch", "threads", "repeats", "keep")
    }
    for ratio in ("speedup", "speedup_at_roofline", "memory_ratio"):
        summary[ratio] = {report["model"]: report[ratio] for report in reports if ratio in report}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
