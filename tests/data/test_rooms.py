"""Rooms of dynamic mixing, against the image-source method worked out by hand."""

import sys
from pathlib import Path

import numpy as np
import pytest

from sepdist.config import ConfigError
from sepdist.data.dataset import collate
from sepdist.data.rooms import SOUND_SPEED, Rooms
from tests.support.clips import mixing, rows

RATE = 16000


def image_sum(
    size: np.ndarray, ear: np.ndarray, place: np.ndarray, absorbed: float, order: int
) -> tuple[np.ndarray, np.ndarray]:
    """Distances and gains of all images up to an order, by their mirror positions."""
    found = []
    for steps in np.ndindex(*[2 * order + 1] * 3):
        counts = np.array(steps) - order
        if (reflections := int(np.abs(counts).sum())) <= order:
            odd = counts % 2 == 1
            image = counts * size + np.where(odd, size - place, place)
            distance = float(np.linalg.norm(image - ear))
            found.append((distance, (1 - absorbed) ** (reflections / 2) / distance))
    distances, gains = np.array(found).T
    return distances, gains


def known_room(**changes: object) -> Rooms:
    """A room without chance but for the angles: microphone and sources are at known heights."""
    fixed: dict = {"t60": (0.3, 0.3), "sides": (6.0, 6.0), "height": (3.0, 3.0)}
    fixed |= {"distance": (1.5, 1.5), "elevation": (1.2, 1.2), "max_order": 3}
    return Rooms(**fixed | changes)


def test_the_direct_sound_comes_after_distance_over_speed_with_a_gain_of_1() -> None:
    click = np.zeros(2000, np.float32)
    click[100] = 1
    for heard in known_room().play([click] * 3, seed=1, position=5, rate=RATE)[1]:
        assert heard.dtype == np.float32 and heard.size == click.size
        delay = 1.5 / SOUND_SPEED * RATE  # 69.97 samples
        spectrum = np.fft.rfft(heard)[10:800] / np.fft.rfft(click)[10:800]
        turns = -np.unwrap(np.angle(spectrum)) / (2 * np.pi * np.arange(10, 800) / 2000)
        assert np.median(turns) == pytest.approx(delay, abs=0.02)
        assert np.abs(spectrum) == pytest.approx(1, abs=0.01)
        assert np.abs(heard[:140]).max() < 0.02, "nothing but the filter's ripple comes earlier"


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list:
    """The rooms of the library whose responses were computed, in order: full and direct."""
    import pyroomacoustics

    found = []

    class Noted(pyroomacoustics.ShoeBox):
        def compute_rir(self) -> None:
            super().compute_rir()
            found.append(self)

    monkeypatch.setattr(pyroomacoustics, "ShoeBox", Noted)
    return found


def test_reflections_have_the_delays_and_gains_of_the_mirror_images(built: list) -> None:
    """Compared in frequency, where a delay is a phase."""
    click = np.zeros(3000, np.float32)
    click[0] = 1
    (full, _), _ = known_room().play([click] * 2, seed=2, position=9, rate=RATE)
    size, ear = np.array([6.0, 6.0, 3.0]), built[0].mic_array.R[:, 0]
    place = built[0].sources[0].position
    assert np.abs(ear[:2] - 3).max() <= 0.2 and ear[2] == place[2] == pytest.approx(1.2)
    assert np.hypot(*(place - ear)[:2]) == pytest.approx(1.5)
    # Sabine: 0.1611 V / (A T60) of the energy is absorbed at each reflection.
    absorbed = 0.1611 * (6 * 6 * 3) / (2 * (36 + 18 + 18) * 0.3)
    distances, gains = image_sum(size, ear, place, absorbed, order=3)
    assert len(distances) == 63
    frequencies = np.arange(300, 6000, 50)
    turns = np.exp(-2j * np.pi * np.outer(frequencies, distances / SOUND_SPEED))
    wanted = turns @ (gains * 1.5)  # the direct sound, at 1.5 m, has a gain of 1
    taps = np.exp(-2j * np.pi * np.outer(frequencies, np.arange(full.size) / RATE))
    error = np.abs(taps @ full - wanted)
    assert np.sqrt(np.mean(error**2) / np.mean(np.abs(wanted) ** 2)) < 0.02


def test_a_dry_target_is_the_direct_sound_and_the_mixture_what_is_heard(
    voices: str,
    noises: str,
    built: list,
) -> None:
    """The library's responses, convolved by NumPy."""
    rooms = {"max_order": 4}
    dry = mixing(voices, rooms=rooms, noise=noises)
    wet = mixing(voices, rooms=rooms | {"target": "wet"}, noise=noises)
    plain = mixing(voices, noise=noises)
    for position in range(4):
        built.clear()
        one, other, bare = (made.item(position, []) for made in (dry, wet, plain))
        assert one.id == other.id == bare.id, "rooms change no other draw"
        assert list(one.members) == ["s1", "s2", "noise", "mix"]
        assert list(other.members) == ["s1", "s2", "noise"]
        batches = [collate([item], range(position, position + 1)) for item in (one, other)]
        np.testing.assert_allclose(batches[0].mixture, batches[1].mixture, atol=1e-6)
        np.testing.assert_array_equal(batches[0].mixture[0], one.members["mix"])
        np.testing.assert_array_equal(one.members["noise"], bare.members["noise"])
        for room, found in ((built[0], other), (built[1], one)):
            for number, name in enumerate(("s1", "s2")):
                distance = np.linalg.norm(room.sources[number].position - room.mic_array.R[:, 0])
                heard = np.convolve(bare.members[name], room.rir[0][number])[40:] * distance
                wave = found.members[name]
                np.testing.assert_allclose(wave, heard[: wave.size], atol=1e-5)


def test_rooms_are_the_same_in_any_world_and_differ_from_position_to_position(
    voices: str,
) -> None:
    options = {"rooms": {"max_order": 2}}
    whole = rows(mixing(voices, **options), 0, 1, 0, 2, 1)
    parts = [row for rank in range(3) for row in rows(mixing(voices, **options), rank, 3, 0, 2, 2)]
    assert sorted(parts) == whole
    click = np.eye(1, 999, dtype=np.float32)[0]
    rooms = Rooms(max_order=2)
    heard = {rooms.play([click], seed=1, position=p, rate=8000)[0][0].tobytes() for p in range(9)}
    assert len(heard) == 9


def test_what_cannot_be_a_room_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for changes, reason in (
        ({"target": "anechoic"}, "target='anechoic'.*dry or wet"),
        ({"max_order": 99}, "max_order=99"),
        ({"t60": (0.5, 0.2)}, r"t60=\(0\.5, 0\.2\)"),
        ({"sides": (3.0, 5.0)}, "a source may be in a wall"),
        ({"height": (1.5, 3.0)}, "give larger sides and height"),
    ):
        with pytest.raises(ValueError, match=reason):
            Rooms(**changes)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "pyroomacoustics", None)
    with pytest.raises(ConfigError, match=r"pip install pyroomacoustics \(the extra `rooms`"):
        Rooms()


@pytest.mark.slow
def test_a_sample_in_a_room_costs_a_few_milliseconds(voices: str) -> None:
    """No assertion: prints the CPU time of samples for docs/results-2026-11.md."""
    import time

    for rooms in (None, {"max_order": 10}, {"max_order": 20}, {"max_order": 10, "target": "wet"}):
        made = mixing(voices, rooms=rooms)
        for position in range(30):
            made.item(position, [])
        began = time.process_time()
        for position in range(30, 130):
            made.item(position, [])
        print(rooms, f"{(time.process_time() - began) * 10:.2f} ms")
    assert Path(voices).exists()
