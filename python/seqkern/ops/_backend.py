"""The choice of a backend: the first in the device's order that serves the call, or the one that is forced.

========= ==========================================================================
reference the spec in plain torch: any device and dtype, any transform
torch     torch's own kernel
cpu       the compiled kernels of this package
triton    the Triton kernels of this package
cuda      the compiled CUDA kernels of this package (none yet)
========= ==========================================================================
"""

import importlib.util
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from seqkern.ops import _attention_backends, _library, _linear_backends

R = TypeVar("R")

BACKENDS = ("reference", "torch", "cpu", "triton", "cuda")
ORDER = {"cpu": ("cpu", "torch", "reference"), "cuda": ("cuda", "triton", "torch", "reference")}
CPU_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
VARIABLE = "SEQKERN_BACKEND"
CELL_WORTH_A_GRADIENT = 4_000_000  # weights, states and input of one step
STEPS_BELOW_A_GRADIENT = {"gru": 1, "rnn_tanh": 3, "rnn_relu": 3}
BF16_STEPS_BELOW_A_GRADIENT = STEPS_BELOW_A_GRADIENT | {"gru": 3}  # where dots make torch's steps short
# Below them a sequence is over on cuDNN before the launches of Triton pay, which a backward has more of.
GPU_STEPS, GPU_STEPS_BELOW_A_GRADIENT = 16, 64
PLAIN = frozenset((Tensor, Parameter))

TRITON_OPS = frozenset(
    f"{cell}{form}" for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu") for form in ("", "_cell")
)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BY_OPS = frozenset(("cpu", "triton", "cuda"))  # those that run as the ops of this package

ONNX_KNOWS = "an ONNX export knows torch's own operators only"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the kernels run on the CPU, slowly, for tests

_native = _library.native()
CPU_READY = _native is not None
CPU_MISSING = _library.why_missing()


def _why_no_triton() -> str:
    try:
        found = importlib.util.find_spec("triton")
    except ImportError:
        found = None
    return "" if found else "Triton is not installed; pip install triton"


TRITON_MISSING = _why_no_triton()


def present() -> tuple[str, ...]:
    """The backends that this installation has kernels of."""
    missing = {"cpu": CPU_MISSING, "triton": TRITON_MISSING, "cuda": "none yet"}
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


def _now_forced() -> str | None:
    """The force in effect; a compiled graph keeps the one it was traced under."""
    return _forced.get()


# What torch.compiler.assume_constant_result does, which imports the whole of Dynamo to do it: a second.
_now_forced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def known_constant(function: Callable[..., R]) -> Callable[..., R]:
    """Keeps what the function returned for each argument, and has compiled graphs take it as a constant.

    Dynamo looks for the mark behind functools.cache, where it would be lost: it has to be on a function that calls it.
    """
    kept = cache(function)

    def call(*arguments):
        return kept(*arguments)

    call.__name__, call.__doc__ = function.__name__, function.__doc__
    call.cache_clear, call._dynamo_marked_constant = kept.cache_clear, True  # type: ignore[attr-defined]
    return call


def in_transform() -> bool:
    """Whether a functorch transform or a forward-mode level is open: the ops know only reverse mode."""
    if torch._C._are_functorch_transforms_active():  # type: ignore[attr-defined]
        return True
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def in_trace() -> bool:
    """Whether torch.jit.trace records what is called."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def goes_to_onnx() -> bool:
    """Whether a trace or an exported graph becomes an ONNX model, which knows torch's own operators only."""
    if "torch.onnx" not in sys.modules:
        return False
    graph = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return graph and torch.onnx.is_in_onnx_export()


def is_looked_on() -> bool:
    """Whether something follows what is done with tensors: a compiler, a trace, a transform, forward AD, a mode of
    dispatch."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    return in_transform() or torch._C._len_torch_dispatch_stack() > 0  # type: ignore[attr-defined]


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


def lacks_features(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether input or state has no features, which torch's cells take and a kernel here does not."""
    input, hx = tensors[:2]
    return (input is not None and input.shape[-1] == 0) or (hx is not None and hx.shape[-1] == 0)


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
    return CPU_MISSING or _unfit(call, ("cpu",), CPU_DTYPES)


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
    if dtype not in dtypes:
        return f"the dtype is {dtype}, not one of {', '.join(sorted(map(str, dtypes)))}"
    if torch._C._is_any_autocast_enabled():  # type: ignore[attr-defined]
        return "autocast is on, whose casts are torch's own"
    if in_transform():
        return "a function transform or forward-mode differentiation is active"
    return ONNX_KNOWS if goes_to_onnx() else None


def _too_old(index: int) -> str:
    """The name of a GPU that Triton's tensor cores do not know; empty if it is new enough."""
    return torch.cuda.get_device_name(index) if torch.cuda.get_device_capability(index) < (8, 0) else ""


_too_old._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as _now_forced


def lacks_triton(tensors: tuple[Tensor | None, ...]) -> str | None:
    """Why the Triton kernels cannot run on these tensors where they lie."""
    if TRITON_MISSING:
        return TRITON_MISSING
    for t in tensors:
        if t is None:
            continue
        if t.dtype not in TRITON_DTYPES:
            return f"the dtype is {t.dtype}, not one of {', '.join(sorted(map(str, TRITON_DTYPES)))}"
        if t.is_cuda and (old := _too_old(t.device.index)):
            return f"{old} is older than compute capability 8.0"
        if not t.is_cuda and t.dtype == torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 wrongly"
    return None


def _decline_triton(call: Call) -> str | None:
    if call.op not in TRITON_OPS:
        return f"this version has no triton kernel for {call.op}"
    if TRITON_MISSING:
        return TRITON_MISSING
    devices = ("cuda", "cpu") if INTERPRETED else ("cuda",)
    return _unfit(call, devices, TRITON_DTYPES) or lacks_triton(call.tensors)


def declines(name: str, call: Call) -> str | None:
    """Why a backend cannot serve a call, or None if it can."""
    if call.wanted is not None:
        reason = _attention_backends.declines(name, call.tensors, call.wanted)  # type: ignore[arg-type]
        if reason or name not in BY_OPS:
            return reason
        if in_transform():
            return "a function transform or forward-mode differentiation is active"
        return ONNX_KNOWS if goes_to_onnx() else None
    if name == "cpu":
        return _decline_cpu(call)
    if name == "triton":
        return _decline_triton(call)
    if name == "cuda":
        return f"this version has no {name} kernel for {call.op}"
    return None


def needs_grad(tensors: Sequence[Tensor | None]) -> bool:
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)  # type: ignore[attr-defined]


def expects_grad(tensors: Sequence[Tensor | None]) -> bool:
    """`needs_grad`, for what changes no result; False in a trace, which is checked against one without gradients."""
    return not in_trace() and needs_grad(tensors)


def torch_outruns(op: str, tensors: Sequence[Tensor | None]) -> str | None:
    """Why torch's kernel is known to be faster on a CPU than ours, which then stand aside unless forced.

    Fixed rules from measurements that docs/decisions.md tells of; never of the load or the number of threads.
    """
    if op == "linear":
        return _linear_outruns(tensors)
    if torch.compiler.is_compiling():  # which pays nothing for an op's gradient
        return None
    input, hx, cx = tensors[:3]
    assert input is not None and hx is not None
    grad = expects_grad(tensors)
    if op.endswith("_cell"):
        if not grad:
            return None
        size = sum(t.numel() for t in tensors if t is not None and t.dim() == 2)
        return "a gradient of so small a step" if size < CELL_WORTH_A_GRADIENT else None
    if input.dim() == 2:  # packed
        return None
    steps, batch, _ = input.shape
    dots = input.dtype is torch.bfloat16 and _linear_backends.BF16_DOT
    if grad and steps <= (BF16_STEPS_BELOW_A_GRADIENT if dots else STEPS_BELOW_A_GRADIENT).get(op, 0):
        return "a gradient of so few steps"
    projected = cx is not None and cx.shape[-1] != hx.shape[-1]
    if input.dtype is not torch.bfloat16 or not _linear_backends.BF16_TILES or projected:
        return None
    slower = (batch >= 8 or not grad) if op == "lstm" else (batch >= 32 and hx.shape[-1] >= 512)
    return "bfloat16 on a machine that multiplies it in tiles (AMX)" if slower else None


def _linear_outruns(tensors: Sequence[Tensor | None]) -> str | None:
    input, weight = tensors[:2]
    assert input is not None and weight is not None
    if torch.compiler.is_compiling():
        return "a linear layer that a compiler fuses"
    rows = input.numel() // max(1, weight.size(1))
    return _linear_backends.torch_outruns(rows, weight, expects_grad(tensors))


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
        return "a function transform or forward-mode differentiation is active, which not all of torch's kernels know"
    if torch.compiler.is_compiling() and call.op == "lstm" and input.is_cpu and not goes_to_onnx():
        return "torch.compile cannot differentiate the oneDNN kernel behind torch's LSTM"
    return None


@known_constant
def _is_hopper(index: int) -> bool:
    return torch.cuda.get_device_capability(index)[0] == 9


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
    return _recurrent_on_gpu(call.op, call.tensors)


@cache
def _unready() -> str:
    """What Triton lacks here to launch a kernel; empty if nothing."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler for its launchers, and there is no gcc and no clang"
    try:
        import_module("seqkern.kernels.rnn")
    except Exception as e:  # whatever a Triton that was not made for this machine raises
        return f"Triton cannot be imported ({type(e).__name__}: {e})"
    return ""


def _directions(hx: Tensor, weights: Sequence[Tensor | None]) -> int:
    """Directions of a stack of layers, of which each has as many weights; two where nothing tells."""
    groups, each = hx.shape[0], len(weights) // max(hx.shape[0], 1)
    if groups % 2 or len(weights) <= each:
        return 1
    first, second = weights[0], weights[each]
    return 2 if first is None or second is None or first.shape == second.shape else 1


def _recurrent_on_gpu(op: str, tensors: tuple[Tensor | None, ...]) -> str | None:
    """Why cuDNN runs a recurrent layer on a Hopper GPU."""
    input, hx, cx = tensors[:3]
    assert input is not None and hx is not None
    if op.endswith("_cell"):
        return "a single step takes as long to launch on torch's kernel"
    if input.dtype != torch.bfloat16:
        return f"cuDNN is faster in {str(input.dtype)[6:]}"
    B, H = hx.shape[-2:]
    steps = input.shape[0] // (1 if input.dim() == 3 else max(B, 1))
    if steps < (GPU_STEPS_BELOW_A_GRADIENT if needs_grad(tensors) else GPU_STEPS):
        return "so few steps take as long to launch on torch's kernel"
    if input.dim() == 2 and torch.cuda.is_current_stream_capturing():
        return "a packed call cannot be captured in a CUDA graph"
    rnn = import_module("seqkern.kernels.rnn")  # not at the top: it imports Triton
    projected = cx is not None and cx.shape[-1] != H
    D, tiles = _directions(hx, tensors[3:]), -(-B // 16) * 16
    if projected or not rnn.in_one_launch(op, input.dtype, input.device, tiles, H, D):
        return "its steps would be launched one by one"
    return None


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
        if INTERPRETED and named == "triton" != forced():  # the op, and its backward, could not tell
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
