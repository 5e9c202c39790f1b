"""Which backends serve a call of attention, and why the others do not."""

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from seqkern.ops import _library
from seqkern.spec.attention import Options, Tensors

CPU_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
CPU_READY = _library.native() is not None


GPU_FLOP = 2e10  # 0.1 ms of a Hopper GPU, which a launch from Python must not be a large part of
TRITON_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
LARGEST_HEAD = 256
PLAIN = frozenset((Tensor, Parameter))


class Wanted(NamedTuple):
    """What a call asks for beyond its tensors."""

    options: Options
    lse: bool = False
    seeded: bool = False  # the caller gave a seed, so one mask is asked for and not any
    only_torch: str = ""  # why no backend but torch's kernel can take the arguments


def declines(name: str, t: Tensors, wanted: Wanted) -> str | None:
    """Why a backend cannot serve, or None if it can."""
    if name == "torch":
        return None if wanted.only_torch else torch_declines(t, wanted)
    if wanted.only_torch:
        return wanted.only_torch
    if name == "reference":
        return None
    if name == "triton":
        return triton_declines(t, wanted.options)
    if name == "cpu":
        return cpu_declines(t)
    return f"this version has no {name} kernel for attention"


def torch_declines(t: Tensors, wanted: Wanted) -> str | None:
    o = wanted.options
    for has, what in (
        (t.cu_seqlens_q is not None, "packed sequences"),
        (o.softcap > 0, "a softcap"),
        (t.sinks is not None, "sinks"),
        (wanted.lse, "the log-sum-exp as a result"),
        (o.weights, "the weights as a result"),
        (wanted.seeded and o.dropout_p > 0, "a seed for its dropout"),
    ):
        if has:
            return f"torch's scaled_dot_product_attention does not know {what}"
    return None


def torch_outruns_on_gpu(t: Tensors, wanted: Wanted) -> str | None:
    """Why torch's kernels run a call on a Hopper GPU, where cuDNN's is the faster for what both have."""
    if torch_declines(t, wanted):
        return None
    o = wanted.options
    if t.query.dtype not in (torch.bfloat16, torch.float16):
        return f"in {str(t.query.dtype)[6:]} it has not been timed; try it with seqkern.backend('triton')"
    if 4 * t.query.numel() * t.key.shape[-2] < GPU_FLOP:
        return "so small a call is over on torch's kernel before a launch of Triton's pays"
    if o.window_left >= 0 or o.window_right > 0:
        return None  # torch reads a dense mask for it
    if o.dropout_p > 0 or (t.bias is None and t.alibi_slopes is None):
        return "cuDNN's kernel is faster"
    grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in t)
    if grad and not (t.bias is not None and t.bias.requires_grad):
        return "it has not been shown to be faster than torch's kernel but for the gradient of a bias"
    return None


def cpu_declines(t: Tensors) -> str | None:
    """Why the compiled kernels cannot take a call; they know every option."""
    if not CPU_READY:
        return _library.why_missing()
    if reason := _out_of_place(t, "cpu"):
        return reason
    if t.query.dtype not in CPU_DTYPES:
        return f"the dtype is {t.query.dtype}, not one of {', '.join(sorted(map(str, CPU_DTYPES)))}"
    if t.query.shape[-1] == 0 or t.value.shape[-1] == 0 or t.query.shape[1] == 0:
        return "a size is zero"
    return None


def _out_of_place(t: Tensors, device: str) -> str | None:
    """Why a kernel cannot read the tensors: where they lie, what they are, how they are laid out."""
    if t.query.device.type != device:
        return f"the tensors are on {t.query.device}, not on a {'GPU' if device == 'cuda' else 'CPU'}"
    compiling = torch.compiler.is_compiling()
    for x in t:
        if x is not None and type(x) not in PLAIN and not compiling:
            return f"a tensor is a {type(x).__name__}"
        if x is not None and x.layout is not torch.strided:
            return f"a tensor has layout {x.layout}"
    return None


def _find_triton() -> str:
    try:
        found = find_spec("triton")
    except (ImportError, ValueError):  # blocked, or None in sys.modules
        found = None
    return "" if found else "Triton is not installed; pip install triton"


TRITON_MISSING = _find_triton()


def _too_old(index: int) -> str:
    """Why a GPU cannot run the kernels; empty if it can. A compiler takes the answer as it is."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (8, 0):
        return ""
    return f"{torch.cuda.get_device_name(index)} is older than compute capability 8.0"


_too_old._dynamo_marked_constant = True  # type: ignore[attr-defined]


def triton_declines(t: Tensors, o: Options) -> str | None:
    query = t.query
    if query.device.type != "cuda":
        return _out_of_place(t, "cuda")
    if TRITON_MISSING:
        return TRITON_MISSING
    if reason := _too_old(query.device.index or 0):
        return reason
    return _out_of_place(t, "cuda") or triton_shape_declines(t, o)


def triton_shape_declines(t: Tensors, o: Options) -> str | None:
    """What of a call the kernels cannot take, wherever they run."""
    dtype = t.query.dtype
    if dtype not in TRITON_DTYPES:
        return f"the dtype is {dtype}, not one of {', '.join(sorted(map(str, TRITON_DTYPES)))}"
    for name, size in (("query", t.query.shape[-1]), ("value", t.value.shape[-1])):
        if not 1 <= size <= LARGEST_HEAD:
            return f"the head size of {name} is {size}, not between 1 and {LARGEST_HEAD}"
    if o.weights and any(x is not None and x.requires_grad for x in t) and torch.is_grad_enabled():
        return "there is no kernel for the gradient of the weights as a result"
    return None
