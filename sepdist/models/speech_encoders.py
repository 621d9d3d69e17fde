"""Pre-trained speech encoders behind one interface: 16 kHz waveforms [B, T] to features [B, N, F].

wav2vec 2.0, HuBERT, WavLM and Whisper's encoder, from the package `transformers`, imported when an
encoder is built. Weights come from a local folder or the model hub, or are random. Whatever draws
from global generators in training is off (LayerDrop, SpecAugment); ordinary dropout follows the
config.

An encoder has `num_features`, `min_samples`, `max_samples` (None: no limit), `convolutions` (its
front end) and `blocks` (recomputed by gradient checkpointing). It takes waveforms of variance 1 and
is differentiable with respect to them.

Shapes: B batch, T samples, N frames, F features, M mel bands.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SAMPLE_RATE = 16000
FAMILIES = {
    "wav2vec2": "Wav2Vec2Model",
    "hubert": "HubertModel",
    "wavlm": "WavLMModel",
    "whisper": "WhisperEncoder",
}
# LayerDrop and SpecAugment draw from the global generators of torch and numpy; an adapter changes
# the frame rate.
OFF = {
    "layerdrop": 0.0,
    "encoder_layerdrop": 0.0,
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "add_adapter": False,
}
# Entries of a stored config that record its origin or do not concern the encoder.
LEFT_OUT = {"_name_or_path", "architectures", "transformers_version", "id2label", "label2id"}
LEFT_OUT |= {"dtype", "torch_dtype"}
MEL_WINDOW, MEL_HOP = 400, 160
SPEECH_LEVEL = 0.06  # the RMS of speech as it is usually recorded; Whisper normalises no levels
HALF_WIDTH, KAISER_BETA = 32, 8.0  # of the upsampling filter, in input samples


def speech_encoder(
    pretrained: str | None = None,
    encoder: Mapping[str, Any] | None = None,
    num_layers: int | None = None,
    freeze: str = "none",
    gradient_checkpointing: bool = False,
) -> tuple["WaveEncoder | MelEncoder", dict[str, Any]]:
    """The encoder, and a config that rebuilds it with random weights, without `pretrained`.

    `encoder` holds `model_type` and values of that family's config, which override those of
    `pretrained` or the defaults (the base size). `num_layers` keeps the first Transformer layers
    only. `freeze` is none, convolutions or encoder. ValueError if `pretrained` cannot be read.
    """
    if freeze not in ("none", "convolutions", "encoder"):
        raise ValueError(f"freeze={freeze!r}: choose none, convolutions or encoder")
    config = _config(pretrained, encoder or {}, num_layers)
    family = config.model_type
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    kind = getattr(module, FAMILIES[family])
    load = functools.partial(_load_weights, kind=kind, config=config)
    network = _read(pretrained, load) if pretrained else kind(config)
    built = MelEncoder(network) if family == "whisper" else WaveEncoder(network)
    for frozen in {"none": [], "convolutions": built.convolutions, "encoder": [built]}[freeze]:
        frozen.requires_grad_(False)
    if gradient_checkpointing:
        # The switch of transformers does nothing in eval mode, in which objectives use estimators.
        for block in built.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return built, {name: value for name, value in config.to_dict().items() if name not in LEFT_OUT}


def _config(pretrained: str | None, encoder: Mapping[str, Any], num_layers: int | None) -> Any:
    """The config object for `speech_encoder`'s arguments, with everything in OFF off."""
    try:
        from transformers import AutoConfig
    except ImportError as error:
        todo = "run: pip install transformers (the extra `ssl` has it)"
        raise ValueError(f"speech encoders need transformers; {todo}") from error
    stored = _read(pretrained, AutoConfig.from_pretrained).to_dict() if pretrained else {}
    family = encoder.get("model_type", stored.get("model_type"))
    if family not in list(FAMILIES) or stored.get("model_type", family) != family:
        reason = "give model.pretrained, or this one of"
        if pretrained:
            reason = f"{pretrained} is a {stored['model_type']}"
        raise ValueError(
            f"model.encoder.model_type={family}: {reason}; the encoders are {', '.join(FAMILIES)}"
        )
    default = AutoConfig.for_model(family)
    # Not every attribute: `_attn_implementation` may name code on the hub, which would be run.
    settable = {*default.to_dict(), *default.attribute_map} - LEFT_OUT
    unknown = sorted(name for name in encoder if name not in settable | LEFT_OUT)
    if unknown:
        raise ValueError(f"model.encoder: a {family} has no {', '.join(unknown)}")
    for name, value in OFF.items():
        if encoder.get(name, value) != value:
            raise ValueError(f"model.encoder.{name}={encoder[name]}: must stay {value} here")
    values = stored | dict(encoder) | OFF
    known = {name: value for name, value in values.items() if name in settable}
    try:
        config = AutoConfig.for_model(**known)
    except Exception as error:  # transformers has errors of its own for values that do not fit
        raise ValueError(f"model.encoder: {' '.join(str(error).split())}") from error
    if num_layers is not None:
        if not 1 <= num_layers <= config.num_hidden_layers:
            raise ValueError(
                f"num_layers={num_layers}: this {family} has 1 to {config.num_hidden_layers}"
            )
        config.num_hidden_layers = num_layers
    return config


def _load_weights(source: str, kind: Any, config: Any) -> nn.Module:
    """A model of class `kind` from a folder or hub id that has all its parameters."""
    # Only the encoder of a whole Whisper is read; the other families know their own prefix.
    prefix = {r"^(model\.)?encoder\.": ""} if config.model_type == "whisper" else None
    model, found = kind.from_pretrained(
        source, config=config, dtype=torch.float32, key_mapping=prefix, output_loading_info=True
    )
    if found["missing_keys"]:
        first, *others = sorted(found["missing_keys"])
        raise ValueError(f"its weights lack {first} and {len(others)} more of a {kind.__name__}")
    return model


def _read(pretrained: str, load: Callable[[str], Any]) -> Any:
    """`load(pretrained)` without progress bars and reports; every failure is one ValueError."""
    from transformers.utils import logging as logs

    verbosity, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        return load(pretrained)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.pretrained={pretrained}: not a local folder with an encoder, and not available"
            f" from the model hub ({str(error).splitlines()[0]}); set model.pretrained to a local"
            " folder that holds the config.json and the model.safetensors of such a model, on every"
            " machine of the run"
        ) from error
    finally:
        logs.set_verbosity(verbosity)
        if bars:
            logs.enable_progress_bar()


class WaveEncoder(nn.Module):
    """wav2vec 2.0, HuBERT or WavLM: 50 frames a second, any length from 25 ms up."""

    max_samples: int | None = None

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.num_features = model.config.hidden_size
        self.min_samples = 1
        convolutions = zip(model.config.conv_kernel, model.config.conv_stride, strict=True)
        for kernel, stride in reversed(list(convolutions)):
            self.min_samples = (self.min_samples - 1) * stride + kernel
        self.convolutions = [model.feature_extractor]
        self.blocks = [*model.feature_extractor.conv_layers, *model.encoder.layers]
        # In training it would require a gradient of its input, which fails unless that is a leaf.
        model.feature_extractor._requires_grad = False

    def forward(self, wave_BT: Tensor) -> Tensor:
        """Features of the last layer."""
        return self.model(wave_BT).last_hidden_state


class MelEncoder(nn.Module):
    """Whisper's encoder: 50 frames a second, up to 30 s, only as many positions as frames."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.num_features = model.config.d_model
        self.min_samples = MEL_WINDOW
        self.max_samples: int | None = model.config.max_source_positions * 2 * MEL_HOP
        self.convolutions = [model.conv1, model.conv2]
        self.blocks = list(model.layers)

    def forward(self, wave_BT: Tensor) -> Tensor:
        """Normalised features of the last layer; transformers' own forward takes 30 s only."""
        model = self.model
        x = F.gelu(model.conv1(log_mel(SPEECH_LEVEL * wave_BT, model.config.num_mel_bins)))
        x = F.gelu(model.conv2(x)).transpose(1, 2)
        x = x + model.embed_positions(torch.arange(x.shape[1], device=x.device))
        x = F.dropout(x, model.config.dropout, self.training)
        for layer in model.layers:
            x = layer(x, None)
        return model.layer_norm(x)


def log_mel(wave_BT: Tensor, num_bands: int) -> Tensor:
    """Whisper's input [B, M, T // 160] for a waveform at 16 kHz: fp32, differentiable."""
    with torch.autocast(wave_BT.device.type, enabled=False):
        wave_BT = wave_BT.float()
        window = torch.hann_window(MEL_WINDOW, device=wave_BT.device)
        spectrum = torch.stft(wave_BT, MEL_WINDOW, MEL_HOP, window=window, return_complex=True)
        # abs() has no gradient at zero.
        power = torch.view_as_real(spectrum[..., :-1]).square().sum(-1)
        filters = _mel_filters(num_bands).to(power, non_blocking=True)
        levels = (filters @ power).clamp_min(1e-10).log10()
        return (levels.maximum(levels.amax((1, 2), keepdim=True) - 8) + 4) / 4


@functools.cache
def _mel_filters(num_bands: int) -> Tensor:
    """[M, 201], triangles of equal area on Slaney's scale up to 8 kHz."""
    make = importlib.import_module("transformers.audio_utils").mel_filter_bank
    edges = (1 + MEL_WINDOW // 2, num_bands, 0.0, 8000.0, SAMPLE_RATE)
    return torch.from_numpy(make(*edges, norm="slaney", mel_scale="slaney").T.copy())


def upsample(wave: Tensor, factor: int) -> Tensor:
    """Band-limited interpolation, [..., T] -> [..., T * factor]; keeps the samples; differentiable.

    A sinc in a Kaiser window: flat to 92 % of the input's Nyquist frequency, -80 dB from 108 % on.
    """
    if factor == 1:
        return wave
    taps = _sinc_taps(factor).to(wave, non_blocking=True)
    phases = F.conv1d(wave.reshape(-1, 1, wave.shape[-1]), taps, padding=HALF_WIDTH)
    return phases.transpose(1, 2).reshape(*wave.shape[:-1], -1)


@functools.cache
def _sinc_taps(factor: int) -> Tensor:
    """[factor, 1, taps]: row p interpolates at p / factor after each sample."""
    after = torch.arange(factor, dtype=torch.float64)[:, None] / factor
    distance = after + HALF_WIDTH - torch.arange(2 * HALF_WIDTH + 1)
    inside = (1 - (distance / (HALF_WIDTH + 1)).square()).sqrt()
    taps = torch.sinc(distance) * torch.special.i0(KAISER_BETA * inside)
    return (taps / taps.sum(1, keepdim=True)).unsqueeze(1)
