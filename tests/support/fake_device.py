"""A device that holds shapes and no values, refuses host tensors, and records every wait.

On it a model or an objective runs forward and backward as on a GPU: an operation that mixes devices
raises, and whatever would make the host wait for a GPU is recorded with its line. Host tensors are
real. Autocast follows torch's own lists for CUDA. Registering the device changes torch for good
(`torch.accelerator`, pinned memory), so use it in a process of its own (tests/fake_device_cases.py).
"""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.amp.autocast_mode import _cast
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "fake"
KEY = "AutocastPrivateUse1"
AUTOCAST_LISTS = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
aten = torch.ops.aten


class Waits(RuntimeError):
    """An operation whose result has a shape that the host learns from the device only."""


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        pass


def _autocast_list(name: str) -> Iterator[Any]:
    """The operators of one of torch's lists for autocast on CUDA."""
    text = AUTOCAST_LISTS.read_text()
    block = re.search(rf"#define {name}\(_\)(.*?)\n\n", text, re.DOTALL)
    assert block is not None, name
    for operator, overload in re.findall(r"_\((\w+)(?:, (\w+))?\)", block[1]):
        packet = getattr(aten, operator, None)
        if packet is not None and (overload or "default") in packet.overloads():
            yield getattr(packet, overload or "default")


def _casting(operator: Any, choose: Callable[[list[Tensor]], torch.dtype | None]) -> Any:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        floats = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
        dtype = None if kwargs.get("dtype") else choose(floats)
        with torch.autocast(NAME, enabled=False):
            if dtype is not None:
                args, kwargs = _cast((args, kwargs), NAME, dtype)
            return operator(*args, **kwargs)

    return kernel


def _widest(floats: list[Tensor]) -> torch.dtype | None:
    return torch.float32 if any(x.dtype == torch.float32 for x in floats) else None


def _register() -> list[torch.library.Library]:
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    everything, casts = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(torch.library.fallthrough_kernel, KEY)
    for name, choose in (
        ("AT_FORALL_LOWER_PRECISION_FP", lambda floats: torch.get_autocast_dtype(NAME)),
        ("AT_FORALL_FP32", lambda floats: torch.float32),
        ("AT_FORALL_FP32_SET_OPT_DTYPE", lambda floats: torch.float32),
        ("AT_FORALL_PROMOTE", _widest),
    ):
        for operator in _autocast_list(name):
            casts.impl(operator, _casting(operator, choose), KEY)
    return [everything, casts]


_libraries = _register()


class FakeDevice(TorchDispatchMode):
    """While it is on, tensors on torch.device("fake") are fake; `waits` are what it recorded.

    A value that the host reads is 1 (True). A copy from the host waits unless it is non-blocking.
    """

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device(NAME, 0)
        self.waits: list[str] = []
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._threads = torch.autograd.set_multithreading_enabled(True)

    def __enter__(self) -> "FakeDevice":
        self._threads = torch.autograd.set_multithreading_enabled(False)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._threads.__exit__(None, None, None)
        for module in [one for name, one in sys.modules.items() if name.startswith("sepdist.")]:
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):  # it may keep tensors of this device
                    value.cache_clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        held = [x for x in leaves if isinstance(x, FakeTensor)]
        place = kwargs.get("device")
        here = place is not None and torch.device(place).type == NAME
        if not held and not here:
            return func(*args, **kwargs)
        host = [x for x in leaves if not isinstance(x, FakeTensor) and x.ndim]
        if func is aten._local_scalar_dense.default:
            self._wait(func)
            return torch.ones((), dtype=args[0].dtype).item()
        if func is aten._to_copy.default and held and place is not None and not here:
            self._wait(func, kwargs)
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            self._wait(func, {"non_blocking": args[2:] == (True,)})
            return args[0].fill_(1)
        if func is aten.copy_.default and not isinstance(args[1], FakeTensor):
            self._wait(func, {"non_blocking": args[2:] == (True,)})
            return args[0]
        if func is aten._to_copy.default and not held:
            self._wait(func, kwargs)
        if host and func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            self._wait(func)  # host indices are copied to the device
        try:
            with self._fakes:
                if func is aten._to_copy.default and not held:
                    dtype = kwargs.get("dtype") or args[0].dtype
                    return torch.empty_like(args[0], dtype=dtype, device=self.device)
                args, kwargs = pytree.tree_map_only(Tensor, self._as_fake, (args, kwargs))
                return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise Waits(f"{func} at {_place()}") from error

    def _as_fake(self, x: Tensor) -> Tensor:
        return x if isinstance(x, FakeTensor) else self._fakes.from_tensor(x)

    def _wait(self, func: Any, kwargs: Any = None) -> None:
        if not (kwargs or {}).get("non_blocking"):
            self.waits.append(f"{func} at {_place()}")


def _place() -> str:
    """The innermost line of the package that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/sepdist/" in name:
            return f"{name[name.rindex('/sepdist/') + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside sepdist"
