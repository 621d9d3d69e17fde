"""Recordings that are no sound audio: each by itself, named with the reason, without a hang."""

import io
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from rich.console import Console

import sepdist
from sepdist import storage
from sepdist.cli import separate as program
from sepdist.console import progress_bar
from sepdist.inference import separator as separator_module
from sepdist.inference.separator import Separator
from sepdist.inference.windows import SeparationError, output_stems
from tests.support.exports import RATE, voices, write_export

SECONDS = 10  # in which one call ends


class Hang(BaseException):
    """A call took too long."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("malformed") / "model"
    write_export(folder)
    return str(folder)


@pytest.fixture(scope="module")
def separator(model: str) -> Separator:
    return sepdist.load(model, window_seconds=0.5, overlap_seconds=0.1)


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    def too_long(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def separate(
    model: str, tmp_path: Path, run_verb, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the program; returns its exit status, the outputs below out/ and what it said."""

    def run(*recordings: str, options: tuple[str, ...] = ()) -> tuple[int, list[str], str]:
        out = tmp_path / "out"
        words = ["--model", model, "--output", str(out), *options, "--", *recordings]
        status = run_verb(program, *words)
        said = capfd.readouterr().err
        assert "Traceback" not in said
        names = sorted(str(one.relative_to(out)) for one in out.rglob("*") if one.is_file())
        assert not any(".separating-" in name for name in names)
        return status, names, said

    return run


def pcm(num_samples: int = 900) -> bytes:
    return (voices(num_samples, num=1)[0] * 2**15).astype("<i2").tobytes()


def wav(data: bytes = b"", rate: int = RATE, channels: int = 1, kind: str = "i2") -> bytes:
    """A WAV file, also of what no program writes."""
    data, tag, size = data or pcm(), 3 if kind[0] == "f" else 1, int(kind[1])
    bytes_a_second = min(rate * size * channels, 2**32 - 1)
    form = struct.pack("<HHIIHH", tag, channels, rate, bytes_a_second, size * channels, 8 * size)
    body = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(data))
    return b"RIFF" + struct.pack("<I", len(body) + len(data)) + body + data


def floats(value: float, kind: str = "f4") -> bytes:
    return wav(np.full(900, value, f"<{kind}").tobytes(), kind=kind)


MALFORMED = {
    "no-header.raw": (pcm(), "cannot be decoded (Format not recognised.)"),
    "text.wav": (b"this is no audio\n" * 90, "cannot be decoded"),
    "nothing.wav": (b"", "cannot be decoded"),
    "no-samples.wav": (wav()[:44][:-4] + bytes(4), "is empty: it has no samples"),
    "half.wav": (wav()[:900], "cut short"),
    "2-GHz.wav": (wav(rate=2_000_000_000), "2000000000 Hz; a sample rate is whole, from 1000 up"),
    "1-Hz.wav": (wav(rate=1), "1 Hz; a sample rate is whole, from 1000 up to 768000"),
    "8-kHz-in-kHz.wav": (wav(rate=8), "8 Hz; a sample rate"),
    "0-Hz.wav": (wav(rate=0), "cannot be decoded"),
    "0-channels.wav": (wav(channels=0), "cannot be decoded"),
    "nan.wav": (floats(np.nan), "NaN or infinity 0.0000 s from its start"),
    "infinite.wav": (floats(-np.inf), "NaN or infinity"),
    "huge.wav": (floats(3e38), "has a huge value"),
    "double.wav": (floats(1e300, "f8"), "has a huge value"),
}
ODD_BUT_SOUND = {
    "300-channels.wav": wav(pcm(300 * 9), channels=300),
    "silent.wav": wav(bytes(1800)),
    "wav.raw": wav(),
    "768-kHz.wav": wav(rate=768_000),
    "integers.wav": floats(20_000.0),
    "faint.wav": floats(1e-42),
    "one.wav": wav(pcm(1)),
    "[bold]{0}%s.wav": wav(),
    "-n.wav": wav(),
    "~no-such-user.wav": wav(),
    "./-": wav(),
    "a\nb.wav": wav(),
    os.fsdecode(b"\xff\xfe.wav"): wav(),
    "\u202e\x1b[31mx.wav": wav(),
}


def test_each_recording_is_separated_or_named_and_a_summary_ends_the_batch(
    separate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, data in ODD_BUT_SOUND.items() | {(n, data) for n, (data, _) in MALFORMED.items()}:
        Path(name).write_bytes(data)
    os.mkfifo("pipe.wav")
    Path("folder.wav").mkdir()
    Path("loop.wav").symlink_to("loop.wav")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.wav")
        others = {
            **dict.fromkeys(("pipe.wav", "socket.wav", "/dev/zero"), "is a folder, pipe or device"),
            **dict.fromkeys(("absent.wav", "wav.raw/x.wav", "~no-such-user/x.wav"), "no such file"),
            "loop.wav": "Too many levels of symbolic links",
            "x" * 300 + ".wav": "File name too long",
            "https://host/x.wav": "https:// is not supported",
        }
        reasons = {name: reason for name, (_, reason) in MALFORMED.items()} | others
        status, found, said = separate(*ODD_BUT_SOUND, *reasons)
    assert status == 1
    stems = {output_stems([name])[name] for name in ODD_BUT_SOUND}
    assert found == sorted(f"{stem}_s{i}.wav" for stem in stems for i in (1, 2))
    lines = said.splitlines()
    summary = lines.index(f"{len(ODD_BUT_SOUND)} separated, {len(reasons)} failed")
    assert len(lines[summary + 1 :]) == len(reasons)
    for line, (name, reason) in zip(lines[summary + 1 :], reasons.items(), strict=True):
        assert name in line and reason in line
        assert f"error: {line.strip()}" in lines[:summary]
    assert "\x1b" not in said and "\u202e" not in said


def test_nothing_is_said_of_a_single_recording_that_is_sound(separate, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav())
    assert separate(str(tmp_path / "a.wav")) == (0, ["a_s1.wav", "a_s2.wav"], "")


def test_recordings_of_one_name_have_outputs_in_their_folders(separate, tmp_path: Path) -> None:
    names = [tmp_path / name for name in ("x/a/talk.wav", "y/a/talk.wav", "y/b/talk.wav", "c.wav")]
    for name in names:
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_bytes(wav())
    status, found, said = separate(*map(str, names), str(names[0]))
    stems = ["c", "x/a/talk", "y/a/talk", "y/b/talk"]
    assert (status, said) == (0, "4 separated, 0 failed\n")
    assert found == [f"{stem}_s{i}.wav" for stem in stems for i in (1, 2)]
    # A folder stands for the recordings below it.
    folders = [str(tmp_path / name) for name in "yx"]
    assert separate(*folders, options=("--overwrite",))[0] == 0


@pytest.mark.parametrize(
    ("recordings", "stems"),
    [
        (["talk.wav"], ["talk"]),
        (["/x/a.wav", "/y/a.wav"], ["x/a", "y/a"]),
        (["/x/a.wav", "/x/a.flac"], ["a.wav", "a.flac"]),
        (["/x/a.wav", "/x/a.flac", "/y/a.wav"], ["x/a.wav", "x/a.flac", "y/a"]),
        (["/x/1/a.wav", "/y/1/a.wav", "/y/2/a.wav"], ["x/1/a", "y/1/a", "y/2/a"]),
        (["s3://b/x/a.wav", "s3://b/y/a.wav", "s3://b/c.wav"], ["x/a", "y/a", "c"]),
        (["s3://b/x/a.wav", "/y/a.wav", "/x/b.wav"], ["s3:/b/x/a", "y/a", "b"]),
        (["a.wav", "./a.wav", "x/../a.wav"], ["a"]),
    ],
)
def test_recordings_of_one_stem_keep_their_paths_below_a_common_folder(recordings, stems) -> None:
    assert [*output_stems(recordings).values()] == stems


@pytest.mark.parametrize(
    "recordings",
    [
        ["/a.wav", "/x/a.wav", "/x/x/a.wav", "/x/x/a.flac"],
        ["/x/a.wav", "/x/a.flac", "/x/a.wav.ogg", "/a.wav.ogg"],
        [f"/{i}/{j}/a.{k}" for i in "xy" for j in "xy" for k in ("wav", "flac", "x.wav")],
    ],
)
def test_no_two_recordings_have_one_stem_and_none_leaves_the_output(recordings) -> None:
    stems = [*output_stems(recordings).values()]
    assert len(set(stems)) == len(recordings)
    assert not any(stem.startswith("/") or ".." in stem for stem in stems)


def test_a_progress_bar_shows_any_name_as_it_is() -> None:
    shown = Console(file=io.StringIO(), force_terminal=True, width=120)
    with progress_bar(shown, "[/red]{0}{x}.wav", total=2) as advance:
        advance()
    assert "[/red]{0}{x}.wav" in shown.file.getvalue()  # type: ignore[attr-defined]


def test_outputs_of_which_one_cannot_be_put_are_removed_again(
    separator: Separator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.wav").write_bytes(wav())
    stored: set[str] = set()

    def put_file(_: Path, url: str) -> None:
        if url.endswith("_s2.wav"):
            raise KeyboardInterrupt
        stored.add(url)

    monkeypatch.setattr(storage, "put_file", put_file)
    monkeypatch.setattr(storage, "remove", stored.remove)
    monkeypatch.setattr(storage, "exists", lambda url: url in stored)
    with pytest.raises(KeyboardInterrupt):
        separator.file(tmp_path / "a.wav", "s3://b/out")
    assert stored == set()
    stored.add("s3://b/out/a_s1.wav")  # of an earlier run, and overwritten by now
    with pytest.raises(KeyboardInterrupt):
        separator.file(tmp_path / "a.wav", "s3://b/out")
    assert stored == {"s3://b/out/a_s1.wav"}
    # On a disk: the place of the second output is taken by a folder, which stays.
    (tmp_path / "out" / "a_s2.wav" / "x").mkdir(parents=True)
    monkeypatch.setattr(storage, "remove", lambda url: Path(url).unlink())
    with pytest.raises(OSError, match="a_s2"):
        separator.file(tmp_path / "a.wav", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a_s2.wav"]


def test_ctrl_c_in_a_batch_keeps_what_is_finished_and_ends_with_130(
    separate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        (tmp_path / f"{name}.wav").write_bytes(wav())
    write = separator_module._write_audio

    def stopped(paths: list[Path], *rest: object) -> None:
        write(paths, *rest)
        if (tmp_path / "out" / "a_s2.wav").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(separator_module, "_write_audio", stopped)
    names = [str(tmp_path / f"{name}.wav") for name in "abc"]
    status, found, said = separate(*names)
    assert (status, found) == (130, ["a_s1.wav", "a_s2.wav"])
    assert said == "stopped; nothing is left of the unfinished recording\n"


def mutated(seed: int) -> tuple[str, bytes]:
    """A small valid file with flipped bytes of its header, a wrong size, or its end cut off."""
    rng = np.random.default_rng(seed)
    kind, subtype = KINDS[seed % len(KINDS)]
    stream = io.BytesIO()
    soundfile.write(stream, voices(900, seed, num=1)[0], RATE, format=kind, subtype=subtype)
    data = bytearray(stream.getvalue())
    head = min(64, len(data))
    for _ in range(rng.integers(0, 4)):
        data[rng.integers(head)] = rng.integers(256)
    if rng.random() < 0.4:
        at = rng.integers(head - 4)
        data[at : at + 4] = rng.choice(WRONG_SIZES)
    if rng.random() < 0.4:
        del data[rng.integers(len(data)) :]
    if rng.random() < 0.1:
        at = rng.integers(len(data) + 1)
        data[at:at] = rng.bytes(int(rng.integers(1, 50)))
    return f"{seed}.{kind.lower()}", bytes(data)


KINDS = [
    *(("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAVEX", "PCM_24"), ("FLAC", "PCM_16")),
    *(("OGG", "VORBIS"), ("AIFF", "PCM_16"), ("MP3", "MPEG_LAYER_III"), ("AU", "PCM_16")),
    *(("W64", "PCM_16"), ("CAF", "PCM_16"), ("RF64", "PCM_16"), ("OGG", "OPUS")),
]
WRONG_SIZES = np.array([b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\1", b"\x80\0\0\0"])


def test_a_hundred_mutated_files_are_each_separated_or_named(
    separate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, data in map(mutated, range(100)):
        Path(name).write_bytes(data)
    names = [path.name for path in tmp_path.iterdir()]
    status, found, said = separate(*names, options=("--batch-size=4",))
    reasons = [line for line in said.splitlines() if line.startswith("error: ")]
    failed = {name for name in names for line in reasons if f" {name}" in line.replace("/", " ")}
    assert status == 1 and 40 < len(failed) == len(reasons) < 100
    whole = {name for name in names if f"{name.split('.')[0]}_s2.wav" in found}
    assert whole | failed == set(names) and not whole & failed
    assert f"{len(whole)} separated, {len(failed)} failed" in said


@pytest.mark.parametrize("name", MALFORMED)
def test_in_python_a_malformed_recording_is_one_clear_error(
    name: str, separator: Separator, tmp_path: Path
) -> None:
    data, reason = MALFORMED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SeparationError) as caught:
        separator.file(tmp_path / name, tmp_path / "out")
    assert str(tmp_path / name) in str(caught.value) and reason in str(caught.value)
    assert "\n" not in str(caught.value) and list((tmp_path / "out").iterdir()) == []
