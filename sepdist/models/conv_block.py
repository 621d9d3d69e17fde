"""Conv-TasNet's layers with hand-written gradients and compiled element-wise stages.

Everything here is channels-last, [B, N, F], so that a 1x1 convolution is one matrix product and a
depth-wise convolution is a sum of shifted rows. `ConvBlock` has a hand-written gradient: it keeps
two [B, N, H] tensors for the backward pass and recomputes what is cheap. Its element-wise stages
are plain functions; `torch.compile` fuses each into one pass over memory, and one compilation
serves all blocks, dilations and lengths. Without a C++ compiler the same functions run uncompiled.
No stage sums over frames, so that its bits do not depend on the number of threads.

Shapes: B batch, T samples, N frames, F features, H hidden channels, K taps.
"""

import functools
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sepdist.models.frames import EPS, widen

logger = logging.getLogger(__name__)


def _tap(x: Tensor, steps: int) -> Tensor:
    """Row n is row n + steps of x, zero outside; `steps` may be negative."""
    if steps == 0:
        return x
    count = x.shape[1]
    distance = abs(steps)
    padded = F.pad(x, (0, 0, distance, distance))
    return padded[:, distance + steps : distance + steps + count]


def _steps(taps: Tensor, dilation: int) -> list[int]:
    """The distance of each tap [K, H] from the centre, in frames."""
    num_taps = taps.shape[0]
    return [(k - num_taps // 2) * dilation for k in range(num_taps)]


def _row_moments(y: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and sum of squares of PReLU(y) over the channels of each row."""
    q = F.prelu(widen(y), slope)
    return q.sum(-1), (q * q).sum(-1)


def _depthwise(
    y: Tensor,
    slope1: Tensor,
    scale: Tensor,
    shift: Tensor,
    taps: Tensor,
    bias: Tensor,
    slope2: Tensor,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """PReLU, normalise, convolve along the frames, PReLU; also the moments of each row."""
    normalised = F.prelu(widen(y), slope1) * scale + shift
    z = bias
    for k, steps in enumerate(_steps(taps, dilation)):
        z = z + taps[k] * _tap(normalised, steps)
    p = F.prelu(z, slope2).to(y.dtype)
    wide = widen(p)
    return p, wide.sum(-1), (wide * wide).sum(-1)


def _depthwise_backward(
    y: Tensor,
    dout: Tensor,
    slope1: Tensor,
    scale: Tensor,
    shift: Tensor,
    taps: Tensor,
    bias: Tensor,
    slope2: Tensor,
    mean: Tensor,
    rstd: Tensor,
    c1: Tensor,
    c2: Tensor,
    dilation: int,
) -> tuple[Tensor, ...]:
    """From the gradient at the second norm's output to dz at the convolution's output.

    Also dz * PReLU(y) at every tap (their sums over the frames are the gradient of the taps) and,
    per row, the gradient of the second slope.
    """
    q = F.prelu(widen(y), slope1)
    normalised = q * scale + shift
    z = bias
    for k, steps in enumerate(_steps(taps, dilation)):
        z = z + taps[k] * _tap(normalised, steps)
    p = F.prelu(z, slope2)
    dp = rstd * (widen(dout) - c1 - (p - mean) * rstd * c2)
    dz = torch.where(z > 0, dp, dp * slope2)
    dslope2 = torch.where(z > 0, 0.0, dp * z).sum(-1)
    return dz.to(dout.dtype), dslope2, *(dz * _tap(q, steps) for steps in _steps(taps, dilation))


def _expand_backward(
    y: Tensor,
    dz: Tensor,
    slope1: Tensor,
    gain: Tensor,
    taps: Tensor,
    mean: Tensor,
    rstd: Tensor,
    e1: Tensor,
    e2: Tensor,
    dilation: int,
) -> tuple[Tensor, Tensor]:
    """From dz at the convolution's output to dy before the first PReLU.

    Also, per row, the gradient of the first slope.
    """
    y = widen(y)
    wide = widen(dz)
    q = F.prelu(y, slope1)
    dn = torch.zeros_like(q)
    for k, steps in enumerate(_steps(taps, dilation)):
        dn = dn + taps[k] * _tap(wide, -steps)
    dq = rstd * (dn * gain - e1 - (q - mean) * rstd * e2)
    dy = torch.where(y > 0, dq, dq * slope1)
    return dy.to(dz.dtype), torch.where(y > 0, 0.0, dq * y).sum(-1)


def _split_outputs(
    both: Tensor, rstd: Tensor, offset: Tensor, x: Tensor, skip: Tensor
) -> tuple[Tensor, Tensor]:
    """Scale the block's two outputs, add the residual and add to the skip sum."""
    wide = widen(both) * rstd + offset
    return x + wide[..., : x.shape[-1]], skip + wide[..., x.shape[-1] :]


def _apply_masks(logits: Tensor, encoded: Tensor) -> Tensor:
    """ReLU masks [B, N, S, F] times the encoded frames [B, N, F]."""
    return F.relu(logits) * encoded.unsqueeze(2)


def _apply_masks_backward(
    dmasked: Tensor, logits: Tensor, encoded: Tensor
) -> tuple[Tensor, Tensor]:
    wide = widen(dmasked)
    dlogits = torch.where(logits > 0, wide * widen(encoded).unsqueeze(2), 0.0)
    return dlogits.to(logits.dtype), (wide * F.relu(widen(logits))).sum(2).to(encoded.dtype)


@dataclass(frozen=True)
class Stages:
    """The element-wise stages, compiled or as they are."""

    row_moments: Callable[..., tuple[Tensor, Tensor]] = _row_moments
    depthwise: Callable[..., tuple[Tensor, Tensor, Tensor]] = _depthwise
    split_outputs: Callable[..., tuple[Tensor, Tensor]] = _split_outputs
    depthwise_backward: Callable[..., tuple[Tensor, ...]] = _depthwise_backward
    expand_backward: Callable[..., tuple[Tensor, Tensor]] = _expand_backward
    apply_masks: Callable[..., Tensor] = _apply_masks
    apply_masks_backward: Callable[..., tuple[Tensor, Tensor]] = _apply_masks_backward


EAGER = Stages()


@functools.cache
def has_compiler() -> bool:
    """Whether the PATH has a C++ compiler, which `torch.compile` needs; warn once if not."""
    names = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]
    if any(shutil.which(name) for name in names):
        return True
    logger.warning(
        "no C++ compiler found (%s): models run uncompiled, about half as fast", ", ".join(names)
    )
    return False


@functools.cache
def compiled_stages() -> Stages:
    """The stages under `torch.compile`, shared by all blocks of all models and lengths."""
    stages = {name: torch.compile(stage, dynamic=True) for name, stage in vars(EAGER).items()}
    return Stages(**stages)


def _plain(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Detach the tensors: `torch.compile` compiles again for those that require gradients."""
    return tuple(tensor.detach() for tensor in tensors)


def stages_for(compiled: bool) -> Stages:
    """The compiled stages if they are wanted and a compiler exists, else the eager ones."""
    return compiled_stages() if compiled and has_compiler() else EAGER


def product_type(x: Tensor) -> torch.dtype:
    """The type of matrix products: autocast's where it is on, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _per_item(x: Tensor) -> Tensor:
    return x.view(-1, 1, 1)


def _moments(row_sums: Tensor, row_squares: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of each item, [B, 1, 1], from the sums [B, N] of its rows."""
    mean = row_sums.sum(1) / size
    variance = row_squares.sum(1) / size - mean * mean
    return _per_item(mean), _per_item(torch.rsqrt(variance.clamp_min(0) + EPS))


def _sums_inside(x: Tensor, all_steps: list[int]) -> Tensor:
    """[B, K, H]: for each step the sum of the rows n of x whose row n + step exists."""
    count = x.shape[1]
    total = x.sum(1)
    sums = []
    for steps in all_steps:
        distance = min(abs(steps), count)
        outside = x[:, :distance] if steps < 0 else x[:, count - distance :]
        sums.append(total - outside.sum(1) if steps else total)
    return torch.stack(sums, 1)


# A norm is folded into the matrix product that follows it: with xhat = (p - mean) rstd, the result
# (xhat g + s) W^T + b equals rstd p (W g)^T + (W s + b - rstd mean W g). Normalised rows are never
# written, and the products G^T p of the gradient of W give every sum over frames that the gradients
# need.


def _folded_product(
    p: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gain: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """p (W g)^T, [B, N, F], and the offset [B, 1, F] that belongs to rstd times it."""
    folded = weight * gain
    return F.linear(p, folded.to(dtype)), (weight * shift).sum(1) + bias - mean * rstd * folded.sum(
        1
    )


def _folded_product_backward(
    dout: Tensor,
    p: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gain: Tensor,
    shift: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """From the gradient [B, N, F] of the result to that before the norm, rstd (d - c1 - xhat c2).

    Returns d [B, N, H], c1 and c2 [B, 1, 1], and the gradients of gain, shift, weight and bias.
    """
    size = p.shape[1] * p.shape[2]
    folded = weight * gain
    dbias = dout.sum(1)
    dout = dout.to(dtype)
    products = widen(torch.bmm(dout.transpose(1, 2), p))
    correlation = (products - mean * dbias[:, :, None]) * rstd  # the sum over frames of dout^T xhat
    c1 = (dbias @ folded).sum(1) / size
    c2 = (correlation * folded).sum((1, 2)) / size
    correlation, dbias = correlation.sum(0), dbias.sum(0)
    dweight = correlation * gain + torch.outer(dbias, shift)
    dgain = (correlation * weight).sum(0)
    return (
        dout @ folded.to(dtype),
        _per_item(c1),
        _per_item(c2),
        dgain,
        (dbias[:, None] * weight).sum(0),
        dweight,
        dbias,
    )


class _BlockFunction(torch.autograd.Function):
    """The block as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any, stages: Stages, dilation: int, dtype: torch.dtype, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        (
            x,
            skip,
            in_weight,
            in_bias,
            slope1,
            gain1,
            shift1,
            taps,
            bias,
            slope2,
            gain2,
            shift2,
            out_weight,
            out_bias,
        ) = _plain(tensors)
        size = x.shape[1] * in_weight.shape[0]
        y = F.linear(x.to(dtype), in_weight.to(dtype), in_bias.to(dtype))
        mean1, rstd1 = _moments(*stages.row_moments(y, slope1), size)
        scale = gain1 * rstd1
        shift = shift1 - mean1 * scale
        p, sums, squares = stages.depthwise(y, slope1, scale, shift, taps, bias, slope2, dilation)
        mean2, rstd2 = _moments(sums, squares, size)
        both, offset = _folded_product(p, mean2, rstd2, gain2, shift2, out_weight, out_bias, dtype)
        ctx.stages, ctx.dilation, ctx.dtype = stages, dilation, dtype
        # The parameters, not their detached views: ZeRO-3 frees and refills them meanwhile.
        ctx.save_for_backward(x, y, p, mean1, rstd1, mean2, rstd2, tensors[2], *tensors[4:13])
        return stages.split_outputs(both, rstd2, offset, x, skip)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor, dskip: Tensor) -> tuple[Tensor | None, ...]:
        (
            x, y, p, mean1, rstd1, mean2, rstd2,
            in_weight, slope1, gain1, shift1, taps, bias, slope2, gain2, shift2, out_weight,
        ) = _plain(ctx.saved_tensors)  # fmt: skip
        stages, dilation, dtype = ctx.stages, ctx.dilation, ctx.dtype
        size = x.shape[1] * in_weight.shape[0]
        scale = gain1 * rstd1
        shift = shift1 - mean1 * scale

        # The output product and the second norm.
        dout, c1, c2, dgain2, dshift2, dout_weight, dout_bias = _folded_product_backward(
            torch.cat([dx, dskip], dim=-1), p, mean2, rstd2, gain2, shift2, out_weight, dtype
        )

        # The second PReLU and the depth-wise convolution.
        dz, dslope2, *tap_products = stages.depthwise_backward(
            y, dout, slope1, scale, shift, taps, bias, slope2, mean2, rstd2, c1, c2, dilation
        )
        del dout
        q_sums = torch.stack([product.sum(1) for product in tap_products], 1)  # [B, K, H]
        del tap_products
        one_sums = _sums_inside(widen(dz), _steps(taps, dilation))
        dtaps = (q_sums * scale + one_sums * shift).sum(0)
        dbias = one_sums[:, taps.shape[0] // 2].sum(0)

        # The first norm: its sums over frames follow from those of the taps.
        dn_sum = (taps * one_sums).sum(1)
        dn_xhat_sum = ((taps * q_sums).sum(1) - mean1[:, 0] * dn_sum) * rstd1[:, 0]
        dgain1, dshift1 = dn_xhat_sum.sum(0), dn_sum.sum(0)
        e1 = (dn_sum * gain1).sum(1) / size
        e2 = (dn_xhat_sum * gain1).sum(1) / size
        dy, dslope1 = stages.expand_backward(
            y, dz, slope1, gain1, taps, mean1, rstd1, _per_item(e1), _per_item(e2), dilation
        )
        del dz

        # The input product; the residual passes dx through.
        flat = dy.flatten(0, 1)
        din_weight = widen(flat.T @ x.flatten(0, 1).to(dtype))
        din_bias = flat.sum(0, dtype=x.dtype)
        through = (flat @ in_weight.to(dtype)).view_as(dx) + dx
        return (
            None, None, None, through, dskip, din_weight, din_bias,
            dslope1.sum().view_as(slope1), dgain1, dshift1, dtaps, dbias,
            dslope2.sum().view_as(slope2), dgain2, dshift2, dout_weight, dout_bias,
        )  # fmt: skip


class _NormLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stages: Stages,
        x: Tensor,
        gain: Tensor,
        shift: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> Tensor:
        mean, rstd = _moments(
            *stages.row_moments(x.detach(), widen(x.new_ones(1))), x.shape[1] * x.shape[2]
        )
        product, offset = _folded_product(x, mean, rstd, gain, shift, weight, bias, x.dtype)
        ctx.save_for_backward(x, mean, rstd, gain, shift, weight)
        return torch.addcmul(offset, widen(product), rstd)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, gain, shift, weight = ctx.saved_tensors
        dx, c1, c2, *rest = _folded_product_backward(
            dout, x, mean, rstd, gain, shift, weight, x.dtype
        )
        slope = rstd * rstd * c2
        dx = widen(dx).mul_(rstd).addcmul_(x, -slope).add_(slope * mean - rstd * c1)
        return (None, dx, *rest)


class NormLinear(nn.Module):
    """gLN and a 1x1 convolution, [B, N, F] -> [B, N, out], in fp32 or wider (equation 9).

    gLN is zero mean and unit variance over frames and features of each item, then a gain and a
    shift per feature.
    """

    def __init__(self, num_features: int, num_outputs: int, compile: bool = True) -> None:
        super().__init__()
        self.compiled = compile
        self.gain = nn.Parameter(torch.ones(num_features))
        self.shift = nn.Parameter(torch.zeros(num_features))
        self.weight = nn.Parameter(torch.empty(num_outputs, num_features))
        self.bias = nn.Parameter(torch.empty(num_outputs))
        _uniform((self.weight, self.bias), num_features)

    def forward(self, x_BNF: Tensor) -> Tensor:
        """Normalise each item of the batch, then multiply."""
        with torch.autocast(x_BNF.device.type, enabled=False):
            return _NormLinearFunction.apply(
                stages_for(self.compiled), x_BNF, self.gain, self.shift, self.weight, self.bias
            )


class _MaskFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stages: Stages, logits: Tensor, encoded: Tensor) -> Tensor:
        ctx.stages = stages
        ctx.save_for_backward(logits, encoded)
        return stages.apply_masks(logits.detach(), encoded.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmasked: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.stages.apply_masks_backward(dmasked, *_plain(ctx.saved_tensors)))


def apply_masks(logits_BNSF: Tensor, encoded_BNF: Tensor, compiled: bool) -> Tensor:
    """ReLU masks of every speaker times the encoded frames, [B, N, S, F]."""
    return _MaskFunction.apply(stages_for(compiled), logits_BNSF, encoded_BNF)


def _uniform(weights: tuple[Tensor, ...], fan_in: int) -> None:
    for weight in weights:
        nn.init.uniform_(weight, -(fan_in**-0.5), fan_in**-0.5)  # as a convolution of torch starts


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
            raise ValueError(
                f"num_taps={num_taps}: choose an odd number, to keep the number of frames"
            )
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
        self.out_weight = nn.Parameter(
            torch.empty(num_features + num_skip, num_hidden)
        )  # residual, then skip
        self.out_bias = nn.Parameter(torch.empty(num_features + num_skip))
        _uniform((self.in_weight, self.in_bias), num_features)
        _uniform((self.taps, self.taps_bias), num_taps)
        _uniform((self.out_weight, self.out_bias), num_hidden)

    def forward(self, x_BNF: Tensor, skip_BNF: Tensor) -> tuple[Tensor, Tensor]:
        """The next x and the next skip sum."""
        dtype = product_type(x_BNF)
        with torch.autocast(x_BNF.device.type, enabled=False):
            return _BlockFunction.apply(
                stages_for(self.compiled), self.dilation, dtype, x_BNF, skip_BNF,
                self.in_weight, self.in_bias, self.prelu1, self.gain1, self.shift1,
                self.taps, self.taps_bias,
                self.prelu2, self.gain2, self.shift2, self.out_weight, self.out_bias,
            )  # fmt: skip
