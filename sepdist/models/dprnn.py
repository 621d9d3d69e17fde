"""DPRNN: separates a mixture [B, T] into one waveform per speaker [B, S, T] with bi-LSTMs.

Luo, Chen and Yoshioka, "Dual-path RNN: efficient long sequence modeling for time-domain
single-channel speech separation", 2020. The defaults are the size of paper 1's experiments, with a
bottleneck of 128 features (the original has 64) and ReLU masks: 3,651,073 parameters for two
speakers. Tensors inside are channels-last (dual_path.py).

Shapes: B batch, S speakers, T samples, N frames, C chunks, K frames of a chunk, F features.
"""

from torch import Tensor, nn

from sepdist.models import frames
from sepdist.models.compiling import compiled_on_gpu
from sepdist.models.dual_path import Gate, GlobalNorm, merge, run_lstm, segment, split, swapped


class PathRNN(nn.Module):
    """Bi-LSTM, linear layer, gLN over the whole item, residual (section 2.2).

    [B, R, L, F] -> [B, R, L, F]: R sequences of L steps, which meet only in the norm.
    """

    def __init__(self, num_features: int, num_hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(num_features, num_hidden, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(2 * num_hidden, num_features)
        self.norm = GlobalNorm(num_features)

    def forward(self, x_BRLF: Tensor) -> Tensor:
        """Run along L."""
        return self._residual(x_BRLF, run_lstm(self.lstm, x_BRLF.flatten(0, 1)))

    @compiled_on_gpu
    def _residual(self, x_BRLF: Tensor, hidden: Tensor) -> Tensor:
        return x_BRLF + self.norm(self.linear(hidden).view_as(x_BRLF))


class DPRNN(nn.Module):
    """Encoder, bi-LSTMs within and across chunks that mask the encoded frames, decoder."""

    # Prefixes of the parameters that belong to particular speakers, which a new task starts afresh.
    output_parameters: tuple[str, ...] = ("mask_conv",)

    def __init__(
        self,
        num_speakers: int = 2,
        num_filters: int = 64,
        kernel_size: int = 2,
        stride: int = 1,
        num_bottleneck: int = 128,
        num_hidden: int = 128,
        chunk_size: int = 250,
        num_repeats: int = 6,
        padding: str = "end",
        mask_activation: str = "relu",
    ) -> None:
        super().__init__()
        frames.check_counts(locals())
        frames.check_sizes(kernel_size, stride, chunk_size)
        frames.check_variant(padding, mask_activation)
        self.padding, self.mask_activation = padding, mask_activation
        self.num_speakers, self.chunk_size = num_speakers, chunk_size
        self.min_length, self.stride = kernel_size, stride
        self.encoder = nn.Linear(kernel_size, num_filters, bias=False)
        self.norm = GlobalNorm(num_filters)
        self.bottleneck = nn.Linear(num_filters, num_bottleneck)
        sizes = (num_bottleneck, num_hidden)
        self.intra = nn.ModuleList(PathRNN(*sizes) for _ in range(num_repeats))
        self.inter = nn.ModuleList(PathRNN(*sizes) for _ in range(num_repeats))
        self.prelu = nn.PReLU()
        self.mask_conv = nn.Linear(num_bottleneck, num_speakers * num_bottleneck)
        self.gate = Gate(num_bottleneck)
        self.mask = nn.Linear(num_bottleneck, num_filters, bias=False)
        self.decoder = nn.Linear(num_filters, kernel_size, bias=False)
        frames.init_filterbank(self.encoder, self.decoder)

    def forward(self, mixture_BT: Tensor) -> Tensor:
        """Estimates [B, S, T] of the speakers, in no particular order."""
        encoded_BNF = frames.encode(mixture_BT, self.encoder, self.stride, self.padding)
        x = segment(self.bottleneck(self.norm(encoded_BNF)), self.chunk_size)
        for intra, inter in zip(self.intra, self.inter, strict=True):
            x = swapped(inter(swapped(intra(x))))
        merged = merge(self.prelu(x), encoded_BNF.shape[1])
        y_BNSF = split(merged, self.mask_conv, self.num_speakers)
        masks_BNSF = frames.MASKS[self.mask_activation](self.mask(self.gate(y_BNSF)))
        masked_BNSF = masks_BNSF * encoded_BNF.unsqueeze(2)
        return frames.decode(
            masked_BNSF, self.decoder, self.stride, mixture_BT.shape[1], self.padding
        )
