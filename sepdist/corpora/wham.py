"""WHAM! and WHAMR! as their scripts generate them, and WHAM!'s noise as published.

Mixtures are read from wav8k/min/{tr,cv,tt}/{mix_both,s1,s2,noise,...}; in WHAMR! the folders are
mix_both_reverb, s1_anechoic, s1_reverb and so on (Wichern et al. 2019, Maciejewski et al. 2020).
The task `noise` gives wham_noise/{tr,cv,tt}/*.wav, or any folders of noises, as Utterances of the
speaker "noise", for objectives that add noise of their own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from sepdist import audio
from sepdist.corpora.files import load, require_unique, sample_key
from sepdist.corpora.recipes import Mode
from sepdist.corpora.tables import folder_rows, to_records
from sepdist.corpora.wsj0_mix import speakers_in
from sepdist.data.records import Mixture, Utterance

TASKS = ["noise", "sep_clean", "sep_noisy", "enh_single", "enh_both"]
TASKS += ["sep_reverb", "sep_noisy_reverb", "enh_single_reverb", "enh_both_reverb"]


@dataclass
class Wham:
    """A `task` on the mixtures below `root`, the folder of wav8k/; or the noises below it.

    Tasks enh_* have one source, s1 or the speech of both. Where there is reverberation, in WHAMR!
    alone, the sources are anechoic (`target=dry`), so that their sum is not the mixture, or as
    reverberant as that (`wet`). A noise's id is the path below the split without suffix, with '-'
    for '/' and 'p' for '.'; noises are resampled as in the LibriMix recipe.
    """

    root: str
    sample_rate: int = 8000
    task: str = "noise"
    mode: Mode = "min"
    target: Literal["dry", "wet"] = "dry"

    def __post_init__(self) -> None:
        if self.task not in TASKS or self.target not in ("dry", "wet"):
            known = f"task is {', '.join(TASKS)}, target dry or wet"
            raise ValueError(f"Wham: {known}, not {self.task!r}, {self.target!r}")
        self.name = "wham" if self.task == "noise" else f"wham_{self.task}"

    def records(self, split: str) -> Iterator[Utterance | Mixture]:
        """Yield the noises or mixtures of a split in the order of their paths."""
        root = Path(self.root).expanduser()
        if self.task != "noise":
            yield from self._mixtures(root, split)
            return
        rows = folder_rows(root / split, {"s1": "."})
        require_unique((sample_key(row.name) for row in rows), str(root / split))
        for row in rows:
            read = partial(load, str(row.paths["s1"]), self.sample_rate, audio.resample_poly)
            yield Utterance(sample_key(row.name), "noise", self.sample_rate, read)

    def _mixtures(self, root: Path, split: str) -> Iterator[Utterance | Mixture]:
        base = root / f"wav{self.sample_rate // 1000}k" / self.mode / split
        single, noisy = "single" in self.task, "both" in self.task or "noisy" in self.task
        kind = "single" if single else "both" if noisy else "clean"
        reverberant = self.task.endswith("reverb")
        whamr = (base / "s1_anechoic").is_dir()
        if reverberant and not whamr:
            todo = "check root, sample_rate, mode and split"
            raise audio.AudioError(f"{base}: has no s1_anechoic, so it is not WHAMR!'s; {todo}")
        room = "_reverb" if reverberant else "_anechoic" if whamr else ""
        aim = "_anechoic" if whamr and self.target == "dry" else room
        both, alone = self.task.startswith("enh_both"), ["s1"] if single else ["s1", "s2"]
        sources = {"s1": f"mix_clean{aim}"} if both else {m: f"{m}{aim}" for m in alone}
        noise = {"noise": "noise"} if kind != "clean" and aim == room else {}
        rows = folder_rows(base, {"mix": f"mix_{kind}{room}", **sources, **noise})
        for number, row in enumerate(rows):
            names = speakers_in(row.name)
            names = ("+".join(names),) if both else names[: len(sources)]
            rows[number] = row._replace(speakers=names)
        yield from to_records(rows, base, self.sample_rate, "sum" if aim == room else "own")
