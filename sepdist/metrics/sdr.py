"""Signal-to-distortion ratio (SDR) of BSS Eval in dB, of every estimate against every source.

The target in an estimate is its projection onto the copies of the source delayed by 0 to 511
samples: the source behind the best filter of 512 taps. The rest is distortion (Vincent, Gribonval
and Fevotte, "Performance Measurement in Blind Audio Source Separation", 2006). The filter h solves
R h = c, where the Toeplitz matrix R holds the source's autocorrelation and c its correlation with
the estimate; c'h is the energy of the target.

Shapes: E estimates, S sources, T samples, K lags, B blocks of N samples.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

TAPS = 512  # of the filter, as everywhere in the field
LIMIT_DB = 100.0  # a perfect estimate has an infinite SDR
BLOCK = 4096  # samples of an FFT: a short one stays in the processor's cache


def pairwise_sdr(estimates_ET: Tensor, sources_ST: Tensor) -> Tensor:
    """SDR [E, S] within +-100 dB, in float64 on the CPU; levels do not count.

    ValueError if a source is silent.
    """
    from scipy.linalg import solve_toeplitz  # late: SciPy takes a second to import

    estimates_ET, sources_ST = estimates_ET.double(), sources_ST.double()
    num_estimates = len(estimates_ET)
    targets_ES = np.empty((num_estimates, len(sources_ST)))
    lags = _correlations(sources_ST, torch.cat([estimates_ET, sources_ST])).numpy()
    for j, of_source in enumerate(lags):
        own_K, lags_EK = of_source[num_estimates + j], of_source[:num_estimates]
        targets_ES[:, j] = (lags_EK * solve_toeplitz(own_K, lags_EK.T).T).sum(1)
    share_ES = torch.from_numpy(targets_ES) / estimates_ET.square().sum(1, keepdim=True)
    least = 1 / (1 + 10 ** (LIMIT_DB / 10))
    share_ES = share_ES.clamp(least, 1 - least)
    return 10 * torch.log10(share_ES / (1 - share_ES))


def _correlations(sources_ST: Tensor, waves_ET: Tensor) -> Tensor:
    """Sums over t of source[t] * wave[t + k] for the lags k below TAPS, [S, E, K]."""
    step = BLOCK - TAPS + 1
    num_samples = sources_ST.shape[1]
    rest = math.ceil(num_samples / step) * step - num_samples
    sources_SBN = torch.fft.rfft(pad(sources_ST, (0, rest)).unflatten(1, (-1, step)), n=BLOCK)
    waves_EBN = torch.fft.rfft(pad(waves_ET, (0, rest + TAPS - 1)).unfold(1, BLOCK, step))
    product = torch.stack([(one.conj() * waves_EBN).sum(1) for one in sources_SBN])
    return torch.fft.irfft(product, n=BLOCK)[..., :TAPS]
