"""The block of Conv-TasNet with a hand-written gradient, each of its two passes compiled whole.

Tensors are channels-last, [B, N, F], so that a 1x1 convolution is one matrix product and a
depth-wise convolution is a sum of shifted rows. The block keeps two [B, N, H] tensors for its
backward pass and recomputes what is cheap. `torch.compile` turns `block_forward` and
`block_backward` into a few loops over memory between the matrix products. All blocks of a model
share one compilation of each, whatever their dilation and the length of the input. Without a C++
compiler the same functions run uncompiled.

On CPUs sums over frames are taken in double precision: Inductor sums float32 in pieces of 4096,
which would make it compile again for more frames than that.

Shapes: B batch, N frames, F features, H hidden channels, K taps.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sepdist.models.compiling import compiled_if, on_gpu
from sepdist.models.frames import EPS, widen

PIECE = 128  # frames that one thread of a GPU sums
MAX_REACH = 2**16  # frames of padding on either side, which take memory


class Weights(NamedTuple):
    """The parameters of a block: 1x1, PReLU, gLN, depth-wise convolution, PReLU, gLN, 1x1."""

    in_weight: Tensor  # [H, F]
    in_bias: Tensor
    prelu1: Tensor  # [1]
    gain1: Tensor
    shift1: Tensor
    taps: Tensor  # [K, H]
    taps_bias: Tensor
    prelu2: Tensor
    gain2: Tensor
    shift2: Tensor
    out_weight: Tensor  # [F + skip channels, H]: residual, then skip
    out_bias: Tensor


def _sum_frames(x_BNH: Tensor) -> Tensor:
    """Per item, [B, H]."""
    return x_BNH.sum(1, dtype=None if on_gpu(x_BNH) else torch.float64).to(x_BNH.dtype)


def _sum_all_frames(x_BNH: Tensor) -> Tensor:
    """Over the batch too, [H]; on a CPU item by item, because one item fits the cache."""
    return x_BNH.sum((0, 1)) if on_gpu(x_BNH) else _sum_frames(x_BNH).sum(0)


def _sum_all(x_BNH: Tensor) -> Tensor:
    """[1]; on GPUs each row first, in the kernel that computes it."""
    return (x_BNH.sum(2).sum(1) if on_gpu(x_BNH) else _sum_all_frames(x_BNH)).sum(0, keepdim=True)


def _stored(x: Tensor) -> Tensor:
    """x itself, which Inductor then writes on GPUs, rather than compute it again for each use."""
    return x.as_strided(x.shape, x.stride()) if on_gpu(x) else x


def _moments(x_BNH: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of each item, [B, 1, 1]."""
    size = x_BNH.shape[1] * x_BNH.shape[2]
    mean = x_BNH.sum(2).sum(1, dtype=torch.float64) / size
    square = (x_BNH * x_BNH).sum(2).sum(1, dtype=torch.float64) / size
    rstd = torch.rsqrt((square - mean * mean).clamp_min(0) + EPS)
    return mean[:, None, None].to(x_BNH.dtype), rstd[:, None, None].to(x_BNH.dtype)


def _shifted(x_BNH: Tensor, steps: int, more: int = 0) -> Tensor:
    """Row n + steps (maybe < 0) of x in the place of row n, zeros from outside; `more` rows."""
    count, distance = x_BNH.shape[1] + more, abs(steps)
    padded = F.pad(x_BNH, (0, 0, distance, distance + more))
    return padded[:, distance + steps : distance + steps + count]


def _tap_steps(taps_KH: Tensor, reach: int) -> list[int]:
    """The distance of each tap from the centre, in frames; `reach` is the dilation + 1."""
    return [(k - len(taps_KH) // 2) * (reach - 1) for k in range(len(taps_KH))]


def _under_taps(
    y: Tensor, mean: Tensor, rstd: Tensor, w: Weights, reach: int, more: int = 0
) -> list[Tensor]:
    """For each tap its rows of y after PReLU and norm, then 1 if they are inside; else zeros."""
    ones, seen = torch.ones_like(y[:1, :, :1], dtype=mean.dtype), []
    for s in _tap_steps(w.taps, reach):
        inside, q = _shifted(ones, s, more), F.prelu(widen(_shifted(y, s, more)), w.prelu1)
        seen += [(q - mean * inside) * rstd, inside]
    return seen


def _convolve(y: Tensor, q: Tensor, mean: Tensor, rstd: Tensor, w: Weights, reach: int) -> Tensor:
    """The depth-wise convolution of the first norm's output; q is y after PReLU."""
    if on_gpu(y):  # reads the narrow y for each tap; nothing is written in fp32 and read again
        factors = _stored(torch.stack([w.taps * w.gain1, w.taps * w.shift1], 1)).flatten(0, 1)
        rows = _under_taps(y, mean, rstd, w, reach)
    else:
        factors, normalised = w.taps, (q - mean) * rstd * w.gain1 + w.shift1
        rows = [_shifted(normalised, steps) for steps in _tap_steps(w.taps, reach)]
    return sum((f * row for f, row in zip(factors.unbind(), rows, strict=True)), w.taps_bias)


def _convolve_backward(
    dz: Tensor, y: Tensor, q: Tensor, mean: Tensor, rstd: Tensor, w: Weights, reach: int
) -> tuple[Tensor, ...]:
    """The gradients of the norm's output [B, N, H], taps and bias; per item of gain1 and shift1."""
    steps, wide = _tap_steps(w.taps, reach), widen(dz)
    dnorm = torch.zeros_like(wide)
    for tap, s in zip(w.taps.unbind(), steps, strict=True):
        dnorm = dnorm + tap * _shifted(wide, -s)
    if not on_gpu(y):
        xhat = (q - mean) * rstd
        rows = [_shifted(xhat * w.gain1 + w.shift1, s) for s in steps]
        dtaps = torch.stack([_sum_all_frames(wide * row) for row in rows])
        return dnorm, dtaps, _sum_all_frames(wide), _sum_frames(dnorm * xhat), _sum_frames(dnorm)
    more = -y.shape[1] % PIECE  # all sums come from two per tap and item, in one pass over dz and y
    terms = [widen(_shifted(dz, 0, more)) * x for x in _under_taps(y, mean, rstd, w, reach, more)]
    sums = torch.stack([term.unflatten(1, (-1, PIECE)).sum(2) for term in terms]).sum(2)
    dtaps = sums[::2].sum(1) * w.gain1 + sums[1::2].sum(1) * w.shift1
    dgain, dshift = ((w.taps[:, None] * sums[k::2]).sum(0) for k in (0, 1))
    return dnorm, dtaps, sums[len(steps) // 2 * 2 + 1].sum(0), dgain, dshift


def block_forward(
    x: Tensor, skip: Tensor, w: Weights, reach: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The next x and skip sum, then what the backward pass needs: y, p, moments, narrow x if any.

    The second norm is folded into the product after it: with xhat = (p - mean) rstd, the result
    (xhat gain + shift) W^T + b is rstd p (W gain)^T + (W shift + b - rstd mean W gain), so its rows
    are never written.
    """
    narrow = x.to(dtype)
    y = F.linear(narrow, w.in_weight.to(dtype), w.in_bias.to(dtype))
    q = F.prelu(widen(y), w.prelu1)
    mean1, rstd1 = _moments(q)
    p = F.prelu(_convolve(y, q, mean1, rstd1, w, reach), w.prelu2).to(dtype)
    mean2, rstd2 = _moments(widen(p))
    folded = w.out_weight * w.gain2
    offset = (w.out_weight * w.shift2).sum(1) + w.out_bias - mean2 * rstd2 * folded.sum(1)
    product, sizes = widen(F.linear(p, folded.to(dtype))), (x.shape[2], skip.shape[2])
    # Each part by itself: from one sum of both, Inductor would write it and read it again.
    residual, new_skip = (
        part * rstd2 + shift
        for part, shift in zip(product.split(sizes, 2), offset.split(sizes, 2), strict=True)
    )
    kept = [] if dtype == x.dtype else [narrow]
    return x + residual, skip + new_skip, y, p, mean1, rstd1, mean2, rstd2, *kept


def _out_product_backward(
    dout: Tensor, p: Tensor, mean: Tensor, rstd: Tensor, w: Weights
) -> tuple[Tensor, ...]:
    """Through the output product and the second norm: dp = rstd (d - c1 - xhat c2).

    Returns d [B, N, H], c1 and c2 [B, 1, 1], and the gradients of gain2, shift2, out_weight and
    out_bias. The sums over frames that they need come from one product, the gradient of the weight.
    """
    size = p.shape[1] * p.shape[2]
    folded = w.out_weight * w.gain2
    dbias = _sum_frames(widen(dout))
    dout = dout.to(p.dtype)
    products = widen(torch.bmm(dout.mT, p))
    correlation = (products - mean * dbias[:, :, None]) * rstd  # the sum over frames of dout^T xhat
    c1 = ((dbias * folded.sum(1)).sum(1) / size)[:, None, None]
    c2 = ((correlation * folded).sum(2).sum(1) / size)[:, None, None]
    correlation, dbias = correlation.sum(0), dbias.sum(0)
    dweight = correlation * w.gain2 + dbias[:, None] * w.shift2
    dgain = (correlation * w.out_weight).sum(0)
    dshift = (dbias[:, None] * w.out_weight).sum(0)
    return widen(dout @ folded.to(p.dtype)), c1, c2, dgain, dshift, dweight, dbias


def block_backward(
    dx: Tensor,
    dskip: Tensor,
    x: Tensor,
    y: Tensor,
    p: Tensor,
    moments: tuple[Tensor, Tensor, Tensor, Tensor],
    w: Weights,
    reach: int,
) -> tuple[Tensor, Weights]:
    """The gradients of x and of the parameters; that of the skip sum is dskip."""
    mean1, rstd1, mean2, rstd2 = moments
    size, dtype = y.shape[1] * y.shape[2], y.dtype
    parts = (dx.to(dtype), dskip.to(dtype)) if on_gpu(dx) else (dx, dskip)
    dnorm2, c1, c2, dgain2, dshift2, dout_weight, dout_bias = _out_product_backward(
        _stored(torch.cat(parts, dim=2)), p, mean2, rstd2, w
    )

    # The second norm and PReLU, then the depth-wise convolution.
    wide_y = widen(y)
    q = F.prelu(wide_y, w.prelu1)
    z = _convolve(y, q, mean1, rstd1, w, reach)
    xhat2 = (F.prelu(z, w.prelu2) - mean2) * rstd2
    dp = rstd2 * (dnorm2 - c1 - xhat2 * c2)
    dprelu2 = _sum_all(torch.where(z > 0, 0.0, dp * z))
    dz = _stored(torch.where(z > 0, dp, dp * w.prelu2).to(dtype))
    dnorm1, dtaps, dbias, dgain1, dshift1 = _convolve_backward(dz, y, q, mean1, rstd1, w, reach)

    # The first norm and PReLU, then the input product; the residual passes dx through.
    e1, e2 = (((d * w.gain1).sum(1) / size)[:, None, None] for d in (dshift1, dgain1))
    dq = rstd1 * (dnorm1 * w.gain1 - e1 - (q - mean1) * rstd1 * e2)
    dprelu1 = _sum_all(torch.where(wide_y > 0, 0.0, dq * wide_y))
    dy = _stored(torch.where(wide_y > 0, dq, dq * w.prelu1).to(dtype))
    din_bias = _sum_all_frames(widen(dy))
    rows = dy.flatten(0, 1)
    din_weight = widen(rows.T @ x.flatten(0, 1).to(dtype))
    through = dx + (rows @ w.in_weight.to(dtype)).view_as(dx)
    return through, Weights(
        din_weight, din_bias, dprelu1, dgain1.sum(0), dshift1.sum(0), dtaps, dbias,
        dprelu2, dgain2, dshift2, dout_weight, dout_bias,
    )  # fmt: skip


class _BlockFunction(torch.autograd.Function):
    """The block as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any, compile: bool, reach: int, dtype: torch.dtype,
        x: Tensor, skip: Tensor, *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        run = compiled_if(compile, block_forward)
        # Detached, as torch.compile would compile again for tensors that require no gradients.
        x_next, skip_next, *kept = run(x.detach(), skip.detach(), Weights(*weights), reach, dtype)
        ctx.compile, ctx.reach = compile, reach
        # The parameters themselves: ZeRO-3 frees and refills them between the passes.
        ctx.save_for_backward(*(kept[6:] or [x]), *kept[:6], *weights)
        return x_next, skip_next

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor, dskip: Tensor) -> tuple[Tensor | None, ...]:
        x, y, p, *rest = ctx.saved_tensors
        run = compiled_if(ctx.compile, block_backward)
        weights = Weights(*rest[4:])
        through, gradients = run(dx, dskip, x.detach(), y, p, tuple(rest[:4]), weights, ctx.reach)
        return (None, None, None, through, dskip, *gradients)


def init_uniform(weights: tuple[Tensor, ...], fan_in: int) -> None:
    """Draw weights and biases as torch's convolutions start."""
    for weight in weights:
        nn.init.uniform_(weight, -(fan_in**-0.5), fan_in**-0.5)


class ConvBlock(nn.Module):
    """1x1, PReLU, gLN, depth-wise convolution, PReLU, gLN, two 1x1 (Conv-TasNet, section II-C).

    (x [B, N, F], skip sum [B, N, skip]) -> (x + residual, skip sum + skip); fp32, or the autocast
    type inside. The parameters are direct members, not those of submodules, so that ZeRO-3 gathers
    all of them before the block runs.
    """

    def __init__(
        self,
        num_features: int,
        num_hidden: int,
        num_skip: int,
        num_taps: int,
        dilation: int,
        compile: bool = True,
    ) -> None:
        super().__init__()
        if num_taps % 2 == 0:
            raise ValueError(f"num_taps={num_taps}: choose an odd number of taps")
        if num_taps // 2 * dilation > MAX_REACH:
            reach = f"reach more than {MAX_REACH} frames to either side"
            raise ValueError(f"num_taps={num_taps} with dilation={dilation}: they {reach}")
        self.dilation = dilation
        self.compiled = compile
        self.in_weight = nn.Parameter(torch.empty(num_hidden, num_features))
        self.in_bias = nn.Parameter(torch.empty(num_hidden))
        self.prelu1 = nn.Parameter(torch.full((1,), 0.25))
        self.gain1 = nn.Parameter(torch.ones(num_hidden))
        self.shift1 = nn.Parameter(torch.zeros(num_hidden))
        self.taps = nn.Parameter(torch.empty(num_taps, num_hidden))
        self.taps_bias = nn.Parameter(torch.empty(num_hidden))
        self.prelu2 = nn.Parameter(torch.full((1,), 0.25))
        self.gain2 = nn.Parameter(torch.ones(num_hidden))
        self.shift2 = nn.Parameter(torch.zeros(num_hidden))
        self.out_weight = nn.Parameter(torch.empty(num_features + num_skip, num_hidden))
        self.out_bias = nn.Parameter(torch.empty(num_features + num_skip))
        init_uniform((self.in_weight, self.in_bias), num_features)
        init_uniform((self.taps, self.taps_bias), num_taps)
        init_uniform((self.out_weight, self.out_bias), num_hidden)

    def forward(self, x_BNF: Tensor, skip_BNF: Tensor) -> tuple[Tensor, Tensor]:
        """The next x and the next skip sum."""
        device = x_BNF.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x_BNF.dtype
        weights = (getattr(self, name) for name in Weights._fields)
        reach = self.dilation + 1  # torch.compile would compile again for an argument of 1
        with torch.autocast(device, enabled=False):
            return _BlockFunction.apply(self.compiled, reach, dtype, x_BNF, skip_BNF, *weights)
