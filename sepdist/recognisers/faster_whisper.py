"""A recogniser: Whisper by `faster-whisper` (CTranslate2); a wave in, its text out. Needs the extra `whisper`.

Beam search at temperature 0 and nothing else, so that a wave always gives the same text: Whisper's usual second tries
at higher temperatures draw at random.
"""

import numpy as np

from sepdist import audio
from sepdist.config import ConfigError

RATE = 16000


class FasterWhisper:
    """`folder` is a local folder (model.bin, config.json, tokenizer.json, vocabulary) or a name such as base.en."""

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
            raise ConfigError(
                f"recogniser faster_whisper: {error}; run: pip install 'sepdist[whisper]'"
            ) from error
        try:
            self.model = WhisperModel(
                folder, device=device, compute_type=compute_type, cpu_threads=num_threads
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"recogniser.folder={folder}: neither a local folder with a CTranslate2 Whisper model nor one that the "
                f"hub gives here ({' '.join(str(error).split())[:200]}). Pass a folder that holds model.bin, "
                "config.json, tokenizer.json and vocabulary.json"
            ) from error
        self.beam_size, self.language = beam_size, language

    def __call__(self, wave_T: np.ndarray, sample_rate: int) -> str:
        """What is said in a wave, with Whisper's capitals and punctuation."""
        segments, _ = self.model.transcribe(
            audio.resample(wave_T, sample_rate, RATE),
            language=self.language,
            beam_size=self.beam_size,
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,
        )
        return " ".join(segment.text.strip() for segment in segments)
