"""A tiny SI-SNR estimator and its stored export."""

from pathlib import Path
from typing import Any

import torch
import transformers

WAVE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}


MEL: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
}


TINY = {family: {"model_type": family} | WAVE for family in ("wav2vec2", "hubert", "wavlm")}

TINY["whisper"] = {"model_type": "whisper"} | MEL


WHOLE = {  # like published checkpoints: with a head or a decoder, and in half precision
    "wav2vec2": "Wav2Vec2ForPreTraining",
    "hubert": "HubertForCTC",
    "wavlm": "WavLMModel",
    "whisper": "WhisperForConditionalGeneration",
}


REST = {"codevector_dim": 16, "proj_codevector_dim": 16, "vocab_size": 10}

DECODER = {
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 16,
    "vocab_size": 10,
}


def stored(family: str, folder: Path) -> str:
    """A folder like a model hub's download, with random weights."""
    torch.manual_seed(1)
    values = TINY[family] | (
        DECODER | {"begin_suppress_tokens": None} if family == "whisper" else REST
    )
    model = getattr(transformers, WHOLE[family])(transformers.AutoConfig.for_model(**values))
    model.half().save_pretrained(folder)
    return str(folder)
