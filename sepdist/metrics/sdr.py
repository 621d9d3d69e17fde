"""SDR, SIR and SAR of BSS Eval in dB, of every estimate against every source.

The target in an estimate is the source behind the best filter of 512 taps, the rest is distortion
(Vincent et al., "Performance Measurement in Blind Audio Source Separation", 2006). The filter h
solves R h = c, where the Toeplitz matrix R holds the source's autocorrelation and c its correlation
with the estimate; c'h is the energy of the target. The ratios to interference (SIR) and artefacts
(SAR) come from the same equation with the delayed copies of all sources together: what they explain
beyond the target is interference, what they do not explain are artefacts.

Shapes: E estimates, S sources, T samples, K lags, B blocks of N samples.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

TAPS = 512  # of the filter, as everywhere in the field
BLOCK = 4096  # samples of an FFT: a short one stays in the processor's cache


def pairwise_sdr(estimates_ET: Tensor, sources_ST: Tensor) -> Tensor:
    """SDR [E, S] within +-100 dB, in float64 on the CPU; levels do not count.

    ValueError if a source is silent.
    """
    return _decibels(_shares(estimates_ET, sources_ST)[0])


def bss_eval(estimates_ET: Tensor, sources_ST: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SDR [E, S], SIR [E, S] and SAR [E] as `pairwise_sdr`; ValueError for dependent sources."""
    from scipy.linalg import cho_factor, cho_solve, toeplitz

    shares_ES, energies_E, lags = _shares(estimates_ET, sources_ST)
    num = len(energies_E)
    rows = zip(lags[:, num:], lags[:, num:].swapaxes(0, 1), strict=True)
    matrix = np.block([list(map(toeplitz, *pair)) for pair in rows])
    wanted = np.concatenate(lags[:, :num], axis=1)
    try:
        explained = (wanted * cho_solve(cho_factor(matrix), wanted.T).T).sum(1)
    except np.linalg.LinAlgError as error:
        raise ValueError("a source is the sum of filtered others, so no SIR is defined") from error
    joint_E = torch.from_numpy(explained) / energies_E
    return _decibels(shares_ES), _decibels(shares_ES / joint_E[:, None]), _decibels(joint_E)


def _shares(estimates_ET: Tensor, sources_ST: Tensor) -> tuple[Tensor, Tensor, np.ndarray]:
    """Share of each estimate's energy that is a target, [E, S], that energy, and correlations."""
    from scipy.linalg import solve_toeplitz  # late: SciPy takes a second to import

    estimates_ET, sources_ST = estimates_ET.double(), sources_ST.double()
    num, energies_E = len(estimates_ET), estimates_ET.square().sum(1)
    lags = _correlations(sources_ST, torch.cat([estimates_ET, sources_ST])).numpy()
    filters = [solve_toeplitz(one[num + j], one[:num].T).T for j, one in enumerate(lags)]
    targets_SE = torch.from_numpy((lags[:, :num] * filters).sum(-1))
    return targets_SE.T / energies_E[:, None], energies_E, lags


def _decibels(share: Tensor) -> Tensor:
    """Share of the energy over the rest in dB, within +-100: a perfect estimate has infinity."""
    return 10 / math.log(10) * share.logit(eps=1 / (1 + 1e10))


def _correlations(sources_ST: Tensor, waves_ET: Tensor) -> Tensor:
    """Sums over t of source[t] * wave[t + k] for the lags k below TAPS, [S, E, K]."""
    step = BLOCK - TAPS + 1
    rest = -sources_ST.shape[1] % step  # of the last block
    sources_SBN = torch.fft.rfft(pad(sources_ST, (0, rest)).unflatten(1, (-1, step)), n=BLOCK)
    waves_EBN = torch.fft.rfft(pad(waves_ET, (0, rest + TAPS - 1)).unfold(1, BLOCK, step))
    product = torch.stack([(one.conj() * waves_EBN).sum(1) for one in sources_SBN])
    return torch.fft.irfft(product, n=BLOCK)[..., :TAPS]
