"""The engine: one optimizer step over the batches of all ranks, by DeepSpeed.

Reduction is `canonical` (a fixed tree of additions over the virtual shards, with the same bits at
every world size; see reduction.py) or `native` (DeepSpeed's all-reduce). Precision `bf16` means
autocast: weights, optimizer state, SI-SNR and PIT stay in fp32, so checkpoints do not depend on it.
"""

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sepdist import seeding
from sepdist.config import ConfigError
from sepdist.data.order import owned_virtual_shards
from sepdist.data.records import Batch
from sepdist.objectives.contract import Metrics, Objective, mean_of
from sepdist.training.checkpoint import OptimizerState
from sepdist.training.reduction import TreeSum, reduce_canonically
from sepdist.training.world import World, sum_over_world


@dataclass
class StepResult:
    """The result of an optimizer step; all but `local_metrics` are the same on all ranks."""

    loss: float
    means: dict[str, float]  # over the batches that measured something; lacks a metric if none did
    grad_norm: float
    applied: bool  # False: the gradient was not finite or above the limit; weights are unchanged
    local_metrics: list[Metrics]  # of this rank's batches, in their order
    stopping: bool = False  # whether a rank was asked to stop


class Engine(Protocol):
    """What the loop uses of an engine; the config's `engine._target_` names one."""

    model: nn.Module
    world: World
    set_lr: Callable[[float], None]  # of the next step
    # Takes this rank's batches, a limit of the norm, and whether it was asked to stop; collective.
    step: Callable[..., StepResult]
    autocast: Callable[[], contextlib.AbstractContextManager]  # the precision of a forward pass
    weights: Callable[[], dict[str, Tensor]]  # fp32 and buffers, on the main rank; collective
    optimizer_state: Callable[[], OptimizerState]  # on the main rank; collective
    load_optimizer_state: Callable[[OptimizerState], None]


class BranchError(RuntimeError):
    """Ranks took branches of the model whose gradients DeepSpeed's reduction would mix up."""


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
    zero_stage: int = 0
    precision: str = "fp32"
    reduction: str = "canonical"
    clip_norm: float = 5.0
    bucket_elements: int = 1_000_000
    allow_slow_bf16: bool = False

    def __post_init__(self) -> None:
        world, num_shards = self.world, self.num_virtual_shards
        check_engine_options(
            self.zero_stage, self.precision, self.reduction, num_shards, world.size
        )
        if self.precision == "bf16" and world.device.type == "cpu" and not self.allow_slow_bf16:
            refuse_slow_bf16()
        self.canonical = self.reduction == "canonical"
        self.owned = owned_virtual_shards(num_shards, world.rank, world.size)
        self.model.to(world.device)
        autocast = {"enabled": self.precision == "bf16", "dtype": "bfloat16"}
        self._initialize(
            {
                "train_micro_batch_size_per_gpu": self.micro_batch,
                "gradient_accumulation_steps": 1 if self.canonical else len(self.owned),
                "gradient_clipping": 0.0 if self.canonical else self.clip_norm,
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 2**62,
                # DeepSpeed's forward ends any other autocast; gradients are reduced in fp32.
                "torch_autocast": autocast | {"lower_precision_safe_modules": []},
                "zero_optimization": {
                    "stage": self.zero_stage,
                    # The defaults, 5e8, cost 2 GB per worker, and 14 times the time on CPU.
                    "reduce_bucket_size": self.bucket_elements,
                    "allgather_bucket_size": self.bucket_elements,
                    "stage3_prefetch_bucket_size": self.bucket_elements,
                    "stage3_param_persistence_threshold": 10_000,
                },
            }
        )
        self._named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        if self.canonical:
            self._engine.enable_backward_allreduce = self.zero_stage > 0
            if self.zero_stage > 0:
                self._optimizer.gradient_average = False

    def _initialize(self, options: dict[str, Any]) -> None:
        import deepspeed  # here, because it takes seconds that a driver need not spend

        self._fragments = deepspeed.utils
        self._gathered = deepspeed.zero.GatheredParameters
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
        self, batches: list[Batch], norm_limit: float = math.inf, stopping: bool = False
    ) -> StepResult:
        """Make one optimizer step; `batches` are those of this rank's virtual shards; collective.

        A gradient that is not finite, or in canonical reduction above `norm_limit`, is not applied.
        The result's `stopping` is true on all ranks if the argument is on one.
        """
        assert len(batches) == len(self.owned), (len(batches), self.owned)
        self.model.train()
        losses = torch.zeros(self.num_virtual_shards, dtype=torch.float64)
        if self.canonical:
            metrics, grad_norm, applied = self._step_canonical(batches, losses, norm_limit)
        else:
            metrics, grad_norm, applied = self._step_native(batches, losses)
        names = sorted(name for name, value in metrics[0].items() if value.is_floating_point())
        # By metric and virtual shard: the value, and 1 where there is one.
        table = torch.zeros(2, 1 + len(names), self.num_virtual_shards, dtype=torch.float64)
        table[0, 0] = losses
        for shard, items in zip(self.owned, metrics, strict=True):
            for row, name in enumerate(names, 1):
                table[0, row, shard], count = mean_of(items[name])
                table[1, row, shard] = count > 0
        table[1, 0, self.owned[0]] = stopping
        sums, counts = sum_over_world(table, self.world).sum(2).tolist()
        columns = zip(names, sums[1:], counts[1:], strict=True)
        means = {name: total / count for name, total, count in columns if count}
        loss, stop = sums[0] / self.num_virtual_shards, counts[0] > 0
        return StepResult(loss, means, grad_norm, applied, metrics, stop)

    def _forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        # Dropout masks belong to positions, so that they are the same at any world size.
        torch.manual_seed(seeding.torch_seed(self.seed, "dropout", int(batch.positions[0])))
        with self.autocast():
            loss, metrics = self.objective(model, batch.to(self.world.device))
        return loss, {name: value.detach().cpu() for name, value in metrics.items()}

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context of a forward pass, which sets its precision."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16)

    def _step_canonical(
        self, batches: list[Batch], losses: Tensor, norm_limit: float
    ) -> tuple[list[Metrics], float, bool]:
        tree = TreeSum(self.num_virtual_shards)
        params = [p for _, p in self._named]
        all_metrics = []
        for shard, batch in zip(self.owned, batches, strict=True):
            loss, metrics = self._forward(self.model, batch)
            # Parameters that this batch does not use get zeros, so that gradients never shift.
            grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
            tree.push((0, shard), torch.cat([grad.reshape(-1).float() for grad in grads]))
            del grads  # as large as the model
            losses[shard] = loss.detach()
            all_metrics.append(metrics)
        total = reduce_canonically(tree, self.world.rank, self.world.size)
        total.div_(self.num_virtual_shards)
        norm = float(torch.linalg.vector_norm(total, dtype=torch.float64))
        if not math.isfinite(norm) or norm > norm_limit:
            return all_metrics, norm, False
        if self.clip_norm and norm > self.clip_norm:
            total.mul_(self.clip_norm / norm)
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
        return all_metrics, norm, True

    def _step_native(
        self, batches: list[Batch], losses: Tensor
    ) -> tuple[list[Metrics], float, bool]:
        all_metrics = []
        for shard, batch in zip(self.owned, batches, strict=True):
            loss, metrics = self._forward(self._engine, batch)
            if self.zero_stage > 0 and self.world.size > 1:
                self._check_same_branch(loss)
            self._engine.backward(loss)
            losses[shard] = loss.detach()
            all_metrics.append(metrics)
            if shard == self.owned[-1] and self.zero_stage == 0:
                grads = [p.grad for _, p in self._named if p.grad is not None]
                norm = float(torch.stack([g.double().square().sum() for g in grads]).sum().sqrt())
                if not math.isfinite(norm):
                    self._engine.zero_grad()
                    self._engine.micro_steps += 1
                    return all_metrics, norm, False
            self._engine.step()
        if self.zero_stage > 0:
            norm = float(self._engine.get_global_grad_norm() or 0.0)
            if self._optimizer.overflow:  # ZeRO skipped the step and reports an infinite norm
                return all_metrics, norm, False
        return all_metrics, norm, True

    def _check_same_branch(self, loss: Tensor) -> None:
        """Raise BranchError if the losses of the ranks reach different parameters; collective.

        ZeRO reduces gradients as they arrive, so it would add up those of different parameters.
        """
        used = used_parameters(loss, [p for _, p in self._named])
        num_ranks = sum_over_world(used.double(), self.world).tolist()
        counted = zip(self._named, num_ranks, strict=True)
        differing = [name for (name, _), count in counted if 0 < count < self.world.size]
        if differing:
            raise BranchError(
                f"only some ranks use {differing[0]} and {len(differing) - 1} more parameters in "
                f"this step: engine.reduction=native at ZeRO {self.zero_stage} would mix their "
                "gradients with those of other parameters; set engine.reduction=canonical or "
                "engine.zero_stage=0"
            )

    def weights(self) -> dict[str, Tensor]:
        """Return the fp32 weights and buffers on CPU, on the main rank; collective at ZeRO-3."""
        if self.zero_stage < 3:
            named = self.model.state_dict() if self.world.is_main else {}
            return {name: _copy(value) for name, value in named.items()}
        full = self._fragments.safe_get_full_fp32_param
        weights = {name: _copy(full(p)) for name, p in self._named}
        for name, p in self.model.named_parameters():
            if not p.requires_grad:  # the optimizer does not know it
                with self._gathered([p]):
                    weights[name] = _copy(p)
        return weights | {name: _copy(buffer) for name, buffer in self.model.named_buffers()}

    def optimizer_state(self) -> OptimizerState:
        """Its state by whole parameters on CPU, on the main rank; collective at ZeRO >= 1."""
        state = self._torch_optimizer().state
        if not state or (self.zero_stage == 0 and not self.world.is_main):
            return OptimizerState({}, {})
        one = next(iter(state.values()))
        keys = [key for key, value in one.items() if torch.is_tensor(value) and value.ndim > 0]
        scalars = {key: float(value) for key, value in one.items() if key not in keys}
        tensors = {}
        for name, p in self._named:
            for key in keys:
                whole = self._fragments.safe_get_full_optimizer_state
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
        state = self._torch_optimizer().state
        for p in self._held():
            state[p] = {key: torch.zeros_like(p, dtype=torch.float32) for key in keys}
            state[p] |= {key: torch.tensor(value) for key, value in saved.scalars.items()}
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

    def _held(self) -> Iterator[Tensor]:
        """Yield what this rank's optimizer updates: parameters, or ZeRO's partitions of them."""
        if self.zero_stage == 0:
            yield from (p for _, p in self._named)
        elif self.zero_stage < 3:
            yield from self._optimizer.single_partition_of_fp32_groups
        else:
            yield from self._optimizer.fp32_partitioned_groups_flat


def _copy(value: Tensor) -> Tensor:
    return value.detach().cpu().clone()


def used_parameters(loss: Tensor, params: list[Tensor]) -> Tensor:
    """Return bool [P]: which of `params` the graph of `loss` reaches."""
    numbers = {id(p): number for number, p in enumerate(params)}
    used = torch.zeros(len(params), dtype=torch.bool)
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        number = numbers.get(id(getattr(node, "variable", None)))
        if number is not None:
            used[number] = True
        waiting.extend(following for following, _ in node.next_functions)
    return used


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
    zero_stage: int, precision: str, reduction: str, num_virtual_shards: int, world_size: int
) -> None:
    """Raise ConfigError for combinations that cannot work."""
    if zero_stage not in (0, 1, 2, 3):
        raise ConfigError(f"engine.zero_stage={zero_stage}: choose 0, 1, 2 or 3")
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"engine.precision={precision!r}: choose fp32 or bf16")
    if reduction not in ("canonical", "native"):
        raise ConfigError(f"engine.reduction={reduction!r}: choose canonical or native")
    if world_size > num_virtual_shards:
        raise ConfigError(
            f"{world_size} workers for data.num_virtual_shards={num_virtual_shards}: start at most "
            "one worker per virtual shard, or raise data.num_virtual_shards"
        )
    if reduction == "canonical" and zero_stage == 3:
        raise ConfigError(
            "engine.zero_stage=3 partitions the weights; it needs engine.reduction=native"
        )
    if reduction == "native" and num_virtual_shards % world_size:
        raise ConfigError(
            "engine.reduction=native needs a world size that divides data.num_virtual_shards="
            f"{num_virtual_shards}, not {world_size}; engine.reduction=canonical takes any"
        )
