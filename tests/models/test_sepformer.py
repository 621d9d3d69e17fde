"""SepFormer against its equations; test_peers.py compares it with SpeechBrain's."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepdist.models.attention import sinusoids
from sepdist.models.sepformer import SepFormer, from_chunks, to_chunks
from tests.support.model_checks import (
    gradients,
    improvement_learnt,
    relative,
    shaken,
)


def small(**changes: object) -> SepFormer:
    """A model whose sizes all differ, with weights that make every term of the arithmetic count."""
    torch.manual_seed(0)
    sizes = {
        "num_filters": 24,
        "kernel_size": 8,
        "stride": 4,
        "chunk_size": 10,
        "num_heads": 3,
        "num_hidden": 40,
    }
    return shaken(
        SepFormer(**({"num_speakers": 2, "num_blocks": 2, "num_layers": 2} | sizes | changes))
    )


def textbook(model: SepFormer, mixture: Tensor) -> Tensor:
    """The network, one item at a time, channels first, with scores and softmax spelled out."""

    def whole_norm(x: Tensor, norm: nn.Module) -> Tensor:
        x = (x - x.mean()) / (x.var(correction=0) + 1e-8).sqrt()
        return norm.gain.view(-1, *[1] * (x.ndim - 1)) * x + norm.shift.view(
            -1, *[1] * (x.ndim - 1)
        )

    def transformer(sequence: Tensor, stack: nn.Module) -> Tensor:
        """[L, F] -> [L, F]."""
        places, features = sequence.shape
        num_heads = stack.layers[0].attention.num_heads
        for place in range(places):
            for i in range(0, features, 2):
                angle = torch.tensor(place, dtype=sequence.dtype) / 10000 ** (i / features)
                add = torch.zeros_like(sequence)
                add[place, i], add[place, i + 1] = angle.sin(), angle.cos()
                sequence = sequence + add
        for layer in stack.layers:
            y = layer.attention_norm(sequence)
            projections = y @ layer.attention.qkv.weight.T + layer.attention.qkv.bias
            heads = []
            for query, key, value in zip(
                *projections.unflatten(1, (3, num_heads, -1)).permute(1, 2, 0, 3), strict=True
            ):
                heads.append(torch.softmax(query @ key.T / query.shape[1] ** 0.5, dim=1) @ value)
            sequence = (
                sequence
                + torch.cat(heads, dim=1) @ layer.attention.out.weight.T
                + layer.attention.out.bias
            )
            hidden = (layer.norm(sequence) @ layer.up.weight.T + layer.up.bias).clamp_min(0)
            sequence = sequence + hidden @ layer.down.weight.T + layer.down.bias
        return F.layer_norm(
            sequence, (features,), stack.layer_norm.weight, stack.layer_norm.bias, 1e-6
        )

    def separate(signal: Tensor) -> Tensor:
        size, hop = model.chunk_size, model.chunk_size // 2
        encoded = F.conv1d(
            signal[None], model.encoder.weight[:, None], stride=model.stride
        ).clamp_min(0)
        x = model.bottleneck.weight @ whole_norm(encoded, model.norm)
        count = x.shape[1]
        behind = (
            size - (hop + count % size) % size
        )  # of zeros, as published: a whole chunk rather than none
        num_chunks = (count + behind) // hop + 1
        padded = F.pad(x, (hop, num_chunks * hop - count))
        chunks = torch.stack(
            [padded[:, c * hop : c * hop + size] for c in range(num_chunks)], dim=2
        )  # [F, K, C]
        for intra, inter in zip(model.intra, model.inter, strict=True):
            along = torch.stack(
                [transformer(chunks[:, :, c].T, intra) for c in range(num_chunks)]
            )  # [C, K, F]
            chunks = chunks + whole_norm(along.permute(2, 1, 0), intra.global_norm)
            across = torch.stack(
                [transformer(chunks[:, k].T, inter) for k in range(size)]
            )  # [K, C, F]
            chunks = chunks + whole_norm(across.permute(2, 0, 1), inter.global_norm)
        weight, bias = model.mask_conv.weight[..., None, None], model.mask_conv.bias
        masks = F.conv2d(F.prelu(chunks[None], model.prelu.weight), weight, bias)[0]
        masks = masks.unflatten(0, (model.num_speakers, -1))
        estimates = []
        for chunks in masks:
            added = torch.zeros_like(padded)
            for c in range(num_chunks):
                added[:, c * hop : c * hop + size] += chunks[:, :, c]
            y = (
                model.gate.linear.weight @ added[:, hop : hop + count]
                + model.gate.linear.bias[:, None]
            )
            value, gate = y.chunk(2)
            mask = (model.mask_out.weight @ (torch.tanh(value) * torch.sigmoid(gate))).clamp_min(0)
            wave = F.conv_transpose1d(
                (mask * encoded)[None], model.decoder.weight.T[:, None], stride=model.stride
            )
            estimates.append(wave[0, 0])
        return torch.stack(estimates)

    return torch.stack([separate(signal) for signal in mixture])


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("num_speakers", [2, 3])
def test_the_paper_size_has_the_number_of_parameters_of_its_layers(num_speakers: int) -> None:
    with torch.device("meta"):
        count = num_parameters(SepFormer(num_speakers))
    width, hidden = 256, 1024
    norm = 2 * width
    attention = 3 * (width * width + width) + width * width + width
    layer = attention + width * hidden + hidden + hidden * width + width + 2 * norm
    transformers = 2 * 2 * (8 * layer + 2 * norm)
    coder = 2 * 16 * width  # there and back
    masks = 1 + num_speakers * (width * width + width) + 2 * (width * width + width) + width * width
    assert count == coder + norm + width * width + transformers + masks
    assert round(count / 1e6, 1) == 25.7 if num_speakers == 2 else count > 25_700_000


@pytest.mark.parametrize("frames", [23, 25, 10])
def test_estimates_and_all_gradients_agree_with_the_equations_in_float64(frames: int) -> None:
    model = small().double()
    mixture = torch.randn(2, 8 + 4 * (frames - 1), dtype=torch.float64)
    # The sinusoids are fp32 numbers, so that they are the same in every type.
    assert relative(model(mixture), textbook(model, mixture)) < 1e-6
    for got, expected in zip(
        gradients(model, mixture), gradients(model, mixture, textbook), strict=True
    ):
        assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("num_frames", [1, 4, 5, 6, 10, 15, 16, 99, 100])
def test_chunks_begin_half_a_chunk_early_are_even_in_number_and_add_up_to_twice_the_frames(
    num_frames: int,
) -> None:
    frames = torch.randn(2, num_frames, 3)
    chunks = to_chunks(frames, 10)
    assert chunks.shape[1] % 2 == 0 and (chunks.shape[1] - 1) * 5 <= num_frames + 10
    assert torch.equal(chunks[:, 0, :5], torch.zeros(2, 5, 3)) and torch.equal(
        chunks[:, 0, 5], frames[:, 0]
    )
    assert torch.equal(from_chunks(chunks, num_frames), 2 * frames)


def test_positions_differ_from_each_other() -> None:
    places = sinusoids(250, torch.empty(1, 64, dtype=torch.float64))
    assert (
        places.dtype == torch.float64 and torch.cdist(places, places).fill_diagonal_(9).min() > 0.5
    )


def test_recomputed_activations_give_the_same_bits_and_keep_less() -> None:
    mixture = torch.randn(2, 400)
    runs = []
    for checkpointed in (False, True):
        model = small(checkpoint_activations=checkpointed, num_layers=3)
        kept = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            estimates = model(mixture)
        grads = torch.autograd.grad(estimates.square().sum(), list(model.parameters()))
        runs.append((estimates, grads, kept))
    (estimates, grads, kept), (again, grads_again, kept_again) = runs
    assert torch.equal(estimates, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))
    assert kept_again < kept / 2


def test_some_steps_on_one_batch_learn_it() -> None:
    torch.manual_seed(0)
    first, last = improvement_learnt(SepFormer(2, 32, 16, 8, 20, 1, 1, 4, 64), 3e-3)
    assert last > first + 5 and last > 5


@pytest.mark.slow
def test_the_paper_size_goes_forward_and_back_over_a_second() -> None:
    model = SepFormer()
    model(torch.randn(1, 8000)).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
