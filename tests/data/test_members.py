"""One member of a sample: its bytes become audio outside of Python, or an error that names it."""

import io
import os
import sys
from types import FrameType

import numpy as np
import pytest
import soundfile

from sepdist.data.members import DataError, decode

RATE = 8000
PCM = np.random.default_rng(0).integers(-(2**15), 2**15, 40_000).astype(np.int16)


def flac(wave: np.ndarray) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, wave, RATE, format="FLAC", subtype="PCM_16")
    return stream.getvalue()


def test_libsndfile_reads_a_member_without_calling_back_into_python() -> None:
    data, called = flac(PCM), list[tuple[str, str]]()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_back is not None:
            called.append((frame.f_back.f_code.co_name, frame.f_code.co_name))

    sys.setprofile(note)
    try:
        wave = decode(data, len(PCM), 1234, 31_234, "here")
    finally:
        sys.setprofile(None)
    np.testing.assert_array_equal(wave, PCM[1234:31_234] / np.float32(2**15))
    assert ("decode", "seek") in called  # so calls are seen
    callbacks = {name for _, name in called if name.startswith("vio_")}  # soundfile's names
    assert not callbacks


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (flac(PCM), "damaged, has 40000 samples, the index says 20000"),
        (flac(PCM.reshape(20_000, 2)), "damaged, has 40000 samples, the index says 20000"),
        (flac(PCM[:20_000])[:9000], "damaged, "),
        (b"", "damaged, "),
        (b"no audio" * 100, "damaged, Format not recognised"),
    ],
    ids=["another length", "two channels", "cut", "empty", "no FLAC"],
)
def test_a_damaged_member_is_named_and_leaves_no_file_open(data: bytes, said: str) -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with pytest.raises(DataError, match=f"^here: {said}"):
            decode(data, 20_000, 10_000, 20_000, "here")
    assert os.listdir("/proc/self/fd") == before
