"""Signal-to-distortion ratio (SDR) of BSS Eval in dB, of every estimate against every source.

The target in an estimate is the source behind the best filter of 512 taps, the rest is distortion
(Vincent et al., "Performance Measurement in Blind Audio Source Separation", 2006). The filter h
solves R h = c, where the Toeplitz matrix R holds the source's autocorrelation and c its correlation
with the estimate; c'h is the energy of the target.

Shapes: E estimates, S sources, T samples, K lags, B blocks of N samples.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

TAPS = 512  # of the filter, as everywhere in the field
BLOCK = 4096  # samples of an FFT: a short one stays in the processor's cache


def pairwise_sdr(estimates_ET: Tensor, sources_ST: Tensor) -> Tensor:
    """SDR [E, S] within +-100 dB, in float64 on the CPU; levels do not count.

    ValueError if a source is silent.
    """
    from scipy.linalg import solve_toeplitz  # late: SciPy takes a second to import

    estimates_ET, sources_ST = estimates_ET.double(), sources_ST.double()
    num = len(estimates_ET)
    lags = _correlations(sources_ST, torch.cat([estimates_ET, sources_ST])).numpy()
    filters = [solve_toeplitz(one[num + j], one[:num].T).T for j, one in enumerate(lags)]
    targets_SE = torch.from_numpy((lags[:, :num] * filters).sum(-1))
    share_ES = targets_SE.T / estimates_ET.square().sum(1, keepdim=True)
    # Within +-100 dB: that of a perfect estimate is infinite.
    return 10 / math.log(10) * share_ES.logit(eps=1 / (1 + 1e10))


def _correlations(sources_ST: Tensor, waves_ET: Tensor) -> Tensor:
    """Sums over t of source[t] * wave[t + k] for the lags k below TAPS, [S, E, K]."""
    step = BLOCK - TAPS + 1
    rest = -sources_ST.shape[1] % step  # of the last block
    sources_SBN = torch.fft.rfft(pad(sources_ST, (0, rest)).unflatten(1, (-1, step)), n=BLOCK)
    waves_EBN = torch.fft.rfft(pad(waves_ET, (0, rest + TAPS - 1)).unfold(1, BLOCK, step))
    product = torch.stack([(one.conj() * waves_EBN).sum(1) for one in sources_SBN])
    return torch.fft.irfft(product, n=BLOCK)[..., :TAPS]
