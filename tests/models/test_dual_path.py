"""Chunks against torch's unfold and fold, and the norm against its formula."""

import pytest
import torch

from sepdist.models.dual_path import GlobalNorm, merge, segment
from tests.support.dual_path import folded, unfolded


@pytest.mark.parametrize("chunk_size", [2, 6, 10])
@pytest.mark.parametrize("num_frames", [1, 4, 5, 9, 10, 37, 40])
def test_chunks_are_those_of_unfold_and_merge_is_fold_to_the_bit(
    chunk_size: int, num_frames: int
) -> None:
    frames = torch.randn(2, num_frames, 3)
    chunks = segment(frames, chunk_size)
    assert torch.equal(chunks, unfolded(frames, chunk_size))
    assert chunks.shape[1] == 2 * num_frames // chunk_size + 3
    others = torch.randn_like(chunks)
    assert torch.equal(merge(others, num_frames), folded(others, num_frames))
    assert torch.equal(merge(chunks, num_frames), 2 * frames)


@pytest.mark.parametrize("shape", [(3, 7, 5), (2, 4, 6, 5), (1, 1, 5)])
def test_the_norm_and_its_gradients_are_those_of_the_formula(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm = GlobalNorm(5).double()
    torch.nn.init.normal_(norm.gain)
    torch.nn.init.normal_(norm.shift)
    x = (3 * torch.randn(shape, dtype=torch.float64) + 2).requires_grad_()
    dims = tuple(range(1, x.ndim))
    centred = x - x.mean(dims, keepdim=True)
    expected = (
        norm.gain * centred / (centred.square().mean(dims, keepdim=True) + 1e-8).sqrt() + norm.shift
    )
    got = norm(x)
    assert got.shape == x.shape and torch.allclose(got, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(x)
    wanted = [x, norm.gain, norm.shift]
    for a, b in zip(
        *(torch.autograd.grad((y * weights).sum(), wanted) for y in (got, expected)), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_the_norm_is_fp32_under_autocast_and_silence_stays_finite() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert GlobalNorm(4)(torch.zeros(2, 3, 6, 4, dtype=torch.bfloat16)).equal(
            torch.zeros(2, 3, 6, 4)
        )
