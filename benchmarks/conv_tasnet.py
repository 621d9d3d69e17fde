"""How fast is Conv-TasNet, forward and backward, on this machine? One JSON line on stdout.

    python benchmarks/conv_tasnet.py [--threads 2] [--seconds 3] [--batch 2] [--repeats 5] [--preset conv_tasnet]

Ours compiled, ours eager, ours compiled under bf16 autocast, and the peer: Asteroid's where `asteroid` is importable
(timed only, its weights are its own), and a textbook Conv-TasNet in torch's nn.Conv1d, channels first, whose weights
are ours and whose estimates and gradients are compared with ours, in float64, before anything is timed. The rounds
are interleaved, so that other load on the machine falls on all alike, and the best and the median of each are given.
"matmul" is the time of the blocks' matrix products alone, below which no version in fp32 can come.
"""

import argparse
import contextlib
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from sepdist.models.conv_tasnet import ConvTasNet

CONFIGS = Path(__file__).parent.parent / "configs" / "model"


class GlobalNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2), keepdim=True)
        variance = (x - mean).square().mean((1, 2), keepdim=True)
        return self.gain * ((x - mean) / (variance + 1e-8).sqrt()) + self.shift


class TextbookBlock(nn.Module):
    def __init__(self, features: int, hidden: int, skip: int, taps: int, dilation: int) -> None:
        super().__init__()
        reach = dilation * (taps // 2)
        self.shared = nn.Sequential(
            nn.Conv1d(features, hidden, 1),
            nn.PReLU(),
            GlobalNorm(hidden),
            nn.Conv1d(hidden, hidden, taps, padding=reach, dilation=dilation, groups=hidden),
            nn.PReLU(),
            GlobalNorm(hidden),
        )
        self.residual = nn.Conv1d(hidden, features, 1)
        self.skip = nn.Conv1d(hidden, skip, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shared = self.shared(x)
        return x + self.residual(shared), self.skip(shared)


class Textbook(nn.Module):
    """The same network, written the usual way."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        filters, kernel, stride = sizes["num_filters"], sizes["kernel_size"], sizes["stride"]
        features, hidden, skip = sizes["num_bottleneck"], sizes["num_hidden"], sizes["num_skip"]
        self.num_speakers = sizes["num_speakers"]
        self.encoder = nn.Conv1d(1, filters, kernel, stride=stride, bias=False)
        self.norm = GlobalNorm(filters)
        self.bottleneck = nn.Conv1d(filters, features, 1)
        self.blocks = nn.ModuleList(
            TextbookBlock(features, hidden, skip, sizes["num_taps"], 2**index)
            for _ in range(sizes["num_repeats"])
            for index in range(sizes["num_blocks"])
        )
        self.head = nn.Sequential(nn.PReLU(), nn.Conv1d(skip, self.num_speakers * filters, 1), nn.ReLU())
        self.decoder = nn.ConvTranspose1d(filters, 1, kernel, stride=stride, bias=False)

    def forward(self, mixture: Tensor) -> Tensor:
        encoded = self.encoder(mixture[:, None])
        x, total = self.bottleneck(self.norm(encoded)), 0
        for block in self.blocks:
            x, skip = block(x)
            total = total + skip
        masked = self.head(total).unflatten(1, (self.num_speakers, -1)) * encoded[:, None]
        return self.decoder(masked.flatten(0, 1)).view(len(mixture), self.num_speakers, -1)


def copy_weights(ours: ConvTasNet, textbook: Textbook) -> None:
    """Give the textbook model our weights."""
    pairs = [
        (textbook.encoder.weight, ours.encoder.weight),
        (textbook.norm.gain, ours.bottleneck.gain),
        (textbook.norm.shift, ours.bottleneck.shift),
        (textbook.bottleneck.weight, ours.bottleneck.weight),
        (textbook.bottleneck.bias, ours.bottleneck.bias),
        (textbook.head[0].weight, ours.prelu.weight),
        (textbook.head[1].weight, ours.mask_conv.weight),
        (textbook.head[1].bias, ours.mask_conv.bias),
        (textbook.decoder.weight, ours.decoder.weight.T),
    ]
    for theirs, block in zip(textbook.blocks, ours.blocks, strict=True):
        split = theirs.residual.out_channels
        layers = theirs.shared
        pairs += [
            (layers[0].weight, block.in_weight),
            (layers[0].bias, block.in_bias),
            (layers[1].weight, block.prelu1),
            (layers[2].gain, block.gain1),
            (layers[2].shift, block.shift1),
            (layers[3].weight, block.taps.T),
            (layers[3].bias, block.taps_bias),
            (layers[4].weight, block.prelu2),
            (layers[5].gain, block.gain2),
            (layers[5].shift, block.shift2),
            (theirs.residual.weight, block.out_weight[:split]),
            (theirs.residual.bias, block.out_bias[:split]),
            (theirs.skip.weight, block.out_weight[split:]),
            (theirs.skip.bias, block.out_bias[split:]),
        ]
    with torch.no_grad():
        for into, source in pairs:
            into.copy_(source.reshape(into.shape))


def train_step(model: nn.Module, mixture: Tensor, bf16: bool = False) -> Callable[[], Tensor]:
    """One forward and backward pass; returns the loss."""

    def step() -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else contextlib.nullcontext():
            estimates = model(mixture)
        loss = estimates.float().square().mean()
        loss.backward()
        return loss.detach()

    return step


def inference(model: nn.Module, mixture: Tensor) -> Callable[[], Tensor]:
    def step() -> Tensor:
        with torch.no_grad():
            return model(mixture)

    return step


def matrix_products(ours: ConvTasNet, mixture: Tensor) -> Callable[[], Any]:
    """The block's matrix products alone, forward and backward, of all blocks."""
    block = ours.blocks[0]
    hidden, features = block.in_weight.shape
    outputs = block.out_weight.shape[0]
    rows = len(mixture) * (1 + (mixture.shape[1] - ours.kernel_size) // ours.stride)
    x, y, both = torch.randn(rows, features), torch.randn(rows, hidden), torch.randn(rows, outputs)
    into, out = torch.randn(hidden, features), torch.randn(outputs, hidden)

    def step() -> None:
        for _ in ours.blocks:
            _ = x @ into.T, y @ out.T, both @ out, both.T @ y, y @ into, y.T @ x

    return step


def asteroid_step(sizes: dict[str, int], mixture: Tensor) -> Callable[[], Tensor] | None:
    """Asteroid's Conv-TasNet of the same size, where it is installed."""
    try:
        from asteroid.models import ConvTasNet as Peer
    except ImportError:
        return None
    peer = Peer(
        n_src=sizes["num_speakers"],
        n_filters=sizes["num_filters"],
        kernel_size=sizes["kernel_size"],
        stride=sizes["stride"],
        bn_chan=sizes["num_bottleneck"],
        hid_chan=sizes["num_hidden"],
        skip_chan=sizes["num_skip"],
        n_blocks=sizes["num_blocks"],
        n_repeats=sizes["num_repeats"],
        mask_act="relu",
    )
    return train_step(peer, mixture)


def largest_difference(ours: ConvTasNet, textbook: Textbook, mixture: Tensor) -> float:
    """Relative difference of the estimates and of the gradient of the first weight, which every other one shapes."""
    pairs = []
    for model in (ours, textbook):
        model.zero_grad()
        estimates = model(mixture)
        estimates.square().mean().backward()
        first = model.encoder.weight.grad
        assert first is not None
        pairs.append((estimates.detach(), first.reshape(ours.encoder.weight.shape)))
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*pairs, strict=True))


def check_same_arithmetic(
    compiled: ConvTasNet, eager: ConvTasNet, textbook: Textbook, mixture: Tensor
) -> tuple[float, float]:
    """Eager against the textbook in float64, compiled against eager in fp32; ends the program where they differ."""
    # In float64, because in fp32 rounding puts a few values on the other side of a ReLU, in either version.
    difference = largest_difference(copy.deepcopy(eager).double(), copy.deepcopy(textbook).double(), mixture.double())
    with torch.no_grad():
        by_eager = eager(mixture)
        rounding = float((compiled(mixture) - by_eager).norm() / by_eager.norm())
    if difference > 1e-9 or rounding > 1e-5:
        sys.exit(f"not the same arithmetic: {difference:.2g} in float64, {rounding:.2g} compiled; nothing timed")
    return difference, rounding


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--preset", default="conv_tasnet", help="a file of configs/model")
    return parser.parse_args()


def main() -> None:
    """Check that the versions agree, time them in turns, print the JSON line."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    sizes = yaml.safe_load((CONFIGS / f"{arguments.preset}.yaml").read_text()) | {"num_speakers": 2}
    sizes = {name: value for name, value in sizes.items() if name not in ("_target_", "compile")}
    length = int(arguments.seconds * 8000) // sizes["stride"] * sizes["stride"]  # whole frames: no padding anywhere
    mixture = 0.1 * torch.randn(arguments.batch, length)

    compiled, eager, textbook = ConvTasNet(**sizes), ConvTasNet(**sizes, compile=False), Textbook(sizes)
    eager.load_state_dict(compiled.state_dict())
    copy_weights(compiled, textbook)
    began = time.perf_counter()
    train_step(compiled, mixture)()
    warmup = time.perf_counter() - began
    difference, rounding = check_same_arithmetic(compiled, eager, textbook, mixture)
    steps: dict[str, Callable[[], Any]] = {
        "compiled": train_step(compiled, mixture),
        "eager": train_step(eager, mixture),
        "compiled_bf16": train_step(compiled, mixture, bf16=True),
        "textbook": train_step(textbook, mixture),
        "matmul": matrix_products(compiled, mixture),
        "inference_compiled": inference(compiled, mixture),
        "inference_eager": inference(eager, mixture),
        "inference_textbook": inference(textbook, mixture),
    }
    peer = asteroid_step(sizes, mixture)
    if peer:
        steps["asteroid"] = peer
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.repeats + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - began)
    best = {name: min(values) for name, values in times.items()}
    audio = arguments.batch * arguments.seconds
    report = {
        "benchmark": "conv_tasnet",
        "preset": arguments.preset,
        "batch": arguments.batch,
        "seconds": arguments.seconds,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in compiled.parameters()),
        "relative_difference_float64": float(f"{difference:.2g}"),
        "relative_difference_compiled": float(f"{rounding:.2g}"),
        "warmup_seconds": round(warmup, 1),
        "best_seconds": {name: round(value, 4) for name, value in best.items()},
        "median_seconds": {name: round(statistics.median(values), 4) for name, values in times.items()},
        "audio_seconds_per_second": round(audio / best["compiled"], 1),
        "speedup_over_textbook": round(best["textbook"] / best["compiled"], 2),
        "speedup_over_asteroid": round(best["asteroid"] / best["compiled"], 2) if peer else None,
        "share_of_matmul": round(best["matmul"] / best["compiled"], 2),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
