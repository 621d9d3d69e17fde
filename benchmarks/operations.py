"""Count what a training step of each model would launch on a GPU; no GPU is needed.

    python -m benchmarks.operations [--models conv_tasnet dprnn] [--seconds 1] [--batch 2]

Prints one JSON line. The step is the forward and backward pass of one micro-batch with the
objective `separation`. An operation that PyTorch dispatches counts as one launch (`eager`), unless
it only makes a view or works on no tensor (`views`). A compiled function counts the `kernels` and
the calls of libraries (`library_calls`: matrix products, attention) in the code that Inductor
generates for an H100: its graphs are captured on the CPU, moved to a pretended CUDA device and
lowered, but neither compiled nor run. `launches` is the sum of the three. `operations` counts a
compiled call as one and its library calls: what PyTorch itself would have to dispatch. A recurrent
layer counts as one per direction (`recurrences`, in `eager`). On a GPU a few operations launch two
or three kernels, and PyTorch may choose other ones for attention. Dropout is off.
"""

import argparse
import json
import re
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch.fx.graph import CodeGen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from sepdist import slots
from sepdist.data.records import Batch
from sepdist.models import compiling
from sepdist.objectives.separation import Separation

MODELS = ("conv_tasnet", "sepformer", "dprnn", "dptnet", "sandglasset")
CONFIGS = Path(__file__).parent.parent / "configs" / "model"
GOALS = {"conv_tasnet": 500}
LAUNCH = re.compile(
    r"^ +(?:\w+ = )?(?:(triton_)\w+\.run|extern_kernels\.\w+|torch\.ops\.\S+)\(", re.MULTILINE
)  # of generated code: `triton_poi_fused_0.run(`, `extern_kernels.mm(`
NO_LAUNCH = {"aten::_unsafe_view", "aten::promote_types", "aten::lift_fresh"}
H100 = {
    "multi_processor_count": 132,
    "major": 9,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "warp_size": 32,
}


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Let Inductor generate code for an H100 that is not there."""
    properties = types.SimpleNamespace(
        name="H100",
        gcnArchName="",
        minor=0,
        total_memory=80 * 2**30,
        shared_memory_per_block_optin=2**17,
        **H100,
    )
    description = DeviceProperties(type="cuda", index=0, cc=90, max_threads_per_block=1024, **H100)
    replies = {
        "torch._inductor.scheduler.has_triton": True,
        "torch._inductor.runtime.hints.DeviceProperties.create": description,
        "torch.utils._triton.triton_hash_with_backend": "none",
        "torch.cuda.is_available": True,
        "torch.cuda._lazy_init": None,
        "torch.cuda.current_device": 0,
        "torch.cuda.device_count": 1,
        "torch.cuda.get_device_capability": (9, 0),
        "torch.cuda.get_device_properties": properties,
        "torch.cuda.synchronize": None,
    }
    with ExitStack() as stack:
        for name, reply in replies.items():
            stack.enter_context(mock.patch(name, lambda *_, reply=reply: reply))
        yield


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let the models choose what they choose on a GPU."""
    with ExitStack() as stack:
        for module in ("compiling", "conv_block", "dual_path"):
            stack.enter_context(mock.patch(f"sepdist.models.{module}.on_gpu", lambda _: True))
        yield


def cuda_source(graph_module: torch.fx.GraphModule) -> str:
    """The code that Inductor generates for a graph captured on the CPU, were it on a GPU."""
    graph = torch.fx.GraphModule(graph_module, graph_module.graph)
    graph.graph.set_codegen(CodeGen())
    fake_mode = torch._guards.detect_fake_mode(
        [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    )

    def moved(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda:0")

    kept = {node: (node.kwargs, node.meta) for node in graph.graph.nodes}
    with pretended_gpu(), fake_mode:
        for node in graph.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
            node.meta = {"val": tree_map_only(Tensor, moved, node.meta.get("val"))}
        inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        lowering = GraphLowering(graph, example_inputs=inputs, shape_env=fake_mode.shape_env)
        with (
            V.set_graph_handler(lowering),
            V.set_fake_mode(fake_mode),
            V.set_debug_handler(DebugContext()),
        ):
            lowering.run(*inputs)
            source = lowering.codegen()[0].value
    for node, (kwargs, meta) in kept.items():
        node.kwargs, node.meta = kwargs, meta
    return source


class LaunchCounter(TorchDispatchMode):
    """Count launches by kind; compiled code tells what it would launch."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.inside = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled functions run compiled while the mode is on."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside:
            idle = func.is_view or func._schema.name in NO_LAUNCH
            self.counts["views" if idle else "eager"] += 1
            self.counts["recurrences"] += "rnn" in func._schema.name
        return func(*args, **(kwargs or {}))


class CountingCompiler:
    """Stands for Inductor: runs graphs as they are and counts what a GPU would launch."""

    def __init__(self) -> None:
        self.counter = LaunchCounter()
        self.sources: list[str] = []

    def lower(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        """What AOTAutograd calls for each forward and each backward graph."""
        source = cuda_source(graph)
        self.sources.append(source)
        launches = Counter(kind == "triton_" for kind in LAUNCH.findall(source))

        def run(arguments: list[Any]) -> Any:
            self.counter.inside = True
            results = graph(*arguments)
            self.counter.inside = False
            self.counter.counts["kernels"] += launches[True]
            self.counter.counts["library_calls"] += launches[False]
            self.counter.counts["compiled_calls"] += 1
            return results

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def compile(self, function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        """What the models get in place of `torch.compile`."""
        backend = aot_autograd(
            fw_compiler=self.lower,
            bw_compiler=self.lower,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )
        return TORCH_COMPILE(function, backend=backend, dynamic=True)


TORCH_COMPILE = torch.compile


def count(preset: str, batch_size: int, seconds: float) -> dict[str, int]:
    """The launches of one micro-batch of a model of configs/model."""
    torch.manual_seed(0)
    node = yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text()) | {"num_speakers": 2}
    model: nn.Module = slots.build("model", node)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # part of other kernels; its draws cannot be lowered here
    shape = (batch_size, 2, int(seconds * 8000))
    sources = 0.1 * torch.randn(shape)
    lengths = torch.full(shape[:1], shape[2])
    ids = [str(index) for index in range(batch_size)]
    batch = Batch(ids, torch.arange(batch_size), sources.sum(1), sources, None, lengths)
    compiler = CountingCompiler()
    torch._dynamo.reset()
    compiling._compile.cache_clear()
    with (
        mock.patch("torch.compile", compiler.compile),
        as_on_a_gpu(),
        torch._inductor.config.patch(combo_kernels=True, combo_kernel_max_num_args=16),
    ):
        for _ in range(2):  # the first compiles
            compiler.counter.counts.clear()
            model.zero_grad()
            with compiler.counter:
                Separation()(model, batch)[0].backward()
    counts = compiler.counter.counts
    counts["operations"] = counts["eager"] + counts["compiled_calls"] + counts["library_calls"]
    counts["launches"] = counts["eager"] + counts["kernels"] + counts["library_calls"]
    return dict(counts)


def main() -> None:
    """Print the counts and whether they meet the goals."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS, help="files of configs/model")
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=2)
    arguments = parser.parse_args()
    counts = {name: count(name, arguments.batch, arguments.seconds) for name in arguments.models}
    goals = {
        f"{kind} of {name}": {
            "goal": goal,
            "measured": counts[name][kind],
            "met": counts[name][kind] <= goal,
        }
        for name, goal in GOALS.items()
        for kind in ("operations", "launches")
        if name in counts
    }
    print(json.dumps({"name": "operations", "counts": counts, "goals": goals}))


if __name__ == "__main__":
    main()
