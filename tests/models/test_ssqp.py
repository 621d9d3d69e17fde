"""SSQP-Net against its equations in numpy, encoders against transformers; without downloads."""

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr
import torch
import transformers
import yaml
from torch import Tensor

from sepdist import slots
from sepdist.inference.export import load_estimator
from sepdist.models.speech_encoders import SPEECH_LEVEL, log_mel, speech_encoder, upsample
from sepdist.models.ssqp import SSQPNet, fit_levels
from sepdist.objectives.quality import Quality
from sepdist.training.checkpoint import Checkpointer, OptimizerState, Snapshot
from tests.support.batches import batch_of, voices
from tests.support.ssqp import DECODER, TINY, WHOLE, stored

FAMILIES = sorted(TINY)
DECODER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def small(family: str = "wav2vec2", **changes: Any) -> SSQPNet:
    torch.manual_seed(0)
    return SSQPNet(**({"encoder": TINY[family]} | changes))


def speech(num_items: int = 2, num_samples: int = 2000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A mixture [B, T], and estimates [B, 2, T] that hold some of the other voice."""
    sources = voices(num_items, 2, num_samples, seed) + 0.02 * torch.randn(
        num_items, 2, num_samples
    )
    return sources.sum(1), sources + 0.3 * sources.flip(1)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).detach().norm() / expected.detach().norm())


# Upsampling


def test_upsampling_keeps_the_samples_and_is_soxrs_in_between() -> None:
    spectrum = torch.fft.rfft(torch.randn(3, 8000, dtype=torch.float64))
    spectrum[:, 3600:] = 0  # 8,000 samples are a second: bins are Hz
    wave = torch.fft.irfft(spectrum)
    twice = upsample(wave, 2)
    assert twice.shape == (3, 16000)
    torch.testing.assert_close(twice[:, ::2], wave, atol=1e-12, rtol=0)
    for row, got in zip(wave.numpy(), twice.numpy(), strict=True):
        error = (got - soxr.resample(row, 8000, 16000, quality="VHQ"))[200:-200]
        assert np.mean(error**2) < 1e-7 * np.mean(row**2)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_upsampling_has_the_gradient_of_a_linear_map(factor: int) -> None:
    wave = torch.randn(2, 3, 50, dtype=torch.float64, requires_grad=True)
    direction, weights = torch.randn_like(wave), torch.randn(2, 3, 50 * factor, dtype=torch.float64)
    (grad,) = torch.autograd.grad((upsample(wave, factor) * weights).sum(), wave)
    torch.testing.assert_close(
        (grad * direction).sum(), (upsample(direction, factor) * weights).sum()
    )
    assert torch.equal(upsample(wave, 1), wave) or factor > 1


# Encoders


def test_the_log_mel_spectrum_is_that_of_transformers() -> None:
    wave = 0.1 * torch.randn(2, 80000)
    padded = torch.nn.functional.pad(wave, (0, 480000 - 80000))
    expected = transformers.WhisperFeatureExtractor()(
        list(wave.numpy()), sampling_rate=16000, return_tensors="np"
    )
    np.testing.assert_allclose(log_mel(padded, 80).numpy(), expected["input_features"], atol=1e-4)


def test_silence_has_a_finite_log_mel_spectrum_and_gradient() -> None:
    wave = torch.zeros(1, 1600, requires_grad=True)
    log_mel(wave, 80).sum().backward()
    assert torch.isfinite(wave.grad).all()


def test_whispers_encoder_agrees_with_transformers_where_its_input_is_whole() -> None:
    encoder, _ = speech_encoder(None, TINY["whisper"] | {"max_source_positions": 50})
    wave = torch.randn(2, encoder.max_samples)
    expected = encoder.model(log_mel(SPEECH_LEVEL * wave, 80)).last_hidden_state
    torch.testing.assert_close(encoder(wave), expected)
    # A shorter input has the first positions only.
    assert encoder(wave[:, :8000]).shape == (2, 25, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_layers_are_the_first_ones(family: str) -> None:
    torch.manual_seed(0)
    whole, _ = speech_encoder(None, TINY[family])
    first, values = speech_encoder(None, TINY[family], num_layers=1)
    first.load_state_dict(whole.state_dict(), strict=False)
    wave = torch.randn(1, 4000)
    seen = []
    layers = whole.model.layers if family == "whisper" else whole.model.encoder.layers
    layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
    whole.eval()(wave)
    expected = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    got = first.eval()(wave)
    if family == "whisper":
        expected = whole.model.layer_norm(expected)
    torch.testing.assert_close(got, expected)
    assert values.get("encoder_layers", values.get("num_hidden_layers")) == 1


def test_the_base_size_is_768_features_of_12_layers() -> None:
    with torch.device("meta"):
        for family, millions in (("wav2vec2", 94.4), ("hubert", 94.4), ("wavlm", 94.4)):
            model = SSQPNet(encoder={"model_type": family})
            assert model.head.in_features == 768 and len(model.encoder.model.encoder.layers) == 12
            assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


# The model


@pytest.mark.parametrize("mode", ["otfp", "otfs"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_segments_follow_each_other_in_time_and_the_head_is_equation_8(
    family: str, mode: str
) -> None:
    model = small(family, mode=mode).eval()
    mixture, estimates = speech()

    def segments(mixture_T: Tensor, estimates_ST: Tensor) -> list[np.ndarray]:
        m, *waves = (x.numpy().astype(np.float64) for x in (mixture_T, *estimates_ST))
        m = (m - m.mean()) / m.std()
        waves = [wave - wave.mean() for wave in waves]
        fitted = [wave * np.linalg.lstsq(wave[:, None], m, rcond=None)[0] for wave in waves]
        return [upsample(torch.from_numpy(x), 2).numpy() for x in (m, *fitted)]

    rows = []
    for m, estimate in zip(mixture, estimates, strict=True):
        parts = segments(m, estimate)
        rows += [parts] if mode == "otfp" else [[parts[0], parts[1]], [parts[0], parts[2]]]
    waves = torch.from_numpy(np.stack([np.concatenate(row) for row in rows])).float()
    features = model.encoder(waves).detach().numpy().astype(np.float64)
    weight, bias = (p.detach().numpy() for p in model.head.parameters())
    expected = [
        weight @ (frames.T @ np.ones(len(frames)) / len(frames)) + bias for frames in features
    ]
    got = model(mixture, estimates).detach().numpy()
    np.testing.assert_allclose(got, np.reshape(expected, (2, 2)), atol=2e-5)
    assert waves.shape[1] == 2 * 2000 * (3 if mode == "otfp" else 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_levels_signs_and_offsets_of_the_inputs_do_not_matter(family: str) -> None:
    model = small(family).eval()
    mixture, estimates = speech()
    levels = torch.tensor([-0.05, 30.0]).view(1, 2, 1)
    torch.testing.assert_close(
        model(7 * mixture, levels * estimates + 0.1), model(mixture, estimates), atol=1e-3, rtol=0
    )


def test_otfs_encodes_each_estimate_alone_and_otfp_all_together() -> None:
    mixture, estimates = speech()
    changed = torch.stack([estimates[:, 0], torch.randn(2, 2000)], 1)
    for mode, same in (("otfs", True), ("otfp", False)):
        model = small(mode=mode).eval()
        pair = (model(mixture, estimates)[:, 0], model(mixture, changed)[:, 0])
        assert torch.allclose(*pair, atol=1e-6) == same
    assert small(mode="otfs")(mixture, torch.randn(2, 5, 2000)).shape == (2, 5)


def test_inputs_longer_than_whisper_takes_are_encoded_in_equal_windows_of_all_segments() -> None:
    model = small(encoder=TINY["whisper"] | {"max_source_positions": 30}).eval()
    assert model.encoder.max_samples == 9600  # 1,600 samples of each of three segments at 8 kHz
    mixture, estimates = speech(num_samples=4000)
    segments = upsample(fit_levels(torch.cat([mixture[:, None], estimates], 1)), 2)
    pieces = [segments[..., :2667], segments[..., 2667:5334], segments[..., 5334:]]
    features = torch.cat([model.encoder(piece.flatten(1)) for piece in pieces], 1)
    torch.testing.assert_close(model(mixture, estimates), model.head(features.mean(1)))


def test_a_longer_input_than_window_seconds_gets_the_mean_estimate_of_its_windows() -> None:
    model = small("whisper", window_seconds=0.125).eval()
    mixture, estimates = speech(num_samples=3000)
    levelled = fit_levels(torch.cat([mixture[:, None], estimates], 1))
    pieces = upsample(levelled, 2).split(2000, 2)
    expected = [model.head(model.encoder(piece.flatten(1)).mean(1)) for piece in pieces]
    torch.testing.assert_close(model(mixture, estimates), torch.stack(expected).mean(0))
    whole = small("whisper").eval()
    assert torch.equal(
        model(mixture[:, :1000], estimates[..., :1000]),
        whole(mixture[:, :1000], estimates[..., :1000]),
    )
    with pytest.raises(ValueError, match=r"window_seconds=0\.001"):
        small("whisper", window_seconds=0.001)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_length_from_min_length_up_is_estimated(family: str) -> None:
    model = small(family)
    for mode in (True, False):
        model.train(mode)
        for length in (model.min_length, model.min_length + 1, 777):
            mixture, estimates = torch.randn(1, length), torch.randn(1, 2, length)
            assert torch.isfinite(model(mixture, estimates)).all()
    with pytest.raises(ValueError, match=f"T >= {model.min_length}"):
        model(torch.randn(1, model.min_length - 1), torch.randn(1, 2, model.min_length - 1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_frozen_estimator_passes_gradients_to_the_estimates_and_takes_none(
    family: str, checkpointed: bool
) -> None:
    model = small(family, gradient_checkpointing=checkpointed).eval().requires_grad_(False)
    mixture, estimates = speech()
    model(mixture, estimates.requires_grad_()).mean().backward()
    assert torch.isfinite(estimates.grad).all() and (estimates.grad.abs().amax(-1) > 0).all()
    assert all(p.grad is None for p in model.parameters())


def test_silent_estimates_have_finite_predictions_and_gradients() -> None:
    model = small()
    estimates = torch.zeros(1, 2, 2000, requires_grad=True)
    prediction = model(torch.randn(1, 2000), estimates)
    prediction.sum().backward()
    assert torch.isfinite(prediction).all() and torch.isfinite(estimates.grad).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_give_the_same_bits_and_keep_less(family: str) -> None:
    mixture, estimates = speech()
    runs = []
    for checkpointed in (False, True):
        model = small(family, gradient_checkpointing=checkpointed)
        kept = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        torch.manual_seed(3)  # dropout
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            prediction = model(mixture, estimates)
        trained = [p for p in model.parameters() if p.requires_grad]
        runs.append((prediction, torch.autograd.grad(prediction.square().sum(), trained), kept))
    (prediction, grads, kept), (again, grads_again, kept_again) = runs
    assert torch.equal(prediction, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))
    assert kept_again < (0.8 if family == "whisper" else 0.5) * kept


@pytest.mark.parametrize("family", FAMILIES)
def test_training_draws_from_torchs_generator_alone_and_every_parameter_has_a_gradient(
    family: str,
) -> None:
    model = small(
        family, encoder=TINY[family] | ({"dropout": 0.1} if family == "whisper" else {})
    ).train()
    mixture, estimates = speech()
    predictions = []
    for seed, numpy_seed in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(seed)
        np.random.seed(numpy_seed)
        state = np.random.get_state()[1].copy()
        predictions.append(model(mixture, estimates))
        assert np.array_equal(np.random.get_state()[1], state)
    assert torch.equal(predictions[0], predictions[1]) and not torch.equal(
        predictions[0], predictions[2]
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(torch.autograd.grad(predictions[0].sum(), trained)) == len(
        trained
    )  # raises for one that is not used


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_frozen_has_no_gradient_and_a_frozen_encoder_no_dropout(family: str) -> None:
    all_names = {name for name, p in small(family).named_parameters() if p.requires_grad}
    for freeze in ("none", "convolutions", "encoder"):
        model = small(family, freeze=freeze).train()
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        front = {
            name for name in all_names if ".feature_extractor." in name or ".model.conv" in name
        }
        assert front
        gone = {
            "none": set(),
            "convolutions": front,
            "encoder": {n for n in all_names if "encoder." in n},
        }[freeze]
        assert trained == all_names - gone
        assert model.encoder.training == (freeze != "encoder") and model.head.training
    assert small(family, freeze="encoder").train().eval().training is False


def test_bf16_autocast_is_near_fp32_and_its_predictions_are_fp32() -> None:
    for family in FAMILIES:
        model = small(family).eval()
        mixture, estimates = speech()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = model(mixture, estimates)
        assert got.dtype == torch.float32 and relative(got, model(mixture, estimates)) < 0.05


def test_a_hundred_steps_on_one_batch_learn_it() -> None:
    torch.manual_seed(0)
    batch = batch_of(voices(4, 2, 800))
    noise = torch.randn(4, 2, 800) * torch.tensor([0.003, 0.01, 0.03, 0.1]).view(4, 1, 1)
    batch.estimates = batch.sources + noise * torch.tensor([1.0, 0.3]).view(1, 2, 1)
    off = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    model = small(encoder=TINY["wav2vec2"] | {"num_hidden_layers": 1} | off)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    errors = []
    for _ in range(120):
        optimizer.zero_grad()
        loss, _ = Quality()(model, batch)
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[0] > 8 and np.mean(errors[-10:]) < 2


# Pre-trained weights, and checkpoints that do not need them


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_a_model_from_a_folder_does_not_need_the_folder(
    family: str, tmp_path: Path
) -> None:
    place = stored(family, tmp_path / "hub")
    node: dict[str, Any] = {
        "_target_": "sepdist.models.ssqp.SSQPNet",
        "pretrained": place,
        "num_layers": 1,
    }
    model = slots.build("model", node).eval()
    original = (
        getattr(transformers, WHOLE[family])
        .from_pretrained(place, dtype=torch.float32)
        .state_dict()
    )
    for name, value in model.encoder.model.state_dict().items():
        ends = [
            key
            for key in original
            if key == name or (key.endswith("." + name) and "decoder" not in key)
        ]
        assert (
            len(ends) == 1
            and torch.equal(value, original[ends[0]])
            and value.dtype == torch.float32
        )
    writer = Checkpointer(
        str(tmp_path / "run"),
        model_node=node | model.node_changes,
        sample_rate=8000,
        lineage={},
        keep_last=1,
        keep_best=True,
    )
    writer.save(Snapshot(1, model.state_dict(), OptimizerState({}, {}), {}))
    writer.close()
    (tmp_path / "hub").rename(tmp_path / "gone")
    found = load_estimator(str(tmp_path / "run"))
    mixture, estimates = speech()
    assert torch.equal(found(mixture, estimates), model(mixture, estimates))
    (card,) = (tmp_path / "run" / "checkpoints").glob("*/model.yaml")
    assert (
        str(tmp_path) not in card.read_text()
        and yaml.safe_load(card.read_text())["model"]["pretrained"] is None
    )


def test_a_value_of_the_config_can_be_changed_over_a_stored_one(tmp_path: Path) -> None:
    place = stored("hubert", tmp_path)
    model = SSQPNet(pretrained=place, encoder={"model_type": "hubert", "hidden_dropout": 0.3})
    assert model.encoder.model.encoder.layers[0].dropout.p == 0.3
    assert (
        model.encoder.model.config.layerdrop == 0.0
        and model.node_changes["encoder"]["hidden_dropout"] == 0.3
    )


def test_a_folder_without_the_weights_of_the_encoder_is_refused(tmp_path: Path) -> None:
    stored("wav2vec2", tmp_path)
    import safetensors.torch

    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    kept = {
        name: value for name, value in weights.items() if "layers.1.attention.k_proj" not in name
    }
    safetensors.torch.save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lack encoder\.layers\.1\.attention\.k_proj\.bias and 1 more"
    ):
        SSQPNet(pretrained=str(tmp_path))


def test_an_unreachable_hub_is_one_error_that_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(source: str, **options: Any) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'\nsecond line")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(
        ValueError, match=r"model\.pretrained=a/b: .*couldn't connect.*local folder that holds"
    ) as found:
        SSQPNet(pretrained="a/b")
    assert "second line" not in str(found.value)


def test_a_folder_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none/at/all: not a local folder"):
        SSQPNet(pretrained=str(tmp_path / "none/at/all"))


def test_without_transformers_one_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return whole(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install transformers \(the extra `ssl`"):
        small()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "pair"}, "otfp or otfs"),
        ({"sample_rate": 11025}, "11025.*16000"),
        ({"encoder": None}, "model_type=None: give model.pretrained.*whisper"),
        ({"encoder": {"model_type": "bert"}}, "model_type=bert.*wav2vec2"),
        ({"encoder": TINY["hubert"] | {"hiden_size": 8}}, "a hubert has no hiden_size"),
        ({"encoder": TINY["hubert"] | {"hidden_size": "8"}}, "model.encoder: .*'hidden_size'"),
        ({"encoder": {"model_type": []}}, "the encoders are wav2vec2"),
        ({"encoder": TINY["hubert"] | {"layerdrop": 0.1}}, "layerdrop=0.1: must stay 0.0"),
        ({"num_layers": 3}, "num_layers=3: this wav2vec2 has 1 to 2"),
        ({"freeze": "all"}, "none, convolutions or encoder"),
    ],
)
def test_wrong_arguments_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small(**changes)


def test_inputs_of_other_shapes_are_refused_with_them() -> None:
    model = small()
    mixture = torch.randn(2, 2000)
    with pytest.raises(ValueError, match=r"3 estimates for model\.num_speakers=2"):
        model(mixture, torch.randn(2, 3, 2000))
    for shape in ((2, 2, 1999), (2, 2000), (1, 2, 2000)):
        with pytest.raises(
            ValueError, match=r"estimates of shape .* for a mixture of shape \(2, 2000\)"
        ):
            model(mixture, torch.randn(shape))


def test_the_output_parameters_are_those_that_depend_on_the_number_of_speakers() -> None:
    two, three = (dict(small(num_speakers=n).named_parameters()) for n in (2, 3))
    depend = {name for name in two if two[name].shape != three[name].shape}
    assert depend == {name for name in two if name.startswith(SSQPNet.output_parameters)} != set()
