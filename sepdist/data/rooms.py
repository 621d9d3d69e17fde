"""Rooms for dynamic mixing: shoeboxes drawn for a position, by the image-source method.

Sizes, places and reverberation times are uniform in the given ranges; the defaults are WHAMR!'s
(Maciejewski et al. 2020, table 1) but for the long reverberation. pyroomacoustics computes the
impulse responses. Everything is in metres and seconds; the microphone is near the centre.

Shapes: T samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sepdist.config import ConfigError
from sepdist.seeding import rng

SOUND_SPEED = 343.0
OFF_CENTRE = 0.2  # of the microphone, along each wall, at most
LEAST_GAP = 0.1  # between a source and a wall


@dataclass(frozen=True)
class Rooms:
    """One room for each mixture, with a place for each source.

    A response is scaled so that the direct sound has a gain of 1; it keeps its delay. With `target`
    "dry" that alone is what a model is to find, with "wet" the reverberation too. Reflections above
    `max_order` are left out: their number, and the time they take, grows with its cube.
    """

    target: str = "dry"
    t60: Sequence[float] = (0.2, 0.6)  # reverberation time, by Sabine's formula
    sides: Sequence[float] = (5.0, 10.0)
    height: Sequence[float] = (3.0, 4.0)
    distance: Sequence[float] = (0.66, 2.0)  # from the microphone, as seen from above
    elevation: Sequence[float] = (0.9, 1.8)  # of microphone and sources
    max_order: int = 10

    def __post_init__(self) -> None:
        if self.target not in ("dry", "wet") or not 0 <= self.max_order <= 50:
            given = f"target={self.target}, max_order={self.max_order}"
            raise ValueError(f"rooms: {given}: give dry or wet, and an order from 0 to 50")
        for name in ("t60", "sides", "height", "distance", "elevation"):
            value = getattr(self, name)
            if len(value) != 2 or not 0 < value[0] <= value[1]:
                raise ValueError(f"rooms.{name}={list(value)}: give [least, most], both above 0")
        room = self.sides[0] / 2 - OFF_CENTRE - LEAST_GAP, self.height[0] - LEAST_GAP
        if self.distance[1] > room[0] or self.elevation[1] > room[1]:
            most = f"at most {room[0]:.2f} m of distance and {room[1]:.2f} m of elevation"
            raise ValueError(f"rooms: the smallest room allows {most}; change sides or height")
        acoustics()

    def responses(
        self, seed: int, position: int, num_sources: int, rate: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Draw the room of a position; returns each source's response and that of its direct sound.

        Both are float32 and begin `lead` samples early, as fractional delays need.
        """
        # The raw stream, because NumPy keeps no other the same across versions.
        raw = rng(seed, "room", position).bit_generator.random_raw(7 + 3 * num_sources)
        shares = iter(((raw >> np.uint64(11)) * 2.0**-53).tolist())

        def draw(bounds: Sequence[float]) -> float:
            return bounds[0] + (bounds[1] - bounds[0]) * next(shares)

        size = np.array([draw(self.sides), draw(self.sides), draw(self.height)])
        t60, off = draw(self.t60), (-OFF_CENTRE, OFF_CENTRE)
        ear = np.array([size[0] / 2 + draw(off), size[1] / 2 + draw(off), draw(self.elevation)])
        places = []
        for _ in range(num_sources):
            away, angle, up = draw(self.distance), draw((0, 2 * np.pi)), draw(self.elevation)
            places.append([ear[0] + away * np.cos(angle), ear[1] + away * np.sin(angle), up])
        area = 2 * (size[0] * size[1] + size[0] * size[2] + size[1] * size[2])
        absorbed = min(1.0, 24 * np.log(10) * size.prod() / (SOUND_SPEED * area * t60))
        found = []
        for order in (self.max_order, 0):
            material = acoustics().Material(absorbed)
            room = acoustics().ShoeBox(size, fs=rate, materials=material, max_order=order)
            room.set_sound_speed(SOUND_SPEED)
            for place in places:
                room.add_source(place)
            room.add_microphone(ear)
            room.compute_rir()
            found.append(room.rir[0])
        gains = np.linalg.norm(np.array(places) - ear, axis=1)  # of a distance of 1 m: 1
        return [
            (np.float32(gain) * heard, np.float32(gain) * direct)
            for gain, heard, direct in zip(gains, *found, strict=True)
        ]


def acoustics() -> Any:
    """Import pyroomacoustics; ConfigError names the extra that installs it."""
    try:
        import pyroomacoustics
    except ImportError:
        raise ConfigError("rooms need pyroomacoustics: pip install 'sepdist[rooms]'") from None
    # One thread, as sums over several round differently; no filter, so that gains are the images'.
    pyroomacoustics.constants.set("num_threads", 1)
    pyroomacoustics.constants.set("rir_hpf_enable", False)
    return pyroomacoustics


def play(wave_T: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Convolve a wave with a response of `Rooms`, float32 [T]: nothing arrives before its time."""
    from scipy import signal

    lead = acoustics().constants.get("frac_delay_length") // 2
    return signal.oaconvolve(wave_T, response)[lead : lead + wave_T.size].astype(np.float32)
