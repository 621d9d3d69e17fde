"""The engine: one optimizer step over the batches of all ranks, by DeepSpeed.

Reduction is `canonical` (a fixed tree of additions over the virtual shards, with the same bits at
every world size; see reduction.py) or `native` (an all-reduce, from ZeRO 1 on DeepSpeed's own).
Precision `bf16` means autocast: weights, optimizer state, SI-SNR and PIT stay in fp32, so
checkpoints do not depend on it. On a GPU at ZeRO 0, with a fused optimizer, a step waits for
nothing: the guard decides there, and what was measured is read when the loop asks for it.
"""

import contextlib
import itertools
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sepdist import seeding
from sepdist.config import ConfigError
from sepdist.data.order import owned_virtual_shards
from sepdist.data.records import Batch
from sepdist.objectives.contract import Metrics, Objective, mean_of
from sepdist.training.averaging import WeightAverage
from sepdist.training.capture import Captured
from sepdist.training.checkpoint import OptimizerState
from sepdist.training.merging import run_merged
from sepdist.training.recomputing import recompute_blocks
from sepdist.training.reduction import TreeSum, reduce_canonically
from sepdist.training.world import World, choose_kernels, sum_over_world, to_host

Results = list[tuple[Tensor, Metrics]]  # loss and metrics of batches
CHOICES: dict[str, tuple] = {
    "zero_stage": (0, 1, 2, 3),
    "precision": ("fp32", "bf16"),
    "reduction": ("canonical", "native"),
}
LEAST = {"clip_norm": 0, "merge_shards": 0, "bucket_elements": 1}


@dataclass
class StepResult:
    """The result of an optimizer step; all but `local_metrics` are the same on all ranks."""

    loss: float
    means: dict[str, float]  # over the batches that measured something; lacks a metric if none did
    grad_norm: float
    applied: bool  # False: the gradient was not finite or above the limit; weights are unchanged
    local_metrics: list[Metrics]  # of this rank's batches, in their order: those of whole numbers
    stopping: bool = False  # whether a rank was asked to stop


class Engine(Protocol):
    """What the loop uses of an engine; the config's `engine._target_` names one."""

    model: nn.Module
    average: WeightAverage | None  # of the weights, if the run has one
    evaluated: nn.Module  # what is validated and exported: the average, or `model`
    world: World
    set_lr: Callable[[float], None]  # of the next step
    # (this rank's batches, limit of the norm, whether asked to stop, whether to read results) ->
    # results of the steps not read before, this one's last; collective.
    step: Callable[..., list[StepResult]]
    autocast: Callable[[], contextlib.AbstractContextManager]  # the precision of a forward pass
    weights: Callable[[], dict[str, Tensor]]  # fp32 and buffers, on the main rank; collective
    averaged_weights: Callable[[], dict[str, Tensor]]  # the same of `average`; {} without one
    optimizer_state: Callable[[], OptimizerState]  # on the main rank; collective
    load_optimizer_state: Callable[[OptimizerState], None]


@dataclass(eq=False)
class DeepSpeedEngine:
    """ZeRO stages 0 to 3 on one process group; `model` has equal initial weights on every rank."""

    model: nn.Module
    objective: Objective
    make_optimizer: Callable[[Any], torch.optim.Optimizer]
    world: World
    _: KW_ONLY
    seed: int
    num_virtual_shards: int
    micro_batch: int
    ema_decay: float = 0.0  # 0: no average
    zero_stage: int = 0
    precision: str = "fp32"
    reduction: str = "canonical"
    merge_shards: int = 1
    tf32: bool = False
    determinism: bool = False
    cuda_graphs: bool = False
    checkpoint_activations: bool = False
    clip_norm: float = 5.0
    bucket_elements: int = 1_000_000
    allow_slow_bf16: bool = False

    def __post_init__(self) -> None:
        world, num_shards = self.world, self.num_virtual_shards
        check_engine_options(vars(self), num_shards, world.size)
        self.on_device = world.device.type != "cpu"
        if self.precision == "bf16" and not self.on_device and not self.allow_slow_bf16:
            refuse_slow_bf16()
        if self.on_device:
            choose_kernels(self.tf32, self.determinism)
        self.canonical = self.reduction == "canonical"
        self.owned = owned_virtual_shards(num_shards, world.rank, world.size)
        merged = 1 if self.canonical else self.merge_shards or len(self.owned)
        firsts = range(0, len(self.owned), merged)
        self._passes = [self.owned[first : first + merged] for first in firsts]
        self.model.to(world.device)
        self.average = WeightAverage(self.model, self.ema_decay) if self.ema_decay else None
        if self.checkpoint_activations:
            recompute_blocks(self.model)
        autocast = {"enabled": self.precision == "bf16", "dtype": "bfloat16"}
        self._by_zero = self.zero_stage > 0 and not self.canonical
        self._initialize(
            {
                "train_micro_batch_size_per_gpu": self.micro_batch,
                "gradient_accumulation_steps": len(self._passes) if self._by_zero else 1,
                "gradient_clipping": self.clip_norm if self._by_zero else 0.0,
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 2**62,
                "timers": {"throughput": {"enabled": False}},  # it waits for the device
                # DeepSpeed's forward ends any other autocast; gradients are reduced in fp32.
                "torch_autocast": autocast | {"lower_precision_safe_modules": []},
                "zero_optimization": {
                    "stage": self.zero_stage,
                    "overlap_comm": self.zero_stage == 3 or self.on_device,
                    # The defaults, 5e8, cost 2 GB per worker, and 14 times the time on CPU.
                    "reduce_bucket_size": self.bucket_elements,
                    "allgather_bucket_size": self.bucket_elements,
                    "stage3_prefetch_bucket_size": self.bucket_elements,
                    "stage3_param_persistence_threshold": 10_000,
                },
            }
        )
        self.evaluated = self.average.model if self.average else self.model
        captures = self.cuda_graphs and world.device.type == "cuda"
        self._captured = Captured(self.model) if captures else None
        self._named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self._unread: list[tuple[Any, ...]] = []
        self._patterns: set[tuple[str, ...]] = set()
        self._compiled = world.size == 1 or self.zero_stage == 3  # whose forward is collective
        if self.canonical and self.zero_stage > 0:
            self._optimizer.gradient_average = False
        # Fused optimizers leave out a step by `found_inf` and count steps on the device.
        self._fused = getattr(self._torch_optimizer(), "_step_supports_amp_scaling", False)
        self._guarded = self.on_device and self.zero_stage == 0 and self._fused

    def _initialize(self, options: dict[str, Any]) -> None:
        import deepspeed  # here, because it takes seconds that a driver need not spend

        self._fragments, self._zero = deepspeed.utils, deepspeed.zero
        deepspeed.utils.logger.setLevel(logging.WARNING)
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it; Ray and torchrun set it
        if self.world.device.type == "cpu":
            # Otherwise DeepSpeed compiles a shared-memory communication op for a minute.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=self.model, optimizer=self.make_optimizer(trained), config=options
        )
        self.model = self._engine.module

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def step(
        self,
        batches: list[Batch],
        norm_limit: float = math.inf,
        stopping: bool = False,
        read: bool = True,
    ) -> list[StepResult]:
        """Make one optimizer step; `batches` are those of this rank's virtual shards; collective.

        A gradient that is not finite, or (unless ZeRO reduces it) above `norm_limit`, is not
        applied. Returns the results of the steps not read before, this one's last; where a step
        does not wait for its device, none unless `read`, which is equal on all ranks. `stopping`
        is true in all ranks' results if it is on one.
        """
        assert len(batches) == len(self.owned), (len(batches), self.owned)
        self.model.train()
        if not self._compiled:
            self._compile_by_one(batches[: len(self._passes[0])])
        make = self._step_by_zero if self._by_zero else self._step_by_sum
        results, outcome = make(batches, norm_limit)
        if self.average:
            params, at_3 = list(self.model.parameters()), self.zero_stage == 3
            with self._zero.GatheredParameters(params) if at_3 else contextlib.nullcontext():
                self.average.update(self.model)
        self._unread.append(self._measure(results, outcome, stopping))
        if self._guarded and not read:
            return []
        unread, self._unread = to_host(self._unread), []
        return [self._result(*one) for one in unread]

    def _compile_by_one(self, batches: list[Batch]) -> None:
        """Let one rank of each node compile the model, so that the others find it on disk."""
        if os.environ["LOCAL_RANK"] == "0":
            loss = self._forward(self.model, batches)[0][0]
            torch.autograd.grad(loss, [p for _, p in self._named], allow_unused=True)
        dist.barrier()
        self._compiled = True

    def _forward(self, model: Any, batches: list[Batch]) -> Results:
        # Dropout masks belong to positions, so that they are the same at any world size.
        first = int(batches[0].positions[0])
        torch.manual_seed(seeding.torch_seed(self.seed, "dropout", first))
        with self.autocast():
            moved = [batch.to(self.world.device) for batch in batches]
            return run_merged(self.objective, model, moved)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context of a forward pass, which sets its precision."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16)

    def _run(self, model: Any, batches: list[Batch], backward: Callable[[Tensor], None]) -> Results:
        """Call `backward` with the sum of the losses of each pass; returns detached results."""
        results: Results = []
        for shards in self._passes:
            if self._captured:
                self._captured.begin()
            found = self._forward(model, batches[len(results) :][: len(shards)])
            backward(torch.stack([loss for loss, _ in found]).sum())
            results += [(loss.detach(), {k: v.detach() for k, v in m.items()}) for loss, m in found]
        return results

    def _step_by_sum(self, batches: list[Batch], norm_limit: float) -> tuple[Results, Tensor]:
        """Add up whole gradients and make the step; returns results and [norm, applied]."""
        params = [p for _, p in self._named]
        tree = TreeSum(self.num_virtual_shards if self.canonical else len(self._passes))
        leaves = itertools.count(self.owned[0] if self.canonical else 0)

        def backward(loss: Tensor) -> None:
            # Parameters that this pass does not use get zeros, so that gradients never shift.
            grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
            flat = torch.cat([grad.reshape(-1).float() for grad in grads])
            del grads  # as large as the model
            tree.push((0, next(leaves)), flat)

        results = self._run(self._captured or self.model, batches, backward)
        if self.canonical:
            total = reduce_canonically(tree, self.world.rank, self.world.size)
        else:
            total = tree.result()
            if self.world.size > 1:
                dist.all_reduce(total)
        total.div_(self.num_virtual_shards)
        norm = torch.linalg.vector_norm(total, dtype=torch.float64)
        applied = norm <= min(norm_limit, torch.finfo(torch.float64).max)  # not if it is NaN either
        outcome = torch.stack([norm, applied.double()])
        if self._guarded:  # the optimizer leaves it out
            vars(self._optimizer).update(grad_scale=None, found_inf=(~applied).float())
        elif not applied:
            return results, outcome
        if self.clip_norm:
            total.mul_((self.clip_norm / norm).clamp(max=1.0))
        slices = zip(total.split([p.numel() for p in params]), params, strict=True)
        pieces = [piece.view_as(p) for piece, p in slices]
        if self.zero_stage == 0:
            for p, piece in zip(params, pieces, strict=True):
                p.grad = piece
        else:
            # A loss whose gradient is exactly `piece` hands it to ZeRO's partitioning. Rank 0 gives
            # all of it and the others zeros: a sum of one number and zeros is exact in any order.
            if not self.world.is_main:
                total.mul_(0.0)  # the pieces are views of it
            products = [(p * piece).sum() for p, piece in zip(params, pieces, strict=True)]
            self._engine.backward(sum(products))
        self._engine.step()
        return results, outcome

    def _step_by_zero(self, batches: list[Batch], _: float) -> tuple[Results, Tensor]:
        """Make a step with ZeRO's own reduction; returns results and [norm, applied]."""
        pattern = tuple(batch.data_set for batch in batches)
        # The branches are compared in the first steps, and when the data sets are new on any rank.
        new = self._engine.global_steps < 10 or pattern not in self._patterns
        self._patterns.add(pattern)
        check = self.world.size > 1 and bool(sum_over_world(torch.tensor(float(new)), self.world))

        def backward(loss: Tensor) -> None:
            if check:
                self._check_same_branch(loss)
            # DeepSpeed divides by the number of passes.
            self._engine.backward(loss * (len(self._passes) / len(self.owned)))
            self._engine.step()

        results = self._run(self._engine, batches, backward)
        norm = float(self._engine.get_global_grad_norm() or 0.0)
        # If it has an overflow, ZeRO skipped the step and reports an infinite norm.
        outcome = torch.tensor([norm, float(not self._optimizer.overflow)], dtype=torch.float64)
        return results, outcome.to(self.world.device)

    def _measure(self, results: Results, outcome: Tensor, stopping: bool) -> tuple[Any, ...]:
        """Add up over the world what a step measured: the arguments of `_result`."""
        metrics = [one for _, one in results]
        names = sorted(name for name, value in metrics[0].items() if value.is_floating_point())
        own = slice(self.owned[0], self.owned[-1] + 1)
        # By metric and virtual shard: the value, and 1 where there is one.
        shape = (2, 1 + len(names), self.num_virtual_shards)
        table = torch.zeros(shape, dtype=torch.float64, device=self.world.device)
        table[0, 0, own] = torch.stack([loss for loss, _ in results])
        table[1, 0, self.owned[0]].fill_(stopping)  # an assignment would wait for the device
        for row, name in enumerate(names, 1):
            values = [one[name] for one in metrics]
            if len({value.shape for value in values}) == 1:  # few operations
                means, counts = torch.vmap(mean_of)(torch.stack(values))
            else:
                means, counts = map(torch.stack, zip(*map(mean_of, values), strict=True))
            table[0, row, own], table[1, row, own] = means, counts > 0
        if self.world.size > 1:
            dist.all_reduce(table)  # exact, as ranks fill disjoint elements
        whole = [{k: v for k, v in one.items() if not v.is_floating_point()} for one in metrics]
        return names, table.sum(2), outcome, whole

    def _result(self, names: list[str], table: Tensor, outcome: Tensor, whole: Any) -> StepResult:
        sums, counts = table.tolist()
        columns = zip(names, sums[1:], counts[1:], strict=True)
        means = {name: total / count for name, total, count in columns if count}
        norm, applied = outcome.tolist()
        loss, stop = sums[0] / self.num_virtual_shards, counts[0] > 0
        return StepResult(loss, means, norm, bool(applied), whole, stop)

    def _check_same_branch(self, loss: Tensor) -> None:
        """Raise RuntimeError if the losses of the ranks reach different parameters; collective.

        ZeRO reduces gradients as they arrive, so it would add up those of different parameters.
        """
        seen, waiting = set[Any](), [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                waiting += [following for following, _ in node.next_functions]
        reached = {id(getattr(node, "variable", None)) for node in seen}
        used = torch.tensor([float(id(p) in reached) for _, p in self._named])
        num_ranks = sum_over_world(used, self.world).tolist()
        counted = zip(self._named, num_ranks, strict=True)
        differing = [name for (name, _), count in counted if 0 < count < self.world.size]
        if differing:
            raise RuntimeError(
                f"only some ranks use {differing[0]} and {len(differing) - 1} more parameters in "
                f"this step: engine.reduction=native at ZeRO {self.zero_stage} would mix their "
                "gradients with those of other parameters; set engine.reduction=canonical or "
                "engine.zero_stage=0"
            )

    def weights(self) -> dict[str, Tensor]:
        """Return the fp32 weights and buffers on CPU, on the main rank; collective at ZeRO-3."""
        if self.zero_stage == 3:
            named = self._engine._zero3_consolidated_16bit_state_dict()  # in fp32, as they are
        else:
            named = self.model.state_dict()
        return {name: _copy(value) for name, value in named.items()} if self.world.is_main else {}

    def averaged_weights(self) -> dict[str, Tensor]:
        """Return the average of the weights on CPU, on the main rank; {} if there is none."""
        named = self.average.model.state_dict() if self.average and self.world.is_main else {}
        return {name: _copy(value) for name, value in named.items()}

    def optimizer_state(self) -> OptimizerState:
        """Its state by whole parameters on CPU, on the main rank; collective at ZeRO >= 1."""
        state = self._torch_optimizer().state
        if not state or (self.zero_stage == 0 and not self.world.is_main):
            return OptimizerState({}, {})
        one, whole = next(iter(state.values())), self._fragments.safe_get_full_optimizer_state
        keys = [key for key, value in one.items() if torch.is_tensor(value) and value.ndim > 0]
        scalars = {key: float(value) for key, value in one.items() if key not in keys}
        tensors = {}
        for name, p in self._named:
            for key in keys:
                value = state[p][key] if self.zero_stage == 0 else whole(p, key)
                if self.world.is_main:
                    shape = getattr(p, "ds_shape", p.shape)
                    tensors[f"{key}/{name}"] = _copy(value.reshape(shape))
        return OptimizerState(tensors, scalars)

    def load_optimizer_state(self, saved: OptimizerState) -> None:
        """Load what `optimizer_state` returned at any world size and ZeRO stage."""
        if not saved.tensors:
            return
        keys = sorted({name.split("/", 1)[0] for name in saved.tensors})
        optimizer = self._torch_optimizer()
        state = optimizer.state
        held = [p for group in optimizer.param_groups for p in group["params"]]
        # What the optimizer updates: parameters, or ZeRO's partitions of them.
        for p in self._optimizer.fp32_partitioned_groups_flat if self.zero_stage == 3 else held:
            state[p] = {key: torch.zeros_like(p, dtype=torch.float32) for key in keys}
            for key, number in saved.scalars.items():
                state[p][key] = torch.tensor(number, device=p.device if self._fused else None)
        if self.zero_stage in (1, 2):
            self._optimizer._lazy_init_hp_params_optimizer_state()
        for name, p in self._named:
            for key in keys:
                value = saved.tensors[f"{key}/{name}"].to(self.world.device)
                if self.zero_stage == 0:
                    state[p][key].copy_(value)
                elif self.zero_stage < 3:
                    self._fragments.safe_set_full_optimizer_state(p, value, key)
                else:
                    # safe_set_full_optimizer_state needs sizes that the world size divides.
                    size = self._fragments.safe_get_local_optimizer_state(p, key).numel()
                    spare = size * self.world.size - value.numel()
                    padded = torch.nn.functional.pad(value.flatten(), (0, spare))
                    own = padded[self.world.rank * size :][:size]
                    self._fragments.safe_set_local_optimizer_state(p, own, key)

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer if self.zero_stage == 0 else self._optimizer.optimizer


def _copy(value: Tensor) -> Tensor:
    return value.detach().cpu().clone()


def refuse_slow_bf16() -> None:
    """Raise ConfigError on a CPU for which oneDNN has no bf16 kernels.

    There torch falls back to loops of its own, 24 times slower than fp32. oneDNN needs AVX-512 or
    AVX-NE-CONVERT (AVX-512 without bf16 instructions suffices) and obeys ONEDNN_MAX_CPU_ISA.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise ConfigError(
            "engine.precision=bf16: this CPU has no bf16 arithmetic (AVX-512), and a Conv-TasNet "
            "step takes 50.7 s instead of 2.1 s in fp32; set engine.precision=fp32, or "
            "engine.allow_slow_bf16=true to train in bf16 nevertheless"
        )


def check_engine_options(
    given: Mapping[str, Any], num_virtual_shards: int, world_size: int
) -> None:
    """Raise ConfigError for combinations that cannot work; what is not given has its default."""
    names = ("zero_stage", "precision", "reduction", "cuda_graphs", "checkpoint_activations")
    options = {name: given.get(name, getattr(DeepSpeedEngine, name)) for name in names}
    for name, choices in CHOICES.items():
        if options[name] not in choices:
            raise ConfigError(f"engine.{name}={options[name]!r}: choose one of {choices}")
    for name, least in LEAST.items():
        if (value := given.get(name, least)) < least:
            raise ConfigError(f"engine.{name}={value}: it is at least {least}")
    zero_stage, _, reduction, cuda_graphs, checkpoint_activations = options.values()
    if world_size > num_virtual_shards:
        raise ConfigError(
            f"{world_size} workers for data.num_virtual_shards={num_virtual_shards}: start at most "
            "one worker per virtual shard, or raise data.num_virtual_shards"
        )
    if reduction == "canonical" and zero_stage == 3:
        raise ConfigError(
            "engine.zero_stage=3 partitions the weights; it needs engine.reduction=native"
        )
    if cuda_graphs and checkpoint_activations:  # which reads the state of random numbers
        raise ConfigError("engine.checkpoint_activations=true needs engine.cuda_graphs=false")
    if cuda_graphs and zero_stage > 0 and reduction == "native":
        raise ConfigError(
            f"engine.cuda_graphs=true with native reduction needs engine.zero_stage=0, not "
            f"{zero_stage}, as ZeRO acts inside both passes: set engine.cuda_graphs=false"
        )
    if reduction == "native" and num_virtual_shards % world_size:
        raise ConfigError(
            "engine.reduction=native needs a world size that divides data.num_virtual_shards="
            f"{num_virtual_shards}, not {world_size}; engine.reduction=canonical takes any"
        )
