"""A listening page: one static HTML file with players, spectrograms and scores, for any browser.

It needs no server and no script: audio is linked relative to the page, pictures are within it.
"""

import base64
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from urllib.parse import quote

import numpy as np

from sepdist import storage
from sepdist.audio import open_sound

MAX_COLUMNS = 800  # of a picture
DRAWN_SECONDS = 60  # of a recording


@dataclass(frozen=True)
class Track:
    """One player. The first of a section, such as the mixture, has the whole width."""

    label: str
    link: str  # place of the audio relative to the page, unquoted; "" if it cannot be linked
    caption: str = ""  # such as its scores
    wave: np.ndarray | None = None  # [T], what to draw
    rate: int = 1


def write_listening_page(
    url: str, title: str, sections: Iterable[tuple[str, Sequence[Track]]], note: str = ""
) -> None:
    """Write an HTML file to `url` with a section for each (heading, tracks)."""
    texts = [
        f"<h2>{escape(heading)}</h2>\n<section>\n{''.join(map(_figure, tracks))}</section>\n"
        for heading, tracks in sections
    ]
    page = Template(Path(__file__).with_suffix(".html").read_text())
    filled = page.substitute(title=escape(title), note=escape(note), sections="".join(texts))
    storage.put_bytes(url, filled.encode("utf-8", "backslashreplace"))


def write_separated_page(folder: str, separated: Mapping[str, Sequence[str]]) -> str:
    """Write listening.html in the output folder of `separated` recordings; returns its place.

    Local files are linked relative to it, and DRAWN_SECONDS of each are drawn.
    """
    sections = []
    for recording, outputs in separated.items():
        labels = ("recording", *(f"speaker {i}" for i in range(1, len(outputs) + 1)))
        tracks = []
        for label, file in zip(labels, (recording, *outputs), strict=True):
            if storage.is_remote(file) or storage.is_remote(folder):
                inside = file.startswith(f"{folder.rstrip('/')}/")
                tracks.append(Track(label, file[len(folder.rstrip("/")) + 1 :] if inside else ""))
                continue
            place = os.path.expanduser(file)
            with open_sound(place) as sound:
                rate, size = sound.samplerate, DRAWN_SECONDS * sound.samplerate
                wave_TC = sound.read(size, "float32", always_2d=True)
            link = os.path.relpath(place, os.path.expanduser(folder))
            tracks.append(Track(label, link, "", wave_TC.mean(1), rate))
        sections.append((recording, tracks))
    page = storage.join(folder, "listening.html")
    write_listening_page(
        page, "Separated recordings", sections, f"First {DRAWN_SECONDS} s are drawn."
    )
    return page


def _figure(track: Track) -> str:
    label, texts, lines = escape(track.label), [track.caption], []
    if track.wave is not None:
        texts.append(f"{track.wave.size / track.rate:.1f} s, 0 to {track.rate / 2000:g} kHz")
        data = base64.b64encode(spectrogram_png(track.wave, track.rate)).decode()
        lines.append(f'<img alt="spectrogram of {label}" src="data:image/png;base64,{data}">')
    if track.link:  # ./ because a name may begin like a scheme: "a:b.wav"
        address = quote(f"./{track.link}", errors="surrogateescape")
        lines.append(f'<audio controls preload="none" src="{address}"></audio>')
    caption = escape("; ".join(filter(None, texts)))
    return "\n".join(
        [f"<figure><figcaption><b>{label}</b> {caption}</figcaption>", *lines, "</figure>\n"]
    )


def spectrogram_png(wave_T: np.ndarray, rate: int) -> bytes:
    """A PNG file without axes, at most MAX_COLUMNS wide: the loudest of neighbouring frames."""
    from matplotlib.image import imsave  # late: it takes most of a second

    from sepdist.plotting import DYNAMIC_RANGE_DB, decibel_spectrogram

    decibels, stream = decibel_spectrogram(wave_T, rate), io.BytesIO()
    starts = np.arange(0, decibels.shape[1], -(-decibels.shape[1] // MAX_COLUMNS))
    picture = np.maximum.reduceat(decibels, starts, axis=1)
    imsave(stream, picture, -DYNAMIC_RANGE_DB, 0.0, "magma", "png", "lower")
    return stream.getvalue()
