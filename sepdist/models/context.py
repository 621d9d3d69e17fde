"""Context network over a separator's features, for contrastive pre-training (CC).

Paper 1, section 3.1, as in wav2vec 2.0 (Baevski et al. 2020, section 2): the separator's features
are downsampled, some frames are hidden, and a Transformer predicts them. The next stage takes over
only the separator (`init.submodule=separator`).

Shapes: B batch, T samples, N downsampled frames, F target features, H hidden features.
"""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from sepdist.models.frames import check_counts, num_frames


class ContextModel(nn.Module):
    """A separator with a context network; without frames to hide it is the separator.

    `separator` has `features(mixture_BT)`, [B, frames, num_features], `kernel_size` and `stride`.
    """

    parts: ClassVar = {"separator": "model"}
    separator: Any

    def __init__(
        self,
        separator: Any,
        num_targets: int = 2048,
        kernel_size: int = 129,
        stride: int = 4,
        num_groups: int = 16,
        num_hidden: int = 768,
        num_heads: int = 12,
        num_feedforward: int = 3072,
        num_layers: int = 6,
        num_position_taps: int = 129,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not hasattr(separator, "features"):
            raise ValueError(f"{type(separator).__name__} has no features for a context network")
        if getattr(separator, "padding", "end") != "end":
            raise ValueError(f"separator.padding={separator.padding!r}: choose end under a context")
        check_counts(locals())
        for name, size in (("kernel_size", kernel_size), ("num_position_taps", num_position_taps)):
            if size % 2 == 0:
                raise ValueError(f"{name}={size}: must be odd, so that frames keep their places")
        self.min_length = separator.min_length
        self.num_layers, self.stride = num_layers, stride
        self.separator = separator
        sizes = (separator.num_features, num_targets, kernel_size, stride, kernel_size // 2)
        self.down = nn.Conv1d(*sizes, groups=num_groups)
        self.project = nn.Linear(num_targets, num_hidden)
        sizes = (num_hidden, num_hidden, num_position_taps, 1, num_position_taps // 2)
        self.position = nn.Conv1d(*sizes, groups=num_groups)
        self.norm = nn.LayerNorm(num_hidden)
        self.dropout = nn.Dropout(dropout)
        # All layers share their weights: one module, applied `num_layers` times.
        self.layer = TransformerLayer(num_hidden, num_heads, num_feedforward, dropout)
        self.head = nn.Linear(num_hidden, num_targets)

    def num_frames(self, num_samples: int) -> int:
        """Number N of the context network's frames for `num_samples`."""
        frames = num_frames(num_samples, self.separator.kernel_size, self.separator.stride)
        return (frames - 1) // self.stride + 1

    def forward(
        self, mixture_BT: Tensor, hidden_BN: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The separator's estimates or, with hidden frames (bool), true and predicted [B, N, F]."""
        if hidden_BN is None:
            return self.separator(mixture_BT)
        targets_BNF = self.down(self.separator.features(mixture_BT).transpose(1, 2)).transpose(1, 2)
        x_BNH = self.project(targets_BNF.masked_fill(hidden_BN.unsqueeze(-1), 0.0))
        places_BNH = self.position(x_BNH.transpose(1, 2)).transpose(1, 2)
        x_BNH = self.dropout(self.norm(x_BNH + F.gelu(places_BNH)))
        for _ in range(self.num_layers):
            x_BNH = self.layer(x_BNH)
        return targets_BNF, self.head(x_BNH)


class TransformerLayer(nn.Module):
    """Post-norm Transformer layer: attention and two linear layers, [B, N, H] -> [B, N, H]."""

    def __init__(
        self, num_hidden: int, num_heads: int, num_feedforward: int, dropout: float
    ) -> None:
        super().__init__()
        if num_hidden % num_heads:
            raise ValueError(f"num_hidden={num_hidden} does not divide into num_heads={num_heads}")
        self.num_heads = num_heads
        self.attend = nn.Linear(num_hidden, 3 * num_hidden)
        self.join = nn.Linear(num_hidden, num_hidden)
        self.norm1, self.norm2 = nn.LayerNorm(num_hidden), nn.LayerNorm(num_hidden)
        self.expand = nn.Linear(num_hidden, num_feedforward)
        self.contract = nn.Linear(num_feedforward, num_hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BNH: Tensor) -> Tensor:
        """Attend along N."""
        qkv = self.attend(x_BNH).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        rate = self.dropout.p if self.training else 0.0
        heads = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], dropout_p=rate)
        x_BNH = self.norm1(x_BNH + self.dropout(self.join(heads.transpose(1, 2).flatten(2))))
        return self.norm2(x_BNH + self.dropout(self.contract(F.gelu(self.expand(x_BNH)))))
