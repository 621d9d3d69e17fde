"""A recogniser: any CTC model of `transformers` (wav2vec 2.0, HuBERT, WavLM, ...); a wave in, its text out.

Greedy decoding: the likeliest token of every frame, repeats merged, blanks dropped; no language model. Needs the extra
`asr`. Weights come from a folder, or from the hub by an id such as facebook/wav2vec2-base-960h.

Shapes: T samples, N frames.
"""

import numpy as np
import torch

from sepdist import audio
from sepdist.config import ConfigError

RATE = 16000  # what these models are trained on


class TransformersCtc:
    """`folder` is a local folder (config.json, weights, preprocessor and tokenizer) or a hub id."""

    def __init__(self, folder: str, device: str = "cpu") -> None:
        try:
            from transformers import AutoFeatureExtractor, AutoModelForCTC, AutoTokenizer
            from transformers.utils.logging import disable_progress_bar
        except ImportError as error:
            raise ConfigError(
                f"recogniser transformers_ctc: {error}; run: pip install 'sepdist[asr]'"
            ) from error
        disable_progress_bar()  # of loading weights, in the midst of ours
        try:
            # One by one, because a processor with a language model would want another package for it.
            self.extractor = AutoFeatureExtractor.from_pretrained(folder)
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            self.model = AutoModelForCTC.from_pretrained(folder).to(device).eval()
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"recogniser.folder={folder}: neither a local folder with a CTC model nor one that the hub gives here "
                f"({' '.join(str(error).split())[:200]}). Save one where there is a network, with save_pretrained of "
                "its model and its processor, and pass that folder as recogniser.folder"
            ) from error
        self.device = device

    def __call__(self, wave_T: np.ndarray, sample_rate: int) -> str:
        """What is said in a wave, as the model spells it."""
        wave = audio.resample(wave_T, sample_rate, RATE)
        inputs = self.extractor(wave, sampling_rate=RATE, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            tokens_N = self.model(**inputs).logits[0].argmax(-1)
        return str(self.tokenizer.decode(tokens_N.tolist()))
