"""How an op becomes `torch.ops.dsv3.<name>`: schema, reference, output allocation, native launch.

An op runs natively where its tensors are on a Hopper GPU (compute capability 9.0) and its `supports` has no objection;
otherwise its reference runs, on the same device. The fallback is logged once an op and reason. Some native calls never come
here: csrc/torch_ops.cpp has their kernels, and hands on what it does not take.
Primitives have no autograd of their own: the functions of `dsv3.ops` differentiate by calling a backward primitive.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

try:
    from dsv3 import _C

    NATIVE_ERROR = ""
except ImportError as error:
    _C = None  # type: ignore[assignment]
    absent = "cannot import name" in str(error)  # a module that is there but does not load says what it lacks
    NATIVE_ERROR = "dsv3 was installed without native code" if absent else str(error)

log = logging.getLogger("dsv3")
library = torch.library.Library("dsv3", "DEF")
# The kernel in Python of an op that has one in csrc/torch_ops.cpp.
python_library = torch.library.Library("dsv3_python", "DEF")


@dataclass(frozen=True)
class Op:
    """A registered primitive. `shapes` describes its tensors for a reader; `native` is False for reference-only ops."""

    name: str
    schema: str
    shapes: str
    native: bool


OPS: dict[str, Op] = {}
FALLBACKS: dict[tuple[str, str], int] = {}  # (op, reason), in the order met: how often
_forced_references = 0


def native() -> Any:
    """The native module; raises RuntimeError with the reason where there is none."""
    if _C is None:
        raise RuntimeError(f"native ops are not available: {NATIVE_ERROR}")
    return _C


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether a CUDA device has compute capability 9.0."""
    return torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def sm_count(device: torch.device) -> int:
    """Number of multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def note(name: str, reason: str) -> None:
    """Logs once why an op runs on its reference, and keeps it for `dsv3 doctor`."""
    if (name, reason) not in FALLBACKS:
        log.info("%s runs on its reference: %s", name, reason)
    FALLBACKS[name, reason] = FALLBACKS.get((name, reason), 0) + 1


def _no_objection(*args: Any) -> str | None:
    return None


def _describe(x: torch.Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)} strides {tuple(x.stride())} on {x.device}".removeprefix("torch.")


def refuse(name: str, broken: str, **arguments: Any) -> NoReturn:
    """A ValueError that says what the arguments of an op break and what its tensors are."""
    found = ", ".join(f"{key} {_describe(x)}" for key, x in arguments.items() if isinstance(x, torch.Tensor))
    raise ValueError(f"{name}: {broken}; got {found}")


def define(
    schema: str,
    *,
    shapes: str,
    reference: Callable[..., Any],
    allocate: Callable[..., Any],
    launch: Callable[..., None] | None = None,
    supports: Callable[..., str | None] = _no_objection,
    rule: Callable[..., str | None] = _no_objection,
) -> None:
    """Registers `dsv3::<schema>`.

    Args:
        schema: torch schema, for example "rmsnorm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)".
        shapes: shapes and dtypes for `python -m dsv3.ops`.
        reference: plain PyTorch implementation, called under no_grad.
        allocate: returns the empty outputs for the arguments; also the fake kernel. None for ops that only mutate.
        launch: launch(outputs, *args) calls the native op; None where there is no kernel yet.
        supports: returns why the native op can not take these arguments, or None.
        rule: returns what the arguments break, for a ValueError with their shapes, or None. A native call that C++ takes
            does not ask it: the native op must refuse whatever breaks the rule.
    """
    name = schema[: schema.index("(")]
    library.define(schema)
    names = [argument.name for argument in torch._C.parse_schema(f"dsv3::{schema}").arguments]

    def check(args: tuple[Any, ...]) -> None:
        broken = rule(*args)
        if broken is not None:
            refuse(name.removesuffix("_out"), broken, **dict(zip(names, args, strict=True)))

    def fake(*args: Any) -> Any:
        check(args)
        return allocate(*args)

    @torch.no_grad()
    def run_reference(*args: Any) -> Any:
        check(args)
        kind = _first_tensor(args).device.type
        if torch.is_autocast_enabled(kind):  # a reference computes in the dtypes that it names
            with torch.autocast(kind, enabled=False):
                return reference(*args)
        return reference(*args)

    def run_cuda(*args: Any) -> Any:
        check(args)
        reason = _why_reference(args, launch, supports)
        if reason is not None:
            if not _forced_references:
                note(name, reason)
            return run_reference(*args)
        outputs = allocate(*args)
        assert launch is not None
        launch(outputs, *args)
        return outputs

    def run_handed_on(*args: Any) -> Any:
        try:
            device = _first_tensor(args).device
            if device.type == "cuda" and is_hopper(device):
                _C.use_device(device.index)  # from the next call on
            return run_cuda(*args)
        except BaseException as error:
            _C.keep_error(error)  # torch's C interface drops it
            raise

    library.impl(name, run_reference, "CPU")
    if launch is not None and _C is not None and _C.register_torch_op(name, "CUDA"):
        python_library.define(schema)
        python_library.impl(name, run_handed_on, "CUDA")
    else:
        library.impl(name, run_cuda if launch is not None else run_reference, "CUDA")
    torch.library.register_fake(f"dsv3::{name}", fake, lib=library)
    OPS[name] = Op(name, schema, shapes, launch is not None)


def _first_tensor(args: tuple[Any, ...]) -> torch.Tensor:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg
        if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], torch.Tensor):
            return arg[0]
    raise AssertionError("an op without tensors")


def why_no_kernels(device: torch.device) -> str | None:
    """Why nothing runs natively on a device, or None."""
    if device.type != "cuda":
        return "references run there"
    if _forced_references:
        return "references are forced"
    if _C is None:
        return NATIVE_ERROR
    return None if is_hopper(device) else f"{torch.cuda.get_device_name(device)} is not a Hopper GPU"


def _why_reference(args: tuple[Any, ...], launch: Any, supports: Callable[..., str | None]) -> str | None:
    return why_no_kernels(_first_tensor(args).device) or supports(*args)


class ReferenceOps:
    """Context manager that makes every op run on its reference (also the backward calls made inside it)."""

    def __enter__(self) -> None:
        self._count(1)

    def __exit__(self, *exc: object) -> None:
        self._count(-1)

    def _count(self, change: int) -> None:
        global _forced_references
        _forced_references += change
        if _C is not None:
            _C.force_references(_forced_references > 0)


def require_dtype(name: str, wanted: str, dtype: torch.dtype, *tensors: torch.Tensor) -> None:
    """A ValueError of the function `name` where a tensor has another dtype; wanted: what it should say was expected."""
    if any(t.dtype != dtype for t in tensors):
        found = [str(t.dtype).removeprefix("torch.") for t in tensors]
        raise ValueError(f"{name}: expected {wanted}, got {found}")


def check_dtype(name: str, tensor: torch.Tensor, *dtypes: torch.dtype) -> str | None:
    """The objection of a `supports` to a dtype."""
    return None if tensor.dtype in dtypes else f"{name} is {tensor.dtype}".replace("torch.", "")
