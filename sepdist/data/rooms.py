"""Rooms for dynamic mixing: shoeboxes drawn for a position, by the image-source method.

Shapes: T samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sepdist.config import ConfigError
from sepdist.seeding import rng

SOUND_SPEED = 343.0  # m/s
OFF_CENTRE = 0.2  # m, of the microphone, along each wall, at most


@dataclass(frozen=True)
class Rooms:
    """One room for each mixture, drawn uniformly; its microphone is near the centre.

    Ranges are in metres and seconds. The direct sound keeps its delay and has a gain of 1. With
    `target` "dry" a model is to find that alone, with "wet" the reverberation too. The time that a
    room takes grows with `max_order` cubed.
    """

    target: str = "dry"
    t60: Sequence[float] = (0.2, 0.6)  # by Sabine's formula
    sides: Sequence[float] = (5.0, 10.0)
    height: Sequence[float] = (3.0, 4.0)
    distance: Sequence[float] = (0.66, 2.0)  # from the microphone, as seen from above
    elevation: Sequence[float] = (0.9, 1.8)  # of microphone and sources
    max_order: int = 10

    def __post_init__(self) -> None:
        ranges = self.t60, self.sides, self.height, self.distance, self.elevation
        fine = all(len(one) == 2 and 0 < one[0] <= one[1] for one in ranges)
        if not fine or self.target not in ("dry", "wet") or not 0 <= self.max_order <= 50:
            rule = "a target dry or wet, ranges [least, most] above 0, a max_order from 0 to 50"
            raise ValueError(f"{self}: give {rule}")
        if 2 * self.distance[1] > self.sides[0] - 0.6 or self.elevation[1] > self.height[0] - 0.1:
            raise ValueError(f"{self}: a source may be in a wall; give larger sides and height")
        acoustics()

    def play(
        self, waves: Sequence[np.ndarray], seed: int, position: int, rate: int
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return waves, float32 [T], as heard in a position's room, and their direct sounds."""
        from scipy import signal

        # The raw stream, because NumPy keeps no other the same across versions.
        raw = rng(seed, "room", position).bit_generator.random_raw(7 + 3 * len(waves))
        shares = iter(((raw >> np.uint64(11)) * 2.0**-53).tolist())

        def draw(bounds: Sequence[float]) -> float:
            return bounds[0] + (bounds[1] - bounds[0]) * next(shares)

        x, y, z = draw(self.sides), draw(self.sides), draw(self.height)
        t60, off = draw(self.t60), (-OFF_CENTRE, OFF_CENTRE)
        ear = np.array([x / 2 + draw(off), y / 2 + draw(off), draw(self.elevation)])
        places = []
        for _ in waves:
            away, angle, up = draw(self.distance), draw((0, 2 * np.pi)), draw(self.elevation)
            places.append([ear[0] + away * np.cos(angle), ear[1] + away * np.sin(angle), up])
        gains = np.linalg.norm(places - ear, axis=1).astype(np.float32)  # theirs is 1 at 1 m
        sabine = 24 * np.log(10) / SOUND_SPEED * x * y * z / (2 * (x * y + x * z + y * z) * t60)
        library, played = acoustics(), []
        lead = library.constants.get("frac_delay_length") // 2  # of its delay filters
        for order in (self.max_order, 0):
            material = library.Material(min(1.0, sabine))
            room = library.ShoeBox([x, y, z], rate, materials=material, max_order=order)
            for place in places:
                room.add_source(place)
            room.add_microphone(ear)
            room.compute_rir()
            heard = map(signal.oaconvolve, waves, map(np.multiply, gains, room.rir[0]))
            played.append([one[lead:][: wave.size] for wave, one in zip(waves, heard, strict=True)])
        return played[0], played[1]


def acoustics() -> Any:
    """Import pyroomacoustics; ConfigError names the extra that installs it."""
    try:
        import pyroomacoustics
    except ImportError:
        todo = "run: pip install pyroomacoustics (the extra `rooms` has it)"
        raise ConfigError(f"rooms need pyroomacoustics; {todo}") from None
    # One thread, as sums over several round differently; no filter, so that gains are the images'.
    pyroomacoustics.constants.set("num_threads", 1)
    pyroomacoustics.constants.set("rir_hpf_enable", False)
    return pyroomacoustics
