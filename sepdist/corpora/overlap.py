"""LibriCSS-like test mixtures of LibriSpeech: one utterance, whole, with another talking into it.

In the split OV<percent>, s1 is the target utterance and s2 another speaker's, who talks into that
share of it: at its start with the end of an utterance, or at its end with the start of one, as in
an utterance cut from a LibriCSS meeting. There is no room acoustics. Targets, partners, levels and
ends do not depend on the percentage, so conditions differ by the overlap alone.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from sepdist import audio
from sepdist.corpora.files import load, report_left_out
from sepdist.corpora.librispeech import speaker_of, transcripts, utterance_paths
from sepdist.corpora.recipes import SPEECH_LUFS, guarded_gains
from sepdist.data.records import Mixture
from sepdist.seeding import rng


def overlapped(
    paths: tuple[str, ...], levels: tuple[float, ...], share: float, at_end: bool, sample_rate: int
) -> dict[str, np.ndarray]:
    """Load the target as s1 [T], and as s2 [T] round(share * T) samples of the other, else silent.

    Without a second path there is no s2. `levels` are those of the whole utterances in LUFS, with
    LibriMix's guards against clipping (`guarded_gains`).
    """
    waves = [load(path, sample_rate) for path in paths]
    members = waves[:1]
    for wave in waves[1:]:
        count = min(round(share * waves[0].size), wave.size)
        rest = waves[0].size - count
        piece = wave[:count] if at_end else wave[-count:]
        members.append(np.pad(piece, (rest, 0) if at_end else (0, rest)))
    both = zip(waves, paths, strict=True)
    loudnesses = [audio.loudness(wave, sample_rate, path) for wave, path in both]
    peaks = [float(np.max(np.abs(wave))) for wave in waves]
    gains = guarded_gains(levels, loudnesses, peaks, lambda: members)
    scaled = [wave * np.float32(gain) for wave, gain in zip(members, gains, strict=True)]
    return {f"s{number}": wave for number, wave in enumerate(scaled, start=1)}


@dataclass
class Overlap:
    """`num_mixtures` mixtures of transcribed utterances; splits are OV0, OV10, ..., OV100.

    The utterances are those of `root`/`speech_split`. Each is the target once before any is twice;
    its partner is long enough, of a speaker drawn at random.
    """

    root: str
    speech_split: str = "test"
    num_mixtures: int = 100
    seed: int = 0
    sample_rate: int = 8000
    name = "overlap"

    def records(self, split: str) -> Iterator[Mixture]:
        """Yield the mixtures of an overlap, always the same ones in the same order."""
        found = re.fullmatch(r"OV(\d{1,3})", split)
        if found is None or int(found[1]) > 100:
            raise ValueError(f"corpus overlap: split {split!r} must be OV0 to OV100 (percent)")
        share = int(found[1]) / 100
        root = Path(self.root).expanduser()
        read, texts = cache(transcripts), dict[Path, str]()
        speakers: dict[str, list[Path]] = defaultdict(list)
        paths = utterance_paths(root, self.speech_split)
        for path in paths:
            if text := read(path.parent).get(path.stem):
                texts[path] = text
                speakers[speaker_of(path)].append(path)
        report_left_out(root, len(paths) - len(texts), "utterances without a transcript")
        if len(speakers) < 2:
            has = f"{len(speakers)} speaker(s) with a transcript (*.trans.txt)"
            raise ValueError(f"{root / self.speech_split}: {has}, an overlap needs 2")
        seconds = {path: audio.duration_seconds(path) for path in texts}
        for number in range(self.num_mixtures):
            turn, place = divmod(number, len(texts))
            order = rng(self.seed, "overlap targets", self.speech_split, turn)
            target = list(texts)[order.permutation(len(texts))[place]]
            draw = rng(self.seed, "overlap mixture", self.speech_split, number)
            levels = tuple(draw.uniform(*SPEECH_LUFS, size=2).tolist())
            at_end = bool(draw.integers(2))
            names = [name for name in sorted(speakers) if name != speaker_of(target)]
            drawn = [speakers[names[i]] for i in draw.permutation(len(names))]
            others = [theirs[i] for theirs in drawn for i in draw.permutation(len(theirs))]
            wanted = share * seconds[target]
            other = next((path for path in others if seconds[path] >= wanted), None)
            if other is None:
                lacks = f"an utterance of {wanted:.1f} s, {split} of it"
                raise ValueError(f"{target}: no other speaker has {lacks}")
            both = (target, other) if share else (target,)
            options = (levels[: len(both)], share, at_end, self.sample_rate)
            yield Mixture(
                id="_".join([f"{number:04d}", *(path.stem for path in both)]),
                speakers=tuple(speaker_of(path) for path in both),
                sample_rate=self.sample_rate,
                load=partial(overlapped, tuple(map(str, both)), *options),
                texts=(texts[target], "")[: len(both)],
                may_be_silent=True,  # the piece that overlaps
            )
