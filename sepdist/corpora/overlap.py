"""LibriCSS-like test mixtures of LibriSpeech: an utterance whole, part of it spoken over -> Mixtures with transcript.

In: LibriSpeech, or any tree of its shape with transcripts. Out, for the split OV<percent>: s1, a target utterance, and
s2, another speaker's, who talks into that share of it: at its beginning with the end of an utterance, or at its end
with the beginning of one, as an utterance of LibriCSS is cut out of a meeting. Nothing is played back in a room.

Targets, partners, levels and ends do not depend on the percentage, so that conditions differ by the overlap alone.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from sepdist import audio
from sepdist.corpora.librispeech import load, speaker_of, transcripts, utterance_paths
from sepdist.corpora.recipes import SPEECH_LUFS, guarded_gains
from sepdist.data.records import Mixture
from sepdist.seeding import rng


def overlapped(
    target: str,
    other: str,
    levels: tuple[float, float],
    share: float,
    at_end: bool,
    sample_rate: int,
) -> dict[str, np.ndarray]:
    """s1 [T], the target, and s2 [T], silent but for round(share * T) samples of `other`; s1 alone where share is 0.

    `levels` in LUFS are of the whole utterances, with LibriMix's guards against clipping (`mixing.guarded_gains`).
    """
    waves = [load(path, sample_rate) for path in ((target, other) if share else (target,))]
    heard = waves[:1]
    if share:
        count = min(round(share * waves[0].size), waves[1].size)
        around = (waves[0].size - count, 0) if at_end else (0, waves[0].size - count)
        heard.append(np.pad(waves[1][:count] if at_end else waves[1][-count:], around))
    gains = guarded_gains(
        levels[: len(waves)],
        [
            audio.loudness(wave, sample_rate, path)
            for wave, path in zip(waves, (target, other), strict=False)
        ],
        [float(np.max(np.abs(wave))) for wave in waves],
        lambda: heard,
    )
    return {
        f"s{i}": wave * np.float32(gain)
        for i, (wave, gain) in enumerate(zip(heard, gains, strict=True), start=1)
    }


class Overlap:
    """`num_mixtures` mixtures of the transcribed utterances in `root`/`speech_split`; a split is OV0, OV10, ..., OV100.

    Each utterance is the target once before any is twice; its partner is drawn by speaker, and long enough.
    """

    def __init__(
        self,
        root: str,
        speech_split: str = "test",
        num_mixtures: int = 100,
        seed: int = 0,
        sample_rate: int = 8000,
    ) -> None:
        self.name = "overlap"
        self.root = Path(root).expanduser()
        self.speech_split = speech_split
        self.num_mixtures = num_mixtures
        self.seed = seed
        self.sample_rate = sample_rate

    def records(self, split: str) -> Iterator[Mixture]:
        """The mixtures of an overlap, always the same ones in the same order."""
        found = re.fullmatch(r"OV(\d{1,3})", split)
        if found is None or int(found[1]) > 100:
            raise ValueError(
                f"corpus overlap: a split is OV0 to OV100, the overlap in percent, not {split!r}"
            )
        share = int(found[1]) / 100
        texts: dict[Path, str] = {}
        speakers: dict[str, list[Path]] = defaultdict(list)
        paths = utterance_paths(self.root, self.speech_split)
        written = {folder: transcripts(folder) for folder in {path.parent for path in paths}}
        for path in paths:
            if text := written[path.parent].get(path.stem):
                texts[path] = text
                speakers[speaker_of(path)].append(path)
        if len(speakers) < 2:
            raise ValueError(
                f"{self.root / self.speech_split}: {len(speakers)} speaker(s) with a transcript (*.trans.txt), "
                "an overlap needs 2"
            )
        seconds = {path: audio.duration_seconds(path) for path in texts}
        for number in range(self.num_mixtures):
            turn, place = divmod(number, len(texts))
            order = rng(self.seed, "overlap targets", self.speech_split, turn).permutation(
                len(texts)
            )
            target = list(texts)[order[place]]
            generator = rng(self.seed, "overlap mixture", self.speech_split, number)
            levels = (
                float(generator.uniform(*SPEECH_LUFS)),
                float(generator.uniform(*SPEECH_LUFS)),
            )
            at_end = bool(generator.integers(2))
            names = [name for name in sorted(speakers) if name != speaker_of(target)]
            drawn = [speakers[names[i]] for i in generator.permutation(len(names))]
            others = [theirs[i] for theirs in drawn for i in generator.permutation(len(theirs))]
            other = next(
                (path for path in others if seconds[path] >= share * seconds[target]), None
            )
            if other is None:
                raise ValueError(
                    f"{target}: no other speaker has an utterance of {share * seconds[target]:.1f} s, {split} of it"
                )
            both = (target, other) if share else (target,)
            yield Mixture(
                id="_".join([f"{number:04d}", *(path.stem for path in both)]),
                speakers=tuple(speaker_of(path) for path in both),
                sample_rate=self.sample_rate,
                load=partial(
                    overlapped, str(target), str(other), levels, share, at_end, self.sample_rate
                ),
                texts=(texts[target], "")[: len(both)],
            )
