"""The choice of a backend: the first in the device's order that serves the call, or the one that is forced.

========= ==========================================================================
reference the spec in plain torch: any device and dtype, any transform
torch     torch's own kernel
cpu       the compiled kernels of this package
triton    the Triton kernels of this package
cuda      the compiled CUDA kernels of this package (none yet)
========= ==========================================================================
"""

import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from seqkern import spec
from seqkern.ops import _attention_backends, _hardware, _linear_backends, _recurrent_backends, _surroundings
from seqkern.ops._hardware import CPU_DTYPES, CPU_READY, TRITON_DTYPES, not_one_of
from seqkern.ops._recurrent_backends import lacks_features
from seqkern.ops._surroundings import (
    PLAIN,
    as_constant,
    goes_to_onnx,
    in_transform,
    is_looked_on,
    known_constant,
)

BACKENDS = ("reference", "torch", "cpu", "triton", "cuda")
ORDER = {"cpu": ("cpu", "torch", "reference"), "cuda": ("cuda", "triton", "torch", "reference")}
VARIABLE = "SEQKERN_BACKEND"
TRITON_OPS = frozenset(f"{cell}{form}" for cell in spec.CELLS for form in ("", "_cell"))
BY_OPS = frozenset(("cpu", "triton", "cuda"))  # those that run as the ops of this package


def present() -> tuple[str, ...]:
    """The backends that this installation has kernels of."""
    missing = {"cpu": _hardware.CPU_MISSING, "triton": _hardware.TRITON_MISSING, "cuda": "none yet"}
    return tuple(name for name in BACKENDS if not missing.get(name))


class Call(NamedTuple):
    """What a backend is asked to serve."""

    op: str  # "lstm", "gru", "rnn_tanh", "rnn_relu", the same with "_cell", "attention", "linear"
    tensors: tuple[Tensor | None, ...]  # the input first, then states and weights; `Tensors` of attention
    wanted: _attention_backends.Wanted | None = None  # of attention


class Choice(NamedTuple):
    """The backend that runs, and why each one before it declined."""

    name: str
    declined: tuple[tuple[str, str], ...] = ()


_forced: ContextVar[str | None] = ContextVar("seqkern_backend", default=None)
_watching: ContextVar[list[tuple[Call, Choice]] | None] = ContextVar("seqkern_watching", default=None)
_lock = threading.Lock()
_environment = os.environ.get(VARIABLE, "")

# Above zero while a backend is forced or choices are watched anywhere: the short way past `choose` is then closed.
special = int(bool(_environment))


def _open(step: int) -> None:
    global special
    with _lock:
        special += step


def _known(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where} is {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Forces a backend for the calls made in the block by this thread or task; None lifts an outer force.

    A function under torch.compile is called in the block; it cannot hold one, since Dynamo does not trace it.
    Raises ValueError for a name that is not a backend. A call in the block that the backend cannot serve raises
    RuntimeError with the reason.

    >>> import torch, seqkern
    >>> lstm = seqkern.nn.LSTM(3, 4)
    >>> with seqkern.backend("reference"):
    ...     output, _ = lstm(torch.zeros(2, 1, 3))
    """
    token = _forced.set(name if name is None else _known(name, "backend"))
    _open(1)
    try:
        yield
    finally:
        _open(-1)
        _forced.reset(token)


@contextmanager
def watch() -> Iterator[list[tuple[Call, Choice]]]:
    """Collects the calls made in the block and the choice made for each."""
    seen: list[tuple[Call, Choice]] = []
    token = _watching.set(seen)
    _open(1)
    try:
        yield seen
    finally:
        _open(-1)
        _watching.reset(token)


@as_constant
def _now_forced() -> str | None:
    """The force in effect; a compiled graph keeps the one it was traced under."""
    return _forced.get()


def nobody_looks_on(given: Sequence[Tensor], perhaps: Sequence[Tensor | None]) -> bool:
    """Whether the compiled kernels may run on a CPU without a gradient, past the checks and the choice: on tensors
    that are given, and some that may be None."""
    if special or is_looked_on():
        return False
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*given, *perhaps):  # type: ignore[attr-defined]
        return False
    for x in given:
        if type(x) not in PLAIN or not x.is_cpu:
            return False
    for x in perhaps:
        if x is not None and (type(x) not in PLAIN or not x.is_cpu):
            return False
    return not torch._C._is_any_autocast_enabled()  # type: ignore[attr-defined]


def serves_cpu(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether the cpu backend serves these tensors now: `_decline_cpu` is None, without the words."""
    input = tensors[0]
    assert input is not None
    dtype = input.dtype
    if not CPU_READY or dtype not in CPU_DTYPES or lacks_features(tensors):
        return False
    compiling, strided = torch.compiler.is_compiling(), torch.strided
    for t in tensors:
        if t is None:
            continue
        if t.dtype is not dtype or not t.is_cpu or t.layout is not strided:
            return False
        if not compiling and type(t) not in PLAIN:
            return False
    return not (torch._C._is_any_autocast_enabled() or in_transform() or goes_to_onnx())  # type: ignore[attr-defined]


def _decline_cpu(call: Call) -> str | None:
    return _hardware.CPU_MISSING or _unfit(call, ("cpu",), CPU_DTYPES)


def _unfit(call: Call, devices: tuple[str, ...], dtypes) -> str | None:
    """Why kernels on such devices for such dtypes cannot take the tensors of a call, or the state they come in."""
    given = [t for t in call.tensors if t is not None]
    dtype = given[0].dtype
    if call.wanted is None and lacks_features(call.tensors):
        return "a size is zero"
    for t in given:
        if t.device.type not in devices:
            return f"a tensor is on {t.device}"
        if t.layout is not torch.strided:
            return f"a tensor has layout {t.layout}"
        if t.dtype != dtype:
            return f"dtypes are mixed ({dtype} and {t.dtype})"
        if type(t) not in PLAIN and not torch.compiler.is_compiling():
            return f"a tensor is a {type(t).__name__}"
    if reason := not_one_of(dtype, dtypes):
        return reason
    if torch._C._is_any_autocast_enabled():  # type: ignore[attr-defined]
        return "autocast is on, whose casts are torch's own"
    return _surroundings.declines()


def _decline_triton(call: Call) -> str | None:
    if call.op not in TRITON_OPS:
        return f"this version has no triton kernel for {call.op}"
    if _hardware.TRITON_MISSING:
        return _hardware.TRITON_MISSING
    devices = ("cuda", "cpu") if _hardware.INTERPRETED else ("cuda",)
    return _unfit(call, devices, TRITON_DTYPES) or _hardware.lacks_triton(call.tensors)


def declines(name: str, call: Call) -> str | None:
    """Why a backend cannot serve a call, or None if it can."""
    if call.wanted is not None:
        reason = _attention_backends.declines(name, call.tensors, call.wanted)  # type: ignore[arg-type]
        return reason or (_surroundings.declines() if name in BY_OPS else None)
    if name == "cpu":
        return _decline_cpu(call)
    if name == "triton":
        return _decline_triton(call)
    if name == "cuda":
        return f"this version has no {name} kernel for {call.op}"
    return None


def torch_outruns(op: str, tensors: Sequence[Tensor | None]) -> str | None:
    """Why torch's kernel is known to be faster on a CPU than ours, which then stand aside unless forced.

    Fixed rules from measurements that docs/decisions.md tells of; never of the load or the number of threads.
    """
    if op == "linear":
        return _linear_backends.torch_outruns_layer(tensors)
    return _recurrent_backends.torch_outruns(op, tensors)


def _cpu_avoids(call: Call) -> str | None:
    """Why the compiled kernels are left aside unless they are forced."""
    reason = None if call.wanted is not None else torch_outruns(call.op, call.tensors)
    return reason and f"{reason} is faster on torch's kernel"


def _torch_avoids(call: Call) -> str | None:
    """Why torch's kernel is left aside unless it is forced."""
    input = call.tensors[0]
    assert input is not None
    if call.wanted is not None and call.wanted.only_torch:
        return None
    if in_transform():
        return f"{_surroundings.TRANSFORMED}, which not all of torch's kernels know"
    if torch.compiler.is_compiling() and call.op == "lstm" and input.is_cpu and not goes_to_onnx():
        return "torch.compile cannot differentiate the oneDNN kernel behind torch's LSTM"
    return None


@known_constant
def _is_hopper(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index)[0] == 9


def _triton_avoids(call: Call) -> str | None:
    """Why the Triton kernels are left aside unless they are forced: fixed rules, as docs/decisions.md tells."""
    input = call.tensors[0]
    assert input is not None
    if not input.is_cuda or not _is_hopper(input.device.index or 0):
        return (
            "no GPU has shown it to be faster than torch's kernel yet; try it with seqkern.backend('triton')"
        )
    if torch.compiler.is_compiling():
        return "under torch.compile it has not been timed; try it with seqkern.backend('triton')"
    if reason := _unready():
        return reason
    if call.wanted is not None:
        return _attention_backends.torch_outruns_on_gpu(call.tensors, call.wanted)  # type: ignore[arg-type]
    return _recurrent_backends.torch_outruns_on_gpu(call.op, call.tensors)


@cache
def _unready() -> str:
    """What Triton lacks here to launch a kernel; empty if nothing."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler for its launchers, and there is no gcc and no clang"
    try:
        import_module("seqkern.kernels.rnn")
        # Compiles the helper that every launch needs: it takes Python.h, libcuda and a cache that can be written.
        import_module("triton.runtime").driver.active.get_current_target()
    except Exception as e:  # whatever a Triton that was not made for this machine raises
        return f"Triton does not work here ({type(e).__name__}: {e})"
    return ""


def forced() -> str | None:
    """The backend that is forced here and now."""
    name = _now_forced()
    if name is None and _environment:
        return _known(_environment, f"the environment variable {VARIABLE}")
    return name


def unseen(name: str) -> bool:
    """Whether a backend may run what is no call of its own: none other is forced, and nobody watches."""
    return not special or (forced() in (None, name) and _watching.get() is None)


def choose(call: Call, name: str | None = None) -> Choice:
    """The backend for a call, which `watch` sees; ``name`` forces one for this call, before `backend` and
    SEQKERN_BACKEND.

    Raises ValueError for an unknown name and RuntimeError if the forced backend declines.
    """
    return note(call, pick(call, name))


def pick(call: Call, name: str | None = None) -> Choice:
    """What `choose` returns, unseen by `watch`."""
    if name is not None:
        named = _known(name, "backend")
    else:
        named = forced()
    if named is not None:
        reason = declines(named, call)
        if (
            _hardware.INTERPRETED and named == "triton" != forced()
        ):  # the op, and its backward, could not tell
            reason = "Triton's interpreter runs within seqkern.backend('triton')"
        if reason:
            raise RuntimeError(
                f"backend {named!r} was forced for {call.op} but cannot serve it: {reason}; "
                f"leave the choice open or force another of {', '.join(b for b in present() if b != named)}"
            )
        return Choice(named)
    input = call.tensors[0]
    assert input is not None
    declined, avoids = [], {"cpu": _cpu_avoids, "torch": _torch_avoids, "triton": _triton_avoids}
    for each in ORDER.get(input.device.type, ("torch", "reference")):
        reason = declines(each, call) or (avoids[each](call) if each in avoids else None)
        if reason is None:
            return Choice(each, tuple(declined))
        declined.append((each, reason))
    raise AssertionError("the reference serves every call")


def note(call: Call, choice: Choice) -> Choice:
    """Shows a choice to `watch`."""
    if not torch.compiler.is_compiling() and (seen := _watching.get()) is not None:
        seen.append((call, choice))
    return choice
