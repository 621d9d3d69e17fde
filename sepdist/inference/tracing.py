"""Write a separator as one file that runs without sepdist: torch.export or ONNX, at any length."""

import contextlib
import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from sepdist import storage
from sepdist.inference.export import check_new, load_separator
from sepdist.reporting import to_json

SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}


class TraceError(ValueError):
    """A model cannot be written in a format."""


def write(url: str, output: str, kind: str) -> dict[str, Any]:
    """Write the separator at `url` to the new file `output`; returns what is written about it.

    TraceError if the model cannot be traced, or a package is missing.
    """
    if not output.endswith(SUFFIXES[kind]):
        raise TraceError(f"{output}: a file of format {kind} ends in {SUFFIXES[kind]}")
    if kind == "onnx" and not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise TraceError("run: pip install onnx onnxscript (the extra `onnx` has them)")
    check_new(output)
    export = load_separator(url)
    facts = {"sample_rate": export.sample_rate, "min_samples": least_samples(export.model)}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model" + SUFFIXES[kind])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                save(trace(export.model), path, kind, facts)
        except Exception as error:  # of the compiler, which has many
            name, deepest = type(export.model).__name__, error
            while isinstance(deepest.__cause__, Exception):
                deepest = deepest.__cause__
            reason = str(deepest).strip().partition("\n")[0]
            raise TraceError(f"{name} cannot be written as {kind}: {reason}") from error
        storage.put_file(path, output)
    return facts


def least_samples(model: nn.Module) -> int:
    """The fewest samples that a traced model takes: two frames, and two chunks where it has any."""
    frame, stride = (int(getattr(model, name, 1)) for name in ("min_length", "stride"))
    return frame + stride * int(getattr(model, "chunk_size", 2))


def trace(model: nn.Module) -> ExportedProgram:
    """The program of [B, T] -> [B, S, T] for any B, and any T from `least_samples` up."""
    for module in model.modules():
        if hasattr(module, "compiled"):  # as in ConvTasNet and its blocks
            module.compiled = False  # type: ignore[assignment]
    least = least_samples(model)
    sizes = ({0: Dim("batch", min=1), 1: Dim("num_samples", min=least)},)
    with torch.no_grad(), _lstm_by_shape():
        return torch.export.export(
            model.eval(),
            (torch.randn(2, 3 * least + 1, generator=torch.Generator().manual_seed(0)),),
            dynamic_shapes=sizes,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def save(program: ExportedProgram, path: str, kind: str, facts: dict[str, Any]) -> None:
    """Write a traced model and the facts about it to a file."""
    if kind == "torch":
        torch.export.save(program, path, extra_files={"sepdist.json": to_json(facts)})
        return
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # no notes about other packages
    with _lstm_by_shape():
        names: Any = {"input_names": ["mixture"], "output_names": ["estimates"]}
        found = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    assert found is not None
    found.model.metadata_props.update({name: str(value) for name, value in facts.items()})
    found.save(path)


@contextlib.contextmanager
def _lstm_by_shape() -> Iterator[None]:
    """Let a tracer take the output of an LSTM from its sizes.

    Its own way runs each time step, which fixes their number. The LSTM stays one operation.
    """
    operation, keys = torch.ops.aten.lstm.input, torch._C.DispatchKey
    before = dict(operation.py_kernels)

    def run(x: Tensor, hidden: Any, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        size = hidden[0].shape[2] * (1 + bool(others[-2]))  # of both directions
        return x.new_empty(*x.shape[:2], size), hidden[0].clone(), hidden[1].clone()

    for key in (keys.CompositeImplicitAutograd, keys.Autograd):
        operation.py_kernels[key] = run
    operation._dispatch_cache.clear()
    try:
        yield
    finally:
        operation.py_kernels.clear()
        operation.py_kernels.update(before)
        operation._dispatch_cache.clear()
