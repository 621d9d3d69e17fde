"""`torch.compile` for functions of the models, with the settings that all of them share."""

import functools
import logging
import os
import shutil
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def on_gpu(x: Tensor) -> bool:
    """Whether to prefer what suits GPUs: few launches, and reductions that fill all of it."""
    return x.is_cuda


@functools.cache
def has_compiler() -> bool:
    """Whether `torch.compile` finds a C++ compiler and can link; warn once if not."""
    names = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]
    reason = f"no C++ compiler found ({', '.join(names)})"
    if any(shutil.which(name) for name in names):
        reason = f"torch cannot link in {torch.__file__}, a path with a blank"
        if torch.__file__.split() == [torch.__file__]:
            return True
    logger.warning("%s: models run uncompiled, about half as fast", reason)
    return False


def keep_compiled(cache_dir: str) -> None:
    """Have torch keep compiled models below `cache_dir`, apart by kind of CPU, from run to run."""
    kind = f"{zlib.crc32(repr(sorted(torch.cpu.get_capabilities().items())).encode()):08x}"
    folder = os.path.join(os.path.expanduser(cache_dir), "inductor", kind)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)


@functools.cache
def _compile(function: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
    # Inductor's cache on disk does not tell instruction sets apart: kernels made for one crash, or
    # compute garbage, in a process that uses another (ATEN_CPU_CAPABILITY, a shared folder). The
    # width of its vectors, set here to what it would choose itself, is part of the cache's key.
    width = {"AVX2": 256, "AVX512": 512}.get(torch.backends.cpu.get_cpu_capability())
    # On GPUs, small kernels that need not wait for each other are launched as one; those with many
    # arguments are not small, and need block sizes of their own.
    options: Any = {"combo_kernels": True, "combo_kernel_max_num_args": 16, "cpp.simdlen": width}
    return torch.compile(function, dynamic=dynamic, options=options)


def compiled_if(wanted: bool, function: Callable[..., Any], dynamic: bool = True) -> Any:
    """The function, under `torch.compile` if that is wanted and possible."""
    if not wanted or torch.compiler.is_compiling() or not has_compiler():
        return function
    return _compile(function, dynamic)


def compiled_on_gpu(method: Callable[..., Tensor], dynamic: bool = True) -> Callable[..., Tensor]:
    """Compile a method on GPUs while gradients are recorded; all modules of the class share it."""

    @functools.wraps(method)
    def run(module: nn.Module, x: Tensor, *rest: Tensor) -> Tensor:
        return compiled_if(on_gpu(x) and torch.is_grad_enabled(), method, dynamic)(module, x, *rest)

    return run


# For the first eight shapes, one by one, where Inductor fails on lengths that change.
compiled_by_shape = functools.partial(compiled_on_gpu, dynamic=False)
