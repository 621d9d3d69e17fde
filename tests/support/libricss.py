"""LibriCSS meetings as published, of generated sound."""

from pathlib import Path

import numpy as np

from tests.corpora.conftest import signal, write


def meeting_name(percent: int, session: int, silence: str = "0.1_1.0") -> str:
    return f"overlap_ratio_{percent}.0_sil{silence}_session{session}_actual{percent}.{session}"


def write_meeting(
    root: Path, condition: str, name: str, utterances: dict[int, tuple[str, np.ndarray]]
) -> None:
    """Write a meeting as LibriCSS publishes it, each wave on channel 0 and noise on the others."""
    lines = []
    for number, (text, wave) in utterances.items():
        others = [signal(100 + channel, wave.size) for channel in range(6)]
        path = root / condition / name / "record" / "utterances" / f"utterance_{number}.wav"
        write(path, np.stack([wave, *others], axis=1))
        lines.append(f"utterance_{number}.wav\t{text}\n")
    (root / condition / name / "transcription").mkdir()
    (root / condition / name / "transcription" / "utterance_transcription.txt").write_text(
        "".join(lines)
    )
