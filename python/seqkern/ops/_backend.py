"""The choice of a backend: the first in the device's order that serves the call, or the one that is forced.

========= ==========================================================================
reference the spec in plain torch: any device and dtype, any transform
torch     torch's own kernel
cpu       the compiled kernels of this package
triton    the Triton kernels of this package (attention)
cuda      the compiled CUDA kernels of this package (none yet)
========= ==========================================================================
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from seqkern.ops import _attention_backends, _library

BACKENDS = ("reference", "torch", "cpu", "triton", "cuda")
ORDER = {"cpu": ("cpu", "torch", "reference"), "cuda": ("cuda", "triton", "torch", "reference")}
CPU_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
VARIABLE = "SEQKERN_BACKEND"
PLAIN = frozenset((Tensor, Parameter))

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the kernels run on the CPU, slowly, for tests

CPU_READY = _library.native() is not None
CPU_MISSING = _library.why_missing()


class Call(NamedTuple):
    """What a backend is asked to serve."""

    op: str  # "lstm", "gru", "rnn_tanh", "rnn_relu", the same with "_cell", "attention"
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


def _now_forced() -> str | None:
    """The force in effect; a compiled graph keeps the one it was traced under."""
    return _forced.get()


# What torch.compiler.assume_constant_result does, which imports the whole of Dynamo to do it: a second.
_now_forced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def in_transform() -> bool:
    """Whether a functorch transform or a forward-mode level is open: the ops know only reverse mode."""
    if torch._C._are_functorch_transforms_active():  # type: ignore[attr-defined]
        return True
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def serves_cpu(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether the cpu backend serves these tensors now: `_decline_cpu` is None, without the words."""
    input = tensors[0]
    assert input is not None
    dtype = input.dtype
    if not CPU_READY or dtype not in CPU_DTYPES or input.layout is not torch.strided:
        return False
    compiling = torch.compiler.is_compiling()
    for t in tensors:
        if t is not None and (t.dtype is not dtype or not t.is_cpu or not (compiling or type(t) in PLAIN)):
            return False
    return not (torch._C._is_any_autocast_enabled() or in_transform())  # type: ignore[attr-defined]


def _decline_cpu(call: Call) -> str | None:
    if not CPU_READY:
        return CPU_MISSING
    given = [t for t in call.tensors if t is not None]
    dtype = given[0].dtype
    for t in given:
        if not t.is_cpu:
            return f"a tensor is on {t.device}"
        if t.layout is not torch.strided:
            return f"a tensor has layout {t.layout}"
        if t.dtype != dtype:
            return f"dtypes are mixed ({dtype} and {t.dtype})"
        if type(t) not in PLAIN and not torch.compiler.is_compiling():
            return f"a tensor is a {type(t).__name__}"
    if dtype not in CPU_DTYPES:
        return f"the dtype is {dtype}, not one of {', '.join(sorted(map(str, CPU_DTYPES)))}"
    if torch._C._is_any_autocast_enabled():  # type: ignore[attr-defined]
        return "autocast is on, whose casts are torch's own"
    if in_transform():
        return "a function transform or forward-mode differentiation is active"
    return None


def declines(name: str, call: Call) -> str | None:
    """Why a backend cannot serve a call, or None if it can."""
    if call.wanted is not None:
        reason = _attention_backends.declines(name, call.tensors, call.wanted)  # type: ignore[arg-type]
        transformed = name in ("cpu", "triton", "cuda") and not reason and in_transform()
        return "a function transform or forward-mode differentiation is active" if transformed else reason
    if name == "cpu":
        return _decline_cpu(call)
    if name in ("triton", "cuda"):
        return f"this version has no {name} kernel for {call.op}"
    return None


def _torch_avoids(call: Call) -> str | None:
    """Why torch's kernel is left aside unless it is forced."""
    input = call.tensors[0]
    assert input is not None
    if call.wanted is not None and call.wanted.only_torch:
        return None
    if in_transform():
        return "a function transform or forward-mode differentiation is active, which not all of torch's kernels know"
    if torch.compiler.is_compiling() and call.op == "lstm" and input.is_cpu:
        return "torch.compile cannot differentiate the oneDNN kernel behind torch's LSTM"
    return None


def choose(call: Call, name: str | None = None) -> Choice:
    """The backend for a call; ``name`` forces one for this call, before `backend` and SEQKERN_BACKEND.

    Raises ValueError for an unknown name and RuntimeError if the forced backend declines.
    """
    if name is not None:
        forced = _known(name, "backend")
    elif (forced := _now_forced()) is None and _environment:
        forced = _known(_environment, f"the environment variable {VARIABLE}")
    if forced is not None:
        if reason := declines(forced, call):
            raise RuntimeError(
                f"backend {forced!r} was forced for {call.op} but cannot serve it: {reason}; "
                f"leave the choice open or force another of {', '.join(BACKENDS)}"
            )
        return _seen(call, Choice(forced))
    input = call.tensors[0]
    assert input is not None
    declined = []
    for each in ORDER.get(input.device.type, ("torch", "reference")):
        reason = declines(each, call) or (_torch_avoids(call) if each == "torch" else None)
        if reason is None:
            return _seen(call, Choice(each, tuple(declined)))
        declined.append((each, reason))
    raise AssertionError("the reference serves every call")


def _seen(call: Call, choice: Choice) -> Choice:
    if not torch.compiler.is_compiling() and (seen := _watching.get()) is not None:
        seen.append((call, choice))
    return choice
