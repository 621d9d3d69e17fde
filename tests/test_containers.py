"""m4a, webm, video files and the like, made by PyAV's encoders and muxers."""

import os
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sepdist import audio
from sepdist.audio import AudioError
from sepdist.inference.separator import Separator
from sepdist.inference.windows import SeparationError

av = pytest.importorskip("av")
RATE = 48000


def tones(seconds: float = 1.0) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    return (0.3 * np.sin(2 * np.pi * 300 * time) + 0.2 * np.sin(2 * np.pi * 1100 * time)).astype(
        "f"
    )


def encode(
    path: Path,
    codec: str,
    waves: list[np.ndarray],
    sample_format: str = "fltp",
    video: bool = False,
) -> Path:
    """Write a track of `codec` for each wave, behind a track of grey pictures if `video`."""
    with av.open(str(path), "w") as container:
        if video:
            pictures = container.add_stream("mpeg4", rate=10)
            pictures.width, pictures.height, pictures.pix_fmt = 32, 32, "yuv420p"
        tracks = [container.add_stream(codec, rate=RATE, layout="mono") for _ in waves]
        for track in tracks:
            track.codec_context.format = sample_format
        for number in range(round(10 * len(waves[0]) / RATE) if video else 0):
            picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 99, "u1"), format="rgb24")
            picture.pts = number
            container.mux(pictures.encode(picture))
        for track, wave in zip(tracks, waves, strict=True):
            whole = av.AudioFrame.from_ndarray(wave[None].astype("f"), format="fltp", layout="mono")
            whole.sample_rate = RATE
            parts = av.AudioFifo()
            for frame in av.AudioResampler(sample_format, "mono", RATE).resample(whole):
                frame.pts = None
                parts.write(frame)
            done = 0
            while part := parts.read(track.codec_context.frame_size or 1024, partial=True):
                part.pts, part.time_base = done, Fraction(1, RATE)
                done += part.samples
                container.mux(track.encode(part))
            container.mux(track.encode(None))
        if video:
            container.mux(pictures.encode(None))
    return path


@pytest.mark.parametrize(
    ("name", "codec", "sample_format", "subtype"),
    [
        ("a.m4a", "alac", "s16p", "PCM_16"),
        ("a.m4a", "alac", "s32p", "PCM_24"),
        ("a.mka", "flac", "s16", "PCM_16"),
        ("a.mov", "pcm_s24le", "s32", "PCM_24"),
        ("a.mkv", "pcm_s16le", "s16", "PCM_16"),
    ],
)
def test_a_codec_without_loss_gives_the_samples_that_were_encoded(
    tmp_path: Path, name: str, codec: str, sample_format: str, subtype: str
) -> None:
    path = encode(tmp_path / name, codec, [wave := tones()], sample_format)
    step = 2**-15 if subtype == "PCM_16" else 2**-23
    with audio.open_sound(path) as sound:
        assert (sound.samplerate, sound.channels, sound.frames) == (RATE, 1, RATE)
        assert sound.subtype == subtype
        np.testing.assert_allclose(sound.read(dtype="float32"), wave, atol=step)
    np.testing.assert_array_equal(audio.load_channel(path, 7)[0], audio.load_channel(path)[0][:7])


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.m4a", "aac"), ("b.3gp", "aac"), ("a.webm", "libopus"), ("c.mka", "libopus")],
)
def test_a_codec_with_loss_gives_the_recording_without_the_delay_of_the_encoder(
    tmp_path: Path, name: str, codec: str
) -> None:
    wave = tones()
    got, rate = audio.load_channel(encode(tmp_path / name, codec, [wave]))
    assert rate == RATE and 0 <= len(got) - len(wave) < 1024  # its last frame is filled up
    middle = slice(RATE // 10, -RATE // 10)
    assert audio.rms((got[: len(wave)] - wave)[middle]) < 0.1 * audio.rms(wave)


class Signs(nn.Module):
    def forward(self, mixture_BT: Tensor) -> Tensor:
        return torch.stack([mixture_BT.clamp(min=0), mixture_BT.clamp(max=0)], 1)


def test_of_a_video_the_first_audio_track_is_separated_and_others_are_told(tmp_path: Path) -> None:
    wave = tones()
    path = encode(tmp_path / "v.mov", "pcm_s16le", [wave, 0 * wave], "s16", video=True)
    result = Separator(Signs(), RATE).file(path, tmp_path / "out", subtype="FLOAT")
    assert result.warnings == [f"{path}: the first of 2 audio tracks is taken"]
    voices = [audio.load_channel(one)[0] for one in result.outputs]
    np.testing.assert_allclose(voices, [wave.clip(min=0), wave.clip(max=0)], atol=2**-15)
    names = [one.name for one in (tmp_path / "out").iterdir()]
    assert sorted(names) == ["v_s1.wav", "v_s2.wav"]


def test_playlists_do_not_open_other_files_whatever_they_begin_with(tmp_path: Path) -> None:
    target = encode(tmp_path / "secret.mkv", "pcm_s16le", [tones()], "s16")
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{target}\n#EXT-X-ENDLIST\n"
    concat = "ffconcat version 1.0\nfile 'secret.mkv'\n"
    with pytest.raises(av.FFmpegError), av.open(str(put(tmp_path / "no.m3u8", "#EXTM3U\n"))):
        pass
    for text in (hls, concat, "....ftyp" + hls, "#!AMR\n" + concat, "\n\n\n\nfree" + hls):
        for name in ("list.m3u8", "list.m4a"):
            with pytest.raises(AudioError, match=rf"{name}: .*(cannot be|no audio)"):
                audio.open_sound(put(tmp_path / name, text))


def put(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_file_without_sound_audio_is_one_error_that_names_it(tmp_path: Path) -> None:
    whole = encode(tmp_path / "a.mkv", "pcm_s16le", [tones(3)], "s16").read_bytes()
    with av.open(str(tmp_path / "silent.mp4"), "w") as container:
        pictures = container.add_stream("mpeg4", rate=10)
        pictures.width, pictures.height, pictures.pix_fmt = 32, 32, "yuv420p"
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), "u1"), format="rgb24")
        container.mux([*pictures.encode(picture), *pictures.encode(None)])
    put(tmp_path / "cut.mkv", whole[: len(whole) // 2])
    put(tmp_path / "noise.m4a", b"\0\0\0\x20ftyp" + np.random.default_rng(0).bytes(5000))
    for name, message in (
        ("silent.mp4", "it has no audio track"),
        ("cut.mkv", r"cut short, 1\.5 of 3\.0 s"),
        ("noise.m4a", "cannot be decoded"),
    ):
        with pytest.raises(SeparationError, match=rf"{name}: {message}"):
            Separator(Signs(), RATE).file(tmp_path / name, tmp_path / "out")
        assert os.listdir(tmp_path / "out") == []


def test_any_damage_is_an_audio_error_or_unheard(tmp_path: Path) -> None:
    wholes = [
        encode(tmp_path / "a.m4a", "aac", [tones(0.2)]).read_bytes(),
        encode(tmp_path / "b.webm", "libopus", [tones(0.2)]).read_bytes(),
        encode(tmp_path / "c.mkv", "pcm_s16le", [tones(0.1)] * 2, "s16", video=True).read_bytes(),
    ]
    refused = 0
    for seed in range(90):
        rng, data = np.random.default_rng(seed), bytearray(wholes[seed % 3])
        for _ in range(rng.integers(1, 9)):
            data[rng.integers(len(data))] = rng.integers(256)
        try:
            audio.open_sound(put(tmp_path / "x.m4a", bytes(data))).close()
        except AudioError as error:
            assert "x.m4a: " in str(error)
            refused += 1
    assert 20 < refused < 90


def test_without_pyav_the_error_names_the_extra(tmp_path: Path, monkeypatch) -> None:
    path = encode(tmp_path / "a.m4a", "aac", [tones(0.2)])
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AudioError, match=r"a\.m4a: .*pip install av \(the extra `av`"):
        audio.open_sound(path)


def test_a_folder_to_separate_holds_containers_too(tmp_path: Path) -> None:
    names = ["a.wav", "b.m4a", "c.webm", "d.MOV", "e.txt", "f.raw"]
    for name in names:
        put(tmp_path / name, b"")
    found = audio.find_files(tmp_path, containers=True)
    assert [path.name for path in found] == ["a.wav", "b.m4a", "c.webm", "d.MOV"]
    assert [path.name for path in audio.find_files(tmp_path)] == ["a.wav"]
