"""What a GPU computes is what the CPU computes, up to rounding; what repeats there to the bit.

    make gpu

Without a GPU all of it is skipped. SEPDIST_GPU_TESTS_ON=cpu runs the same tests on the CPU, which
shows that they themselves work.
"""

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from sepdist import slots
from sepdist.inference.separator import Separator
from sepdist.objectives.contract import mean_of
from sepdist.objectives.quality import Quality
from sepdist.objectives.separation import Separation
from tests.support.batches import batch_of, voices
from tests.support.cases import CONFIGS, Case, every_case, small
from tests.support.model_checks import relative
from tests.support.runs import TINY, final_files, frozen, history, program

DEVICE = torch.device(os.environ.get("SEPDIST_GPU_TESTS_ON", "cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE.type == "cuda" and not torch.cuda.is_available(),
        reason="needs a GPU that torch can use (torch.cuda.is_available)",
    ),
]
SEPARATORS = ("conv_tasnet_small", "dprnn", "dptnet", "sandglasset", "sepformer")
ESTIMATORS = ("sisnr_cnn", "ssqp_wav2vec2", "ssqp_whisper")
with tempfile.TemporaryDirectory() as folder:
    OBJECTIVES = [
        case for case in every_case(Path(folder)) if case.preset == "conv_tasnet" and case.training
    ]


@pytest.fixture(autouse=True)
def exact() -> None:
    """fp32 products in fp32, not in TF32."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def model_of(preset: str) -> nn.Module:
    """An estimator of a few thousand parameters, a separator of some 100,000 without dropout."""
    torch.manual_seed(0)
    if preset in ESTIMATORS:
        return small(preset, 2).eval()
    node = yaml.safe_load((CONFIGS / "model" / f"{preset}.yaml").read_text()) | {"num_speakers": 2}
    scaled = CONFIGS / "scale" / "mini" / f"{preset}.yaml"
    if scaled.exists():
        node |= yaml.safe_load(scaled.read_text())["model"]
    model = slots.build("model", node).eval()
    for module in model.modules():
        if isinstance(module, nn.LSTM):
            module.train()  # cuDNN's has no gradient otherwise
    return model


def results(preset: str, device: torch.device, bf16: bool = False) -> tuple[float, Tensor, Tensor]:
    """Loss, score and gradient of one batch."""
    model, batch = model_of(preset).to(device), batch_of(voices(2, 2, 4000))
    batch.estimates = batch.sources + 0.1 * batch.sources.flip(1)
    objective = Quality() if preset in ESTIMATORS else Separation()
    with torch.autocast(device.type, torch.bfloat16, bf16):
        loss, metrics = objective(model, batch.to(device))
    loss.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    score = mean_of(next(iter(metrics.values())))[0]
    return loss.item(), score.cpu(), torch.cat(grads).double().cpu()


@pytest.mark.parametrize("preset", [*SEPARATORS, *ESTIMATORS])
def test_loss_and_gradient_are_those_of_the_cpu(preset: str) -> None:
    there, here = (results(preset, device) for device in (DEVICE, torch.device("cpu")))
    assert there[0] == pytest.approx(here[0], abs=1e-3)
    assert float(there[1]) == pytest.approx(float(here[1]), abs=1e-3)
    assert relative(there[2], here[2]) < 1e-3


@pytest.mark.parametrize("preset", [*SEPARATORS, *ESTIMATORS])
def test_in_bf16_loss_and_gradient_are_close_to_those_in_fp32(preset: str) -> None:
    narrow, wide = results(preset, DEVICE, bf16=True), results(preset, DEVICE)
    assert narrow[0] == pytest.approx(wide[0], abs=0.5)
    assert relative(narrow[2], wide[2]) < 0.25


def loss_on(case: Case, device: torch.device) -> float:
    torch.manual_seed(0)
    model = case.model().to(device)
    loss, _ = case.objective()(model, case.batch.to(device))
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("case", OBJECTIVES, ids=lambda case: f"{case.kind} {case.label}")
def test_every_objective_gives_the_loss_of_the_cpu(case: Case, tmp_path: Path) -> None:
    if case.kind == "fixed_permutations":
        cases = [
            one for one in every_case(tmp_path) if (one.kind, one.label) == (case.kind, case.label)
        ]
        case = cases[0]
    assert loss_on(case, DEVICE) == pytest.approx(loss_on(case, torch.device("cpu")), abs=2e-3)


def test_a_recording_is_separated_as_on_the_cpu() -> None:
    wave = np.random.default_rng(0).standard_normal(12000).astype(np.float32)
    one, other = (
        Separator(model_of("conv_tasnet_small"), 8000, device)(wave, 8000)
        for device in (DEVICE, torch.device("cpu"))
    )
    np.testing.assert_allclose(one, other, atol=1e-3 * np.abs(other).max())


def run(path: str, device: str = DEVICE.type) -> None:
    """Run the loop alone on the device."""
    program("-m", "sepdist.training.loop", path, DS_ACCELERATOR=device)


def test_a_world_of_one_has_the_device_and_its_own_communication() -> None:
    code = (
        "import torch, torch.distributed as dist\n"
        "from sepdist.training.world import World, join_world, sum_over_world\n"
        "world = join_world()\n"
        "ones = torch.ones(3, device=world.device)\n"
        "dist.all_reduce(ones)\n"
        "print(world.device.type, dist.get_backend(), ones.sum().item())\n"
        "dist.destroy_process_group()\n"
    )
    said = program("-c", code, DS_ACCELERATOR=DEVICE.type)
    assert f"{DEVICE.type} {'nccl' if DEVICE.type == 'cuda' else 'gloo'} 3.0" in said


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("merged", [0, 1])
def test_five_steps_with_the_options_of_a_cluster_of_gpus(
    merged: int, graphs: bool, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = ["cluster=gpu", "cluster.num_workers=1", f"engine.merge_shards={merged}"]
    options += [f"engine.cuda_graphs={graphs}"]
    options += ["engine.allow_slow_bf16=true", "training.max_steps=5"]
    run(frozen(tiny_data, tmp_path / "run", *options))
    losses = history(tmp_path / "run")
    assert [*losses] == [1, 2, 3, 4, 5] and np.isfinite([*losses.values()]).all()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_partitioned_optimizer_has_the_losses_of_a_whole_one(
    stage: int, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    for name, zero in (("whole", 0), ("parts", stage)):
        options = ["cluster=gpu", "cluster.num_workers=1", "engine.cuda_graphs=false"]
        options += ["engine.precision=fp32", "engine.tf32=false", f"engine.zero_stage={zero}"]
        run(frozen(tiny_data, tmp_path / name, *options, "training.max_steps=3"))
    assert history(tmp_path / "parts") == pytest.approx(history(tmp_path / "whole"), abs=0.01)


def test_two_canonical_runs_with_determinism_end_with_the_same_bits(
    tiny_data: dict[str, str], tmp_path: Path
) -> None:
    ended = []
    for name in ("one", "two"):
        options = ["engine.determinism=true", "training.max_steps=4"]
        run(frozen(tiny_data, tmp_path / name, *options))
        ended.append(final_files(tmp_path / name))
    assert ended[0] == ended[1]


def test_a_run_begun_on_the_cpu_goes_on_there(tiny_data: dict[str, str], tmp_path: Path) -> None:
    """Three steps here and three there have the losses of six here."""
    every = ["training.checkpoint_every=3", "training.max_steps=6"]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run(frozen(tiny_data, whole, *every), "cpu")
    run(frozen(tiny_data, parted, *every, "training.max_steps=3"), "cpu")
    run(frozen(tiny_data, parted, *every))
    assert history(parted) == pytest.approx(history(whole), abs=0.01)


def test_a_model_that_is_compiled_trains_as_one_that_is_not(
    tiny_data: dict[str, str], tmp_path: Path
) -> None:
    settings = [one for one in TINY if not one.startswith("model.compile")]
    for name in ("true", "false"):
        options = [f"model.compile={name}", "training.max_steps=3"]
        run(frozen(tiny_data, tmp_path / name, *options, settings=settings))
    assert history(tmp_path / "true") == pytest.approx(history(tmp_path / "false"), abs=0.01)


@pytest.mark.parametrize("model", ["sandglasset", "sepformer", "conv_tasnet_small"])
def test_a_model_whose_passes_are_captured_trains_as_one_that_is_not(
    model: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    settings = [one for one in TINY if not one.startswith("model.")]
    size = [] if model.endswith("small") else ["+scale/mini=" + model]
    for name in ("true", "false"):
        options = [f"model={model}", *size, f"engine.cuda_graphs={name}", "training.max_steps=4"]
        run(frozen(tiny_data, tmp_path / name, *options, settings=settings))
    assert history(tmp_path / "true") == pytest.approx(history(tmp_path / "false"), abs=0.01)
