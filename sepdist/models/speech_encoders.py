"""Pre-trained speech encoders behind one interface: waveforms [B, T] at 16 kHz in, features [B, N, F] out.

wav2vec 2.0, HuBERT, WavLM and Whisper's encoder, by the package `transformers`, which is imported here alone and only
when an encoder is built. Weights come from a local folder or the model hub, or are random ones of a config. Whatever
draws from global generators in training is off (LayerDrop, SpecAugment); ordinary dropout is as the config says.

An encoder has `num_features`, `min_samples`, `max_samples` (None: any number), `convolutions` (its front end) and
`blocks` (what gradient checkpointing recomputes). It takes waveforms of variance 1, and passes gradients on to them.

Shapes: B batch, T samples, N frames, F features, M mel bands.
"""

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
# LayerDrop and SpecAugment draw from the global generators of torch and numpy, in transformers' own order.
OFF = {
    "layerdrop": 0.0,
    "encoder_layerdrop": 0.0,
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "add_adapter": False,
}
# Of a stored config: where it was read, and what is no part of the encoder.
LEFT_OUT = {
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "id2label",
    "label2id",
}

MEL_WINDOW, MEL_HOP = 400, 160
SPEECH_LEVEL = (
    0.06  # RMS of speech as it is recorded: what Whisper, which normalises no level, has seen
)
HALF_WIDTH, KAISER_BETA = 32, 8.0  # of the up-sampling filter, in input samples


def speech_encoder(
    pretrained: str | None = None,
    encoder: Mapping[str, Any] | None = None,
    *,
    num_layers: int | None = None,
    freeze: str = "none",
    gradient_checkpointing: bool = False,
) -> tuple["WaveEncoder | MelEncoder", dict[str, Any]]:
    """The encoder, and the config from which it can be built again, with random weights, without `pretrained`.

    `encoder` holds `model_type` and values of that family's config, over those of `pretrained`, or over the defaults
    (the base size). `num_layers` keeps the first so many Transformer layers. `freeze` is none, convolutions or encoder.

    Raises:
        ValueError: what is asked for does not exist, or cannot be read.
    """
    config = _config(pretrained, encoder or {}, num_layers)
    family = config.model_type
    kind = getattr(
        importlib.import_module(f"transformers.models.{family}.modeling_{family}"), FAMILIES[family]
    )
    network = _read(pretrained, _weights_of(kind, config)) if pretrained else kind(config)
    built: WaveEncoder | MelEncoder = (
        MelEncoder(network) if family == "whisper" else WaveEncoder(network)
    )
    if freeze not in ("none", "convolutions", "encoder"):
        raise ValueError(f"freeze={freeze!r}: choose none, convolutions or encoder")
    if freeze != "none":
        for module in built.convolutions() if freeze == "convolutions" else [built]:
            module.requires_grad_(False)
    if gradient_checkpointing:
        for block in (
            built.blocks()
        ):  # transformers' own switch does nothing in eval mode, where a judge is used
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return built, {name: value for name, value in config.to_dict().items() if name not in LEFT_OUT}


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError("speech encoders need transformers: pip install sepdist[ssl]") from error
    return transformers


def _config(pretrained: str | None, encoder: Mapping[str, Any], num_layers: int | None) -> Any:
    """The config object that `speech_encoder` describes, with everything in OFF off."""
    auto = _transformers().AutoConfig
    stored = _read(pretrained, auto.from_pretrained).to_dict() if pretrained else {}
    family = encoder.get("model_type", stored.get("model_type"))
    if family not in FAMILIES or stored.get("model_type", family) != family:
        there = (
            f"{pretrained} is a {stored['model_type']}"
            if pretrained
            else "give model.pretrained, or this one of"
        )
        raise ValueError(
            f"model.encoder.model_type={family}: {there}; the encoders are {', '.join(FAMILIES)}"
        )
    default = auto.for_model(family)
    unknown = sorted(name for name in encoder if not hasattr(default, name))
    if unknown:
        raise ValueError(f"model.encoder: a {family} has no {', '.join(unknown)}")
    switched_on = [name for name, value in OFF.items() if encoder.get(name, value) != value]
    if switched_on:
        raise ValueError(
            f"model.encoder.{switched_on[0]}={encoder[switched_on[0]]}: stays {OFF[switched_on[0]]} here"
        )
    values = stored | dict(encoder) | OFF
    known = {
        name: value
        for name, value in values.items()
        if hasattr(default, name) and name not in LEFT_OUT
    }
    config = auto.for_model(**known | {"model_type": family})
    if num_layers is not None:
        if not 1 <= num_layers <= config.num_hidden_layers:
            raise ValueError(
                f"num_layers={num_layers}: this {family} has 1 to {config.num_hidden_layers}"
            )
        config.num_hidden_layers = num_layers
    return config


def _weights_of(kind: Any, config: Any) -> Callable[[str], nn.Module]:
    """What loads a model of class `kind` from a folder or hub id; no parameter may be missing there."""

    def load(source: str) -> nn.Module:
        # Of a whole Whisper only the encoder is read; the others know their own prefix.
        prefix = {r"^(model\.)?encoder\.": ""} if config.model_type == "whisper" else None
        model, found = kind.from_pretrained(
            source, config=config, dtype=torch.float32, key_mapping=prefix, output_loading_info=True
        )
        if found["missing_keys"]:
            missing = sorted(found["missing_keys"])
            raise ValueError(
                f"its weights lack {missing[0]} and {len(missing) - 1} more of a {kind.__name__}"
            )
        return model

    return load


def _read(pretrained: str, load: Callable[[str], Any]) -> Any:
    """What `load` makes of `pretrained`, without its progress bars and reports, any failure as one error."""
    try:
        with _quiet():
            return load(pretrained)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.pretrained={pretrained}: no such folder with an encoder here, nor could the model hub give it "
            f"({str(error).splitlines()[0]}); set model.pretrained to a local folder that holds the config.json and "
            "the model.safetensors of such a model, on every machine of the run"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    logs = _transformers().utils.logging
    verbosity, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
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
        for kernel, stride in zip(
            model.config.conv_kernel[::-1], model.config.conv_stride[::-1], strict=True
        ):
            self.min_samples = (self.min_samples - 1) * stride + kernel
        # In training it would switch on the gradient of its input, which fails where that is no leaf.
        model.feature_extractor._requires_grad = False

    def convolutions(self) -> list[nn.Module]:
        """The front end."""
        return [self.model.feature_extractor]

    def blocks(self) -> list[nn.Module]:
        """Convolutions and Transformer layers."""
        return [*self.model.feature_extractor.conv_layers, *self.model.encoder.layers]

    def forward(self, wave_BT: Tensor) -> Tensor:
        """The last layer's features."""
        return self.model(wave_BT).last_hidden_state


class MelEncoder(nn.Module):
    """Whisper's encoder: 50 frames a second of up to 30 s, with positions for as many frames as there are."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.num_features = model.config.d_model
        self.min_samples = MEL_WINDOW
        self.max_samples: int | None = model.config.max_source_positions * 2 * MEL_HOP

    def convolutions(self) -> list[nn.Module]:
        """The front end."""
        return [self.model.conv1, self.model.conv2]

    def blocks(self) -> list[nn.Module]:
        """Transformer layers."""
        return list(self.model.layers)

    def forward(self, wave_BT: Tensor) -> Tensor:
        """The normalised features of the last layer; transformers' own forward takes 30 s, no less."""
        model = self.model
        x = F.gelu(model.conv1(log_mel(SPEECH_LEVEL * wave_BT, model.config.num_mel_bins)))
        x = F.gelu(model.conv2(x)).transpose(1, 2)
        x = x + model.embed_positions(torch.arange(x.shape[1], device=x.device))
        x = F.dropout(x, model.config.dropout, self.training)
        for layer in model.layers:
            x = layer(x, None)
        return model.layer_norm(x)


def log_mel(wave_BT: Tensor, num_bands: int) -> Tensor:
    """Whisper's input [B, M, T // 160] of a waveform at 16 kHz: fp32, differentiable."""
    with torch.autocast(wave_BT.device.type, enabled=False):
        wave_BT = wave_BT.float()
        window = torch.hann_window(MEL_WINDOW, device=wave_BT.device)
        spectrum = torch.stft(wave_BT, MEL_WINDOW, MEL_HOP, window=window, return_complex=True)[
            ..., :-1
        ]
        power = torch.view_as_real(spectrum).square().sum(-1)  # abs() has no gradient at zero
        levels = (_mel_filters(num_bands).to(power) @ power).clamp_min(1e-10).log10()
        return (levels.maximum(levels.amax((1, 2), keepdim=True) - 8) + 4) / 4


@functools.cache
def _mel_filters(num_bands: int) -> Tensor:
    """[M, 201], triangles of equal area on Slaney's scale up to 8 kHz."""
    make = importlib.import_module("transformers.audio_utils").mel_filter_bank
    filters = make(
        1 + MEL_WINDOW // 2, num_bands, 0.0, 8000.0, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
    )
    return torch.from_numpy(filters.T.copy())


def upsample(wave: Tensor, factor: int) -> Tensor:
    """[..., T] -> [..., T * factor]: the band-limited signal in between the samples, which stay; differentiable.

    A sinc under a Kaiser window: flat to 92 % of the input's Nyquist frequency, images 80 dB down beyond 108 %.
    """
    if factor == 1:
        return wave
    taps = _sinc_taps(factor).to(wave)
    phases = F.conv1d(wave.reshape(-1, 1, wave.shape[-1]), taps, padding=HALF_WIDTH)
    return phases.transpose(1, 2).reshape(*wave.shape[:-1], -1)


@functools.cache
def _sinc_taps(factor: int) -> Tensor:
    """[factor, 1, taps]: row p gives the values p / factor after each sample."""
    after = torch.arange(factor, dtype=torch.float64)[:, None] / factor
    distance = after + HALF_WIDTH - torch.arange(2 * HALF_WIDTH + 1)
    inside = (1 - (distance / (HALF_WIDTH + 1)).square()).sqrt()
    taps = torch.sinc(distance) * torch.special.i0(KAISER_BETA * inside)
    return (taps / taps.sum(1, keepdim=True)).unsqueeze(1)
