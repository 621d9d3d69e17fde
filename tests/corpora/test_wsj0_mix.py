"""WSJ0-2mix from its lists and from the generated tree, against the published recipe in NumPy."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.signal
import soundfile

from sepdist.audio import AudioError
from sepdist.corpora.wsj0_mix import Wsj0Mix
from sepdist.data.records import Mixture
from tests.corpora.conftest import signal, write

NAME = "40na010x_1.9857_01xo031a_-1.9857"
KEY = "40na010x_1p9857_01xo031a_-1p9857"
LEVELS = {"40na010x": 4.88028e-04, "01xo031a": 0.9e-2}


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, Any]:
    write(tmp_path / "wsj0" / "si_tr_s" / "40n" / "40na010x.wav", signal(1, 20001, 0.022))
    write(tmp_path / "wsj0" / "si_tr_s" / "01x" / "01xo031a.wav", signal(2, 17000, 0.1))
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "mix_2_spk_tr.txt").write_text(
        "wsj0/si_tr_s/40n/40na010x.wav 1.9857 wsj0/si_tr_s/01x/01xo031a.wav -1.9857 \n"
    )
    (tmp_path / "levels").mkdir()
    for utterance, level in LEVELS.items():
        (tmp_path / "levels" / f"activlev_{utterance}.txt").write_text(
            f"{utterance} {level:.16e}\n"
        )
    return {
        "wsj0": str(tmp_path / "wsj0"),
        "lists": str(tmp_path / "lists"),
        "levels": str(tmp_path / "levels"),
    }


@pytest.mark.parametrize(("mode", "length"), [("min", 8500), ("max", 10001)])
def test_a_line_of_the_list_is_mixed_to_the_very_16_bit_steps(
    arguments: dict[str, Any], mode: str, length: int
) -> None:
    (record,) = Wsj0Mix(**arguments, mode=mode).records("tr")  # type: ignore[arg-type]
    assert (record.id, record.speakers, record.sample_rate) == (KEY, ("40n", "01x"), 8000)
    members = pickle.loads(pickle.dumps(record)).load()
    root = Path(arguments["wsj0"]) / "si_tr_s"
    scaled = []
    for path, level, decibels in (
        (root / "40n" / "40na010x.wav", LEVELS["40na010x"], 1.9857),
        (root / "01x" / "01xo031a.wav", LEVELS["01xo031a"], -1.9857),
    ):
        wave = scipy.signal.resample_poly(
            soundfile.read(str(path), dtype="float32")[0], 8000, 16000
        )
        padded = np.pad(wave.astype(np.float64), (0, 10001 - len(wave)))[:length]
        scaled.append(padded / level**0.5 * 10 ** (decibels / 20))
    mixture = scaled[0] + scaled[1]
    gain = max(1.0, np.abs(mixture).max(), *(np.abs(source).max() for source in scaled)) / 0.9
    assert gain > 1.2  # the published levels do clip without it
    for member, source in zip(("s1", "s2"), scaled, strict=True):
        steps = np.round(source / gain * 32768)
        assert members[member].dtype == np.float32
        np.testing.assert_allclose(members[member] * 32768, steps, atol=0.01)
    np.testing.assert_allclose(members["s1"] + members["s2"], mixture / gain, atol=1 / 32768)


def test_a_generated_tree_gives_the_same_records(arguments: dict[str, Any], tmp_path: Path) -> None:
    (made,) = Wsj0Mix(**arguments).records("tr")
    base = tmp_path / "wsj0-mix" / "2speakers" / "wav8k" / "min" / "tr"
    for member, wave in made.load().items():
        write(base / member / f"{NAME}.wav", np.round(wave * 32768).astype(np.int16), 8000)
    (read,) = Wsj0Mix(generated=str(tmp_path / "wsj0-mix")).records("tr")
    assert (read.id, read.speakers) == (made.id, made.speakers)
    for member, wave in pickle.loads(pickle.dumps(read)).load().items():
        np.testing.assert_array_equal(wave, made.load()[member])
    write(base / "s2" / f"{NAME}.wav", signal(1, 10), 8000)
    with pytest.raises(AudioError, match=r"10 samples where .*s1"):
        read.load()
    (base / "s2" / f"{NAME}.wav").unlink()
    with pytest.raises(AudioError, match=r"s2: no audio file"):
        list(Wsj0Mix(generated=str(tmp_path / "wsj0-mix")).records("tr"))


def sphere(path: Path, wave: np.ndarray, coding: str = "pcm") -> None:
    """Write a NIST SPHERE file as on WSJ0's CDs: a header of text and 16-bit samples."""
    fields = {"sample_count -i": len(wave), "sample_n_bytes -i": 2, "channel_count -i": 1}
    fields |= {"sample_rate -i": 16000, "sample_byte_format -s2": "01"}
    fields |= {f"sample_coding -s{len(coding)}": coding}
    lines = ["NIST_1A", "   1024", *(f"{key} {value}" for key, value in fields.items()), "end_head"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("\n".join(lines).encode().ljust(1024) + wave.astype("<i2").tobytes())


def test_wsj0_is_read_from_its_cds_in_any_case_and_only_of_the_first_channel(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    (made,) = Wsj0Mix(**arguments).records("tr")
    cds, steps = tmp_path / "cds", {}
    for name in ("40n/40na010x", "01x/01xo031a"):
        path = Path(arguments["wsj0"], "si_tr_s", f"{name}.wav")
        steps[name[:3]] = soundfile.read(path, dtype="int16")[0]
    sphere(cds / "11-1.1" / "WSJ0" / "SI_TR_S" / "40N" / "40NA010X.WV1", steps["40n"])
    sphere(cds / "11-1.1" / "WSJ0" / "SI_TR_S" / "40N" / "40NA010X.WV2", steps["01x"])
    other = cds / "csr_1" / "11-2.1" / "wsj0" / "si_tr_s" / "01x" / "01xo031a.wv1"
    sphere(other, steps["01x"])
    again = cds / "csr_1" / "11-3.1" / "wsj0" / "si_tr_s" / "01x" / "01xo031a.wv1"
    sphere(again, steps["01x"])
    (read,) = Wsj0Mix(**{**arguments, "wsj0": str(cds)}).records("tr")
    assert isinstance(read, Mixture) and isinstance(made, Mixture)
    assert (read.id, read.speakers) == (made.id, made.speakers)
    for member, wave in pickle.loads(pickle.dumps(read)).load().items():
        np.testing.assert_array_equal(wave, made.load()[member])
    sphere(other, steps["01x"], "pcm,embedded-shorten-v2.00")
    with pytest.raises(AudioError, match=r"01xo031a\.wv1: cannot be decoded .*sph2pipe -f wav"):
        read.load()
    other.unlink()
    again.unlink()
    with pytest.raises(AudioError, match=r"01xo031a\.wav: no such file .*CDs"):
        list(Wsj0Mix(**{**arguments, "wsj0": str(cds)}).records("tr"))


def test_a_list_of_names_without_folders_finds_utterances_and_speakers(arguments) -> None:
    bare = "40na010x.wav 1.9857 01xo031a.wav -1.9857\n"
    (Path(arguments["lists"]) / "mix_2_spk_cv.txt").write_text(bare)
    [record] = list(Wsj0Mix(**arguments).records("cv"))
    assert (record.id, record.speakers) == (KEY, ("40n", "01x"))


def test_faults_of_the_lists_name_the_file_and_line(arguments: dict[str, Any]) -> None:
    lists, levels = Path(arguments["lists"]), Path(arguments["levels"])
    with pytest.raises(ValueError, match=r"mix_2_spk_dev\.txt: no such list"):
        list(Wsj0Mix(**arguments).records("dev"))
    (lists / "mix_2_spk_cv.txt").write_text("\nwsj0/a/b.wav 1.0 wsj0/a/c.wav\n")
    with pytest.raises(ValueError, match=r"mix_2_spk_cv\.txt, line 2.*3 fields"):
        list(Wsj0Mix(**arguments).records("cv"))
    (lists / "mix_2_spk_cv.txt").write_text(
        "wsj0/si_tr_s/40n/40na010x.wav 1 wsj0/si_tr_s/01x/01xo0000.wav 0\n"
    )
    with pytest.raises(ValueError, match="no active level of utterance 01xo0000"):
        list(Wsj0Mix(**arguments).records("cv"))
    (levels / "activlev_more.txt").write_text("01xo0000 0.001\n")
    with pytest.raises(AudioError, match=r"01xo0000\.wav: no such file"):
        list(Wsj0Mix(**arguments).records("cv"))
    (levels / "activlev_more.txt").write_text("01xo0000 -26.5\n")
    with pytest.raises(ValueError, match=r"activlev_more\.txt, line 1.*mean square"):
        list(Wsj0Mix(**arguments).records("cv"))


def test_levels_are_required_and_the_error_says_where_they_are(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="never estimated"):
        Wsj0Mix(wsj0=arguments["wsj0"], lists=arguments["lists"])
    with pytest.raises(ValueError, match="either generated"):
        Wsj0Mix()
    with pytest.raises(ValueError, match="mid"):
        Wsj0Mix(generated="x", mode="mid")  # type: ignore[arg-type]
