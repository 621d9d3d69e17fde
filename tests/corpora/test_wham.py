"""WHAM! noise as published, and any folder of noises, read as records."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import soundfile

from sepdist.corpora.wham import Wham
from tests.corpora.conftest import signal, write


def test_noises_come_sorted_with_keys_without_dots_and_their_first_channel(
    noise_root: Path,
) -> None:
    records = list(Wham(str(noise_root)).records("tr"))
    assert [record.id for record in records] == ["40na010x_1p9857_01xo031a_-1p9857", "long"]
    assert {record.speaker for record in records} == {"noise"}
    left = soundfile.read(str(noise_root / "tr" / "long.wav"))[0][:, 0]
    loaded = pickle.loads(pickle.dumps(records[1])).load()
    assert loaded.dtype == np.float32
    np.testing.assert_allclose(loaded, scipy.signal.resample_poly(left, 1, 2), atol=1 / 65536)


def test_names_that_would_meet_in_one_key_are_an_error(tmp_path: Path) -> None:
    for name in ("a.b", "apb"):
        write(tmp_path / "tr" / f"{name}.wav", signal(1, 1000))
    with pytest.raises(ValueError, match="'apb'"):
        list(Wham(str(tmp_path)).records("tr"))


def test_folders_below_the_split_enter_the_key(tmp_path: Path) -> None:
    for name in ("rain/1.flac", "wind/1.flac"):
        write(tmp_path / "tr" / name, signal(1, 1000), 8000)
    assert [record.id for record in Wham(str(tmp_path)).records("tr")] == ["rain-1", "wind-1"]
