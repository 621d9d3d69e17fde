"""Recogniser: any CTC model of `transformers` (wav2vec 2.0, HuBERT, WavLM). Needs the extra `asr`.

Greedy decoding without a language model: the likeliest token of each frame, repeats merged, blanks
removed. Weights come from a folder, or from the hub by an id such as facebook/wav2vec2-base-960h.

Shapes: T samples, N frames.
"""

import numpy as np
import torch

from sepdist import audio
from sepdist.config import ConfigError

RATE = 16000  # the rate that these models are trained on


class TransformersCtc:
    """`folder` is a local folder (config.json, weights, preprocessor, tokenizer) or a hub id."""

    def __init__(self, folder: str, device: str = "cpu") -> None:
        try:
            from safetensors import SafetensorError  # of a file cut short or a Git LFS pointer
            from transformers import AutoFeatureExtractor, AutoModelForCTC, AutoTokenizer
            from transformers.utils.logging import disable_progress_bar
        except ImportError as error:
            todo = "run: pip install transformers (the extra `asr` has it)"
            raise ConfigError(f"recogniser transformers_ctc: {error}; {todo}") from error
        disable_progress_bar()  # it would break into ours
        try:
            # One by one: a processor with a language model would need another package for it.
            self.extractor = AutoFeatureExtractor.from_pretrained(folder)
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            model, report = AutoModelForCTC.from_pretrained(folder, output_loading_info=True)
            if any("head." in name for name in report["missing_keys"]):  # they would be random
                raise ValueError("its head has no weights, it was not trained to recognise")
            self.model = model.to(device).eval()
        except (OSError, ValueError, SafetensorError) as error:
            wrong = f"no CTC model here or on the hub ({' '.join(str(error).split())[:200]})"
            todo = "Where there is a network, save one with save_pretrained of its model and "
            todo += "processor, and pass that folder as recogniser.folder"
            raise ConfigError(f"recogniser.folder={folder}: {wrong}. {todo}") from error
        self.device = device

    def __call__(self, wave_T: np.ndarray, sample_rate: int) -> str:
        """Return the text in the model's spelling."""
        wave = audio.resample(wave_T, sample_rate, RATE)
        inputs = self.extractor(wave, sampling_rate=RATE, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            tokens_N = self.model(**inputs).logits[0].argmax(-1)
        return str(self.tokenizer.decode(tokens_N.tolist()))
