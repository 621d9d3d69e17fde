"""STOI, extended STOI and PESQ, by the packages pystoi and pesq of the extra `scores`.

Short-time objective intelligibility (Taal et al., 2011; extended: Jensen and Taal, 2016) takes any
rate and resamples to 10 kHz. PESQ is MOS-LQO of ITU-T P.862.1 at 8 kHz and P.862.2 at 16 kHz.
"""

import importlib
import warnings
from collections.abc import Iterable

import numpy as np

PACKAGES = {"stoi": "pystoi", "estoi": "pystoi", "pesq": "pesq"}
PESQ_MODES = {8000: "nb", 16000: "wb"}


def check_usable(names: Iterable[str], rate: int) -> None:
    """Raise ValueError if a package is missing or there is no PESQ for the rate."""
    for name in names:
        try:
            importlib.import_module(PACKAGES[name])
        except ImportError as error:
            todo = f"run: pip install {PACKAGES[name]} (the extra `scores` has it)"
            raise ValueError(f"{name} needs {PACKAGES[name]}; {todo}") from error
        if name == "pesq" and rate not in PESQ_MODES:
            raise ValueError(f"pesq is defined at 8000 or 16000 Hz, the data has {rate} Hz")


def perceptual_score(name: str, estimate_T: np.ndarray, source_T: np.ndarray, rate: int) -> float:
    """One of PACKAGES of an estimate; ValueError with the reason if it has none."""
    package = importlib.import_module(PACKAGES[name])
    try:
        if name == "pesq":
            return float(package.pesq(rate, source_T, estimate_T, PESQ_MODES[rate]))
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # instead of which it returns 1e-5
            value = package.stoi(source_T, estimate_T, rate, extended=name == "estoi")
    except (RuntimeWarning, IndexError) as error:
        raise ValueError("fewer than 30 frames (0.4 s) within 40 dB of the loudest") from error
    except RuntimeError as error:  # pesq's, whose text is bytes
        raise ValueError(str(error).strip("b'")) from error
    return round(float(value), 9)  # pystoi adds noise of 1e-16, at random
