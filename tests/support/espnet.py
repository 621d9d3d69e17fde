"""ESPnet's TF-Locoformer and TF-GridNet under our weights, and weights that need no generator."""

from typing import Any

import torch
from torch import Tensor, nn


def formula_weights(model: Any) -> Any:
    """The model with weights by a formula, the same in every version of torch."""
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            places = torch.arange(parameter.numel(), dtype=torch.float64)
            wave = torch.cos(0.37 * (index + 1) * places)
            middle = 1.0 if "norm" in name or name.endswith(("gain", "slopes")) else 0.0
            parameter.copy_((middle + 0.2 * wave).view_as(parameter))
    return model


def formula_mixture(num_samples: int) -> Tensor:
    """Two mixtures [2, T] of sines."""
    time = torch.arange(num_samples, dtype=torch.float64)
    waves = [(0.11 * time).sin() + (0.031 * time).cos(), (0.4 * time).sin() + (1.3 * time).cos()]
    return torch.stack(waves).float()


def espnet_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state_dict under ESPnet's names and shapes."""
    theirs = {}
    for name, value in state.items():
        kind, rest = name.split(".", 1)
        if kind == "spectra":
            new = rest.replace("norm.", "conv.1.") if rest[0] == "n" else rest
            theirs[new.replace("conv.", "conv.0.") if rest.startswith("conv.") else new] = value
            continue
        index, rest = rest.split(".", 1)
        if "blocks.0.query.gain" in state:
            new, value = _grid(rest, value)
        else:  # ours are along the bins and along the frames in turns
            new, value = _locoformer(rest, value)
            new = f"{('freq_path', 'frame_path')[int(index) % 2]}.{new}"
            index = str(int(index) // 2)
        theirs[f"blocks.{index}.{new}"] = value
    return theirs


def _locoformer(rest: str, value: Tensor) -> tuple[str, Tensor]:
    names = {
        "norms.0.gain": "ffn_norm.1.gamma",
        "norms.1.gain": "attn_norm.gamma",
        "norms.2.gain": "ffn_norm.0.gamma",
        "attention.qkv.weight": "attn.qkv.weight",
        "attention.out.weight": "attn.aggregate_heads.0.weight",
    }
    if rest not in names:  # the second feed-forward network is the first of ESPnet's list
        part, conv, last = rest.split(".")
        place, layer = {"before": 1, "after": 0}[part], {"up": "conv1d", "down": "deconv1d"}[conv]
        names[rest] = f"ffn.{place}.{layer}.{last}"
        value = value.squeeze(2) if last == "weight" else value
    return names[rest], value


def _grid(rest: str, value: Tensor) -> tuple[str, Tensor]:
    part, rest = rest.split(".", 1)
    if part in ("bins", "frames"):
        path = {"bins": "intra", "frames": "inter"}[part]
        return f"{path}_" + rest.replace("lstm", "rnn").replace("deconv", "linear"), value
    if rest == "linear.weight":
        value = value[..., None, None]
    if rest in ("gain", "shift"):  # [H, 1, Q, E] to [H, E, 1, Q]
        value = value.permute(0, 3, 1, 2)
    last = {"gain": "gamma", "shift": "beta", "slopes": "act.weight"}
    if part == "out":
        last |= {"slopes": "weight"}
        place = {"linear": 0, "slopes": 1}.get(rest.split(".")[0], 2)
        return f"attn_concat_proj.{place}.{last.get(rest, rest.split('.')[-1])}", value
    letter = part[0].upper()
    if rest.startswith("linear"):
        return f"attn_conv_{letter}.{rest.split('.')[1]}", value
    value = value[None] if rest != "slopes" else value
    return f"attn_norm_{letter}.{last[rest]}", value


class ESPnet(nn.Module):
    """[B, T] -> [B, S, T] by ESPnet's module with the weights of ours; ImportError without it."""

    def __init__(self, ours: Any, sizes: dict[str, Any]) -> None:
        super().__init__()
        size, stride = ours.spectra.fft_size, ours.spectra.stride
        speakers = ours.spectra.deconv.out_channels // 2
        self.is_grid = "blocks.0.query.gain" in ours.state_dict()
        if self.is_grid:
            from espnet2.enh.separator.tfgridnetv2_separator import TFGridNetV2 as Peer

            sizes = sizes | {"n_srcs": speakers, "n_fft": size, "stride": stride}
            sizes["use_builtin_complex"] = True
        else:
            from espnet2.enh.separator.tflocoformer_separator import TFLocoformerSeparator as Peer
        from espnet2.enh.decoder.stft_decoder import STFTDecoder
        from espnet2.enh.encoder.stft_encoder import STFTEncoder

        self.encoder, self.decoder = (
            kind(size, size, stride) for kind in (STFTEncoder, STFTDecoder)
        )
        self.peer = Peer(None, **sizes)
        frequencies = {k: v for k, v in self.peer.state_dict().items() if "rope" in k}
        self.peer.load_state_dict(espnet_weights(ours.state_dict()) | frequencies)

    def forward(self, mixture_BT: Tensor) -> Tensor:
        lengths = torch.full((len(mixture_BT),), mixture_BT.shape[1])
        if self.is_grid:
            return torch.stack(self.peer(mixture_BT, lengths)[0], 1)
        scale = mixture_BT.std(1, keepdim=True)  # as its recipes' normalize_variance does
        spectra = self.peer(self.encoder(mixture_BT / scale, lengths)[0], lengths)[0]
        waves = [self.decoder(spectrum, lengths)[0] for spectrum in spectra]
        return torch.stack(waves, 1) * scale[:, None]
