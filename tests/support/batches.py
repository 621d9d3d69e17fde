"""Small batches and models for the tests of objectives."""

import torch
from torch import Tensor, nn

from sepdist.data.records import Batch


def batch_of(sources: Tensor, noise: Tensor | None = None) -> Batch:
    """Make a batch of sources [B, S, T] (and noise [B, T]) as the stream does."""
    count, _, length = sources.shape
    mixture = sources.sum(1) if noise is None else sources.sum(1) + noise
    return Batch(
        ids=[f"utterance{i}" for i in range(count)],
        positions=torch.arange(count),
        mixture=mixture,
        sources=sources,
        noise=noise,
        lengths=torch.full((count,), length),
    )


def values(metric: Tensor) -> Tensor:
    """The values of a metric, of those items that have one."""
    return metric[0, metric[1] > 0] if metric.ndim == 2 else metric


class Fixed(nn.Module):
    """A model whose output is its parameters."""

    def __init__(self, estimates: Tensor) -> None:
        super().__init__()
        self.estimates = nn.Parameter(estimates.clone())

    def forward(self, mixture_BT: Tensor) -> Tensor:
        return self.estimates


class Listener(nn.Module):
    """A small SI-SNR estimator, the same for any `url`, with dropout that must never be active."""

    estimates_si_snr = True

    def __init__(self, url: str = "") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.conv = nn.Conv1d(2, 4, 8, stride=4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 1)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)

    def forward(self, mixture_BT: Tensor, estimates_BST: Tensor) -> Tensor:
        pairs = torch.stack([mixture_BT[:, None].expand_as(estimates_BST), estimates_BST], 2)
        hidden = self.drop(torch.tanh(self.conv(pairs.flatten(0, 1)))).mean(2)
        return self.head(hidden).view(estimates_BST.shape[:2])


def voices(num_items: int, num_sources: int, num_samples: int, seed: int = 0) -> Tensor:
    """Sum harmonics with slow envelopes to sources [B, S, T], each in its own range of pitch."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(num_samples) / 8000
    sources = torch.zeros(num_items, num_sources, num_samples)
    for item in range(num_items):
        for source in range(num_sources):
            pitch = 100 * 1.7**source * (1 + 0.1 * torch.rand(1, generator=generator))
            phase = 6.28 * torch.rand(1, generator=generator)
            envelope = 0.6 + 0.4 * torch.sin(2 * torch.pi * 3 * t + phase)
            harmonics = sum(torch.sin(2 * torch.pi * k * pitch * t) / k for k in range(1, 8))
            sources[item, source] = 0.1 * envelope * harmonics
    return sources
