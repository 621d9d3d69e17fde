"""A listening page: one static HTML file with players, spectrograms and scores, for any browser.

It needs no server and no script: audio is linked relative to the page, pictures are within it.
"""

import base64
import contextlib
import io
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from urllib.parse import quote

import numpy as np

from sepdist import storage
from sepdist.audio import AudioError, load_channel

MAX_COLUMNS = 800  # of a picture
MAX_DRAWN = 1_000_000  # samples of a recording
Track = tuple[str, str, str]  # label, place of the audio, caption such as its scores


def write_listening_page(
    url: str, title: str, sections: Iterable[tuple[str, Sequence[Track]]]
) -> None:
    """Write an HTML file with a section for each (heading, tracks); the first track is the widest.

    Audio on s3:// can be played if it lies below the page; local audio is drawn too.
    """
    folder = url.rpartition("/")[0] or "."
    texts = [
        f"<h2>{escape(heading)}</h2>\n<section>\n"
        + "".join(_figure(folder, *track) for track in tracks)
        + "</section>\n"
        for heading, tracks in sections
    ]
    page = Template(Path(__file__).with_suffix(".html").read_text())
    filled = page.substitute(title=escape(title), sections="".join(texts))
    storage.put_bytes(url, filled.encode("utf-8", "backslashreplace"))


def _figure(folder: str, label: str, file: str, caption: str) -> str:
    picture, link = "", file.removeprefix(f"{folder}/")
    if not storage.is_remote(file) and not storage.is_remote(folder):
        place = os.path.expanduser(file)
        link = os.path.relpath(place, os.path.expanduser(folder))
        with contextlib.suppress(AudioError):  # of a format that only the browser reads
            wave_T, rate = load_channel(place, MAX_DRAWN, may_be_silent=True)
            data = base64.b64encode(spectrogram_png(wave_T, rate)).decode()
            shown = f"{label}, {wave_T.size / rate:.1f} s, 0 to {rate / 2000:g} kHz"
            picture = f'<img alt="{escape(shown)}" src="data:image/png;base64,{data}">\n'
    # ./ because a name may begin like a scheme: "a:b.wav"
    source = quote(f"./{link}", errors="surrogateescape")
    player = f'<audio controls preload="none" src="{source}"></audio>\n' * (link != file)
    heading = f"<figcaption><b>{escape(label)}</b> {escape(caption)}</figcaption>"
    return f"<figure>{heading}\n{picture}{player}</figure>\n"


def spectrogram_png(wave_T: np.ndarray, rate: int) -> bytes:
    """A PNG file without axes, at most MAX_COLUMNS wide: the loudest of neighbouring frames."""
    from matplotlib.image import imsave  # late: it takes most of a second

    from sepdist.plotting import DYNAMIC_RANGE_DB, decibel_spectrogram

    decibels, stream = decibel_spectrogram(wave_T, rate), io.BytesIO()
    starts = np.arange(0, decibels.shape[1], -(-decibels.shape[1] // MAX_COLUMNS))
    picture = np.round(np.maximum.reduceat(decibels, starts, axis=1) / 4) * 4  # for a small file
    imsave(stream, picture, -DYNAMIC_RANGE_DB, 0.0, "magma", "png", "lower")
    return stream.getvalue()
