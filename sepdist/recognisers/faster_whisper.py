"""Recogniser: Whisper through `faster-whisper` (CTranslate2). Needs the extra `whisper`.

One beam search at temperature 0, so a wave always gives the same text: Whisper's usual retries at
higher temperatures are random.
"""

from dataclasses import dataclass

import numpy as np

from sepdist import audio
from sepdist.config import ConfigError

RATE = 16000


@dataclass
class FasterWhisper:
    """Transcribe with the model in `folder`: a local folder, or a name such as base.en."""

    folder: str
    compute_type: str = "int8"
    beam_size: int = 5
    language: str = "en"
    num_threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        try:
            from faster_whisper import WhisperModel
        except ImportError as error:
            todo = "run: pip install faster-whisper (the extra `whisper` has it)"
            raise ConfigError(f"recogniser faster_whisper: {error}; {todo}") from error
        try:
            options = {"device": self.device, "compute_type": self.compute_type}
            self.model = WhisperModel(self.folder, cpu_threads=self.num_threads, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"recogniser.folder={self.folder}: no CTranslate2 Whisper model here or on the hub "
                f"({' '.join(str(error).split())[:200]}). Pass a folder that holds model.bin, "
                "config.json, tokenizer.json and vocabulary.json"
            ) from error

    def __call__(self, wave_T: np.ndarray, sample_rate: int) -> str:
        """Return the text, with Whisper's capitals and punctuation."""
        segments, _ = self.model.transcribe(
            audio.resample(wave_T, sample_rate, RATE),
            language=self.language,
            beam_size=self.beam_size,
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,
        )
        return " ".join(segment.text.strip() for segment in segments)
