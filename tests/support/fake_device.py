"""A device that holds shapes and no values, refuses host tensors, and records every wait.

On it a model or an objective runs forward and backward as on a GPU: an operation that mixes devices
raises, and whatever would make the host wait for a GPU is recorded with its line. Host tensors are
real. Autocast follows torch's own lists for CUDA. Registering the device changes torch for good
(`torch.accelerator`, pinned memory), so a process of its own does it (fake_cases.py).
"""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.amp.autocast_mode import _cast
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "fake"
KEY = "AutocastPrivateUse1"
AUTOCAST_LISTS = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
aten = torch.ops.aten


class WaitsError(RuntimeError):
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
    for key in (KEY, "AutogradPrivateUse1"):
        casts.impl(aten.lstm.input, _lstm, key)
    return [everything, casts]


class OnDevice(Tensor):
    """A tensor on the fake device; `inner`, on the meta device, has its shape, strides and type."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnDevice":
        place = {"dtype": inner.dtype, "device": torch.device(NAME, 0)}
        with torch.inference_mode(False):  # or views of parameters could not be made there
            made = Tensor._make_wrapper_subclass(
                cls, inner.shape, inner.stride(), inner.storage_offset(), **place
            )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside of FakeDevice")


class FakeDevice(TorchDispatchMode):
    """While it is on, torch.device("fake") can be used; `waits` are what it recorded.

    A value that the host reads is 1 (True). A copy from the host waits unless it is non-blocking.
    """

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device(NAME, 0)
        self.waits: list[str] = []
        self._threads = torch.autograd.set_multithreading_enabled(True)

    def __enter__(self) -> "FakeDevice":
        self._threads = torch.autograd.set_multithreading_enabled(False)
        # torch.tensor(..., device=...) then makes a host tensor first, and copies it in sight.
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)
        self._threads.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        place = kwargs.get("device")
        elsewhere = place is not None and torch.device(place).type != NAME
        tensors = [x for x in _leaves((args, *kwargs.values())) if isinstance(x, Tensor)]
        host = [x for x in tensors if not isinstance(x, OnDevice)]
        if len(host) == len(tensors) and (place is None or elsewhere):
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        ):
            with self:  # elsewhere such operations have come apart before they are seen here
                return func.decompose(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self._wait(func)
            return torch.ones((), dtype=args[0].dtype).item()
        if (host or elsewhere) and func in (aten._to_copy.default, aten.copy_.default):
            return self._copy(func, args, kwargs)
        if any(x.ndim for x in host):
            if func not in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
                raise RuntimeError(f"{func} at {_place()} gets tensors of the host")
            self._wait(func)  # it copies host indices to the device
        known = {id(x.inner): x for x in tensors if isinstance(x, OnDevice)}
        try:
            found = func(*_inner(args), **{name: _inner(x) for name, x in kwargs.items()})
        except NotImplementedError as error:  # of nonzero and its like
            raise WaitsError(f"{func} at {_place()}") from error

        if torch.Tag.inplace_view in func.tags:  # of the tensor itself, too
            with no_dispatch(), torch._C._PreserveDispatchKeyGuard():
                torch._C._set_meta_in_tls_dispatch_include(True)
                return func(*args, **kwargs)

        def outer(x: Tensor) -> Tensor:  # an operation in place returns its argument
            return known[id(x)] if id(x) in known else OnDevice(x)

        return pytree.tree_map_only(Tensor, outer, found)

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """A copy between the devices; on the host all values are 1."""
        if func is aten.copy_.default:
            self._wait(func, args[2:] == (True,) or bool(kwargs.get("non_blocking")))
            return args[0] if isinstance(args[0], OnDevice) else args[0].fill_(1)
        self._wait(func, bool(kwargs.get("non_blocking")))
        dtype = kwargs.get("dtype") or args[0].dtype
        if isinstance(args[0], OnDevice):
            return torch.ones(args[0].shape, dtype=dtype)
        return OnDevice(torch.empty_like(args[0], dtype=dtype, device="meta"))

    def _wait(self, func: Any, non_blocking: bool = False) -> None:
        if not non_blocking:
            self.waits.append(f"{func} at {_place()}")


def _leaves(x: Any) -> Iterator[Any]:
    for one in x:
        if isinstance(one, list | tuple):
            yield from _leaves(one)
        else:
            yield one


def _inner(x: Any) -> Any:
    """Arguments of an operation as it runs on the meta device."""
    if isinstance(x, OnDevice):
        return x.inner
    if isinstance(x, list | tuple):
        return [_inner(one) for one in x]
    if isinstance(x, Tensor) and x.ndim:
        return x.to("meta")
    return torch.device("meta") if isinstance(x, torch.device) else x


class _Lstm(torch.autograd.Function):
    """One operation each way, as cuDNN's; torch would else run each step by itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_hidden: int, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        return x.new_empty(*x.shape[:-1], num_hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = (torch.empty_like(one) for one in ctx.saved_tensors)
        return x, None, *weights


def _lstm(x: Tensor, states: list[Tensor], weights: list[Tensor], *options: Any) -> Any:
    if torch.is_autocast_enabled(NAME):
        dtype = torch.get_autocast_dtype(NAME)
        x, weights = x.to(dtype), [weight.to(dtype) for weight in weights]
    for one in (x, *states, *weights):
        assert one.device.type == NAME, f"an LSTM gets a tensor on {one.device}"
    num_hidden = states[0].shape[-1] * (2 if options[4] else 1)
    with torch.autocast(NAME, enabled=False):
        return _Lstm.apply(x, num_hidden, *weights), *states


def _place() -> str:
    """The innermost line of the package that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/sepdist/" in name:
            return f"{name[name.rindex('/sepdist/') + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside sepdist"


_libraries = _register()
