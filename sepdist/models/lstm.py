"""A bidirectional LSTM for the dual-path models: sequences [R, T, F] in, both directions' outputs [R, T, 2 H] out.

On the CPU in fp32 it runs lstm.cpp, which is built in about a second when it is first needed, and torch's matrix
products for the gradients that sum over all steps. Everywhere else, and where no C++ compiler is found, it is torch's
own LSTM on the same parameters.

Shapes: R sequences, T steps, F features, H hidden units, 4 gates (input, forget, cell, output).
"""

import ctypes
import functools
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sepdist.models.conv_block import has_compiler
from sepdist.models.frames import widen

logger = logging.getLogger(__name__)

WIDTH = 16  # as in lstm.cpp


@functools.cache
def _library() -> ctypes.CDLL | None:
    """lstm.cpp, built for this very CPU, never kept, because another node may have another one; None if that fails."""
    if not has_compiler():
        return None
    names = (os.environ.get("CXX"), "g++", "clang++")
    compiler = next(name for name in names if name and shutil.which(name))
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "lstm.so"
        options = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
        command = [compiler, *options, "-o", str(built), str(Path(__file__).with_name("lstm.cpp"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        try:
            done.check_returncode()
            return ctypes.CDLL(str(built))
        except (subprocess.CalledProcessError, OSError) as error:
            logger.warning(
                "torch's LSTM is used, which takes about twice the memory: %s\n%s",
                error,
                done.stderr,
            )
            return None


def _call(name: str, sizes: tuple[int, ...], *tensors: Tensor | None) -> None:
    assert all(x is None or (x.is_contiguous() and x.dtype == torch.float32) for x in tensors)
    numbers = [ctypes.c_long(size) for size in (*sizes, torch.get_num_threads())]
    library = _library()
    assert library is not None
    getattr(library, name)(
        *numbers, *(ctypes.c_void_p(x.data_ptr() if x is not None else None) for x in tensors)
    )


def _packed(weight: Tensor) -> Tensor:
    """[2, 4 H, K] as [2, H / WIDTH, K, 4, WIDTH], the order in which the forward pass reads it."""
    directions, outputs, depth = weight.shape
    return (
        weight.view(directions, 4, outputs // (4 * WIDTH), WIDTH, depth)
        .permute(0, 2, 4, 1, 3)
        .contiguous()
    )


class _LSTMFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        in_weight: Tensor,
        hidden_weight: Tensor,
        in_bias: Tensor,
        hidden_bias: Tensor,
    ) -> Tensor:
        rows, steps, features = x.shape
        hidden = hidden_weight.shape[-1]
        x = x.contiguous()
        out = x.new_empty(rows, steps, 2 * hidden)
        kept = any(ctx.needs_input_grad)
        gates = x.new_empty(rows * steps, 8 * hidden) if kept else None
        cells = x.new_empty(rows * steps, 2 * hidden) if kept else None
        weights = _packed(torch.cat([in_weight, hidden_weight], dim=-1))
        _call(
            "lstm_forward",
            (rows, steps, features, hidden),
            x,
            weights,
            in_bias + hidden_bias,
            gates,
            cells,
            out,
        )
        if kept:
            ctx.save_for_backward(x, in_weight, hidden_weight, cells, out)
            ctx.gates = gates
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, in_weight, hidden_weight, cells, out = ctx.saved_tensors
        if ctx.gates is None:
            raise RuntimeError(
                "an LSTM's second backward pass: the first one has overwritten the gates"
            )
        dgates, ctx.gates = ctx.gates, None
        rows, steps, features = x.shape
        hidden = hidden_weight.shape[-1]
        weights = (
            hidden_weight.view(2, 4 * hidden, hidden // (4 * WIDTH), 4 * WIDTH)
            .transpose(1, 2)
            .contiguous()
        )
        _call("lstm_backward", (rows, steps, hidden), dout.contiguous(), weights, cells, dgates)

        states = out.view(rows, steps, 2, hidden)
        before = (F.pad(states[:, :-1, 0], (0, 0, 1, 0)), F.pad(states[:, 1:, 1], (0, 0, 0, 1)))
        dweights = [
            dgates[:, 4 * hidden * direction :][:, : 4 * hidden].T
            @ torch.cat([x, state], dim=-1).flatten(0, 1)
            for direction, state in enumerate(before)
        ]
        din_weight, dhidden_weight = torch.stack(dweights).split([features, hidden], dim=-1)
        dbias = dgates.sum(0).view(2, 4 * hidden)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        if dx is not None:  # in pieces: about a fifth faster than in one
            for piece, into in zip(
                dgates.split(1024), dx.view(-1, features).split(1024), strict=True
            ):
                torch.mm(piece, in_weight.view(-1, features), out=into)
        return dx, din_weight, dhidden_weight, dbias, dbias


class BiLSTM(nn.Module):
    """One layer of `nn.LSTM(num_features, num_hidden, bidirectional=True, batch_first=True)`, its output alone.

    The parameters are nn.LSTM's, the two directions stacked: [2, 4 H, F], [2, 4 H, H], [2, 4 H], [2, 4 H].
    """

    def __init__(self, num_features: int, num_hidden: int, compile: bool = True) -> None:
        super().__init__()
        self.compiled = compile and num_hidden % (4 * WIDTH) == 0
        self.in_weight = nn.Parameter(torch.empty(2, 4 * num_hidden, num_features))
        self.hidden_weight = nn.Parameter(torch.empty(2, 4 * num_hidden, num_hidden))
        self.in_bias = nn.Parameter(torch.empty(2, 4 * num_hidden))
        self.hidden_bias = nn.Parameter(torch.empty(2, 4 * num_hidden))
        for parameter in self.parameters():
            nn.init.uniform_(
                parameter, -(num_hidden**-0.5), num_hidden**-0.5
            )  # as torch's LSTM starts

    def forward(self, x_RTF: Tensor) -> Tensor:
        """Outputs [R, T, 2 H]: the forward direction's, then the backward direction's, at each step."""
        parameters = (self.in_weight, self.hidden_weight, self.in_bias, self.hidden_bias)
        autocast = torch.is_autocast_enabled(x_RTF.device.type)
        plain_fp32 = x_RTF.device.type == "cpu" and x_RTF.dtype == torch.float32 and not autocast
        if self.compiled and plain_fp32 and _library():
            return _LSTMFunction.apply(x_RTF, *parameters)
        x_RTF = widen(x_RTF)
        start = x_RTF.new_zeros(2, x_RTF.shape[0], self.hidden_weight.shape[-1])
        weights = [parameter[direction] for direction in (0, 1) for parameter in parameters]
        # oneDNN has no bf16 LSTM for processors without AVX-512, and raises; with it, bf16 is 1.8
        # times as fast as fp32.
        narrow = x_RTF.device.type != "cpu" or torch.backends.cpu.get_cpu_capability() == "AVX512"
        with torch.autocast(x_RTF.device.type, enabled=autocast and narrow):
            return torch.lstm(
                x_RTF, (start, start), weights, True, 1, 0.0, self.training, True, True
            )[0]
