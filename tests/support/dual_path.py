"""Folding into overlapping chunks, the slow textbook way."""

import torch.nn.functional as F
from torch import Tensor


def unfolded(frames: Tensor, chunk_size: int) -> Tensor:
    """[B, N, F] -> [B, C, K, F] by torch's unfold: a chunk of padding, half a chunk of stride."""
    columns = F.unfold(
        frames.mT[..., None], (chunk_size, 1), padding=(chunk_size, 0), stride=(chunk_size // 2, 1)
    )
    return columns.unflatten(1, (-1, chunk_size)).permute(0, 3, 2, 1)


def folded(chunks: Tensor, num_frames: int) -> Tensor:
    """The overlap-add of `unfolded`'s chunks by torch's fold."""
    size = chunks.shape[2]
    columns = chunks.permute(0, 3, 2, 1).flatten(1, 2)
    return F.fold(columns, (num_frames, 1), (size, 1), padding=(size, 0), stride=(size // 2, 1))[
        ..., 0
    ].mT
