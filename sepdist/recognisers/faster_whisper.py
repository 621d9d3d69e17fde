"""Recogniser: Whisper through `faster-whisper` (CTranslate2). Needs the extra `whisper`.

One beam search at temperature 0, so a wave always gives the same text: Whisper's usual retries at
higher temperatures are random.
"""

import numpy as np

from sepdist import audio
from sepdist.config import ConfigError

RATE = 16000


class FasterWhisper:
    """Transcribe with the model in `folder`: a local folder, or a name such as base.en."""

    def __init__(
        self,
        folder: str,
        compute_type: str = "int8",
        beam_size: int = 5,
        language: str = "en",
        num_threads: int = 1,
        device: str = "cpu",
    ) -> None:
        try:
            from faster_whisper import WhisperModel
        except ImportError as error:
            todo = "run: pip install faster-whisper (the extra `whisper` has it)"
            raise ConfigError(f"recogniser faster_whisper: {error}; {todo}") from error
        try:
            self.model = WhisperModel(
                folder, device=device, compute_type=compute_type, cpu_threads=num_threads
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"recogniser.folder={folder}: no CTranslate2 Whisper model here or on the hub "
                f"({' '.join(str(error).split())[:200]}). Pass a folder that holds model.bin, "
                "config.json, tokenizer.json and vocabulary.json"
            ) from error
        self.beam_size, self.language = beam_size, language

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
