"""Which backends serve a call of attention, and why the others do not."""

from typing import NamedTuple

import torch

from seqkern.ops import _hardware
from seqkern.ops._hardware import CPU_DTYPES, CPU_READY, TRITON_DTYPES, not_one_of
from seqkern.ops._surroundings import PLAIN, needs_grad
from seqkern.spec.attention import Options, Tensors

GPU_FLOP = 2e10  # 0.1 ms of a Hopper GPU, which a launch from Python must not be a large part of
LARGEST_HEAD = 256


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
    if needs_grad(t) and not (t.bias is not None and t.bias.requires_grad):
        return "it has not been shown to be faster than torch's kernel but for the gradient of a bias"
    return None


def cpu_declines(t: Tensors) -> str | None:
    """Why the compiled kernels cannot take a call; they know every option."""
    if not CPU_READY:
        return _hardware.CPU_MISSING
    if reason := _out_of_place(t, "cpu"):
        return reason
    if reason := not_one_of(t.query.dtype, CPU_DTYPES):
        return reason
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


def triton_declines(t: Tensors, o: Options) -> str | None:
    query = t.query
    if query.device.type != "cuda":
        return _out_of_place(t, "cuda")
    if reason := _hardware.TRITON_MISSING or _hardware.too_old(query.device.index or 0):
        return reason
    return _out_of_place(t, "cuda") or triton_shape_declines(t, o)


def triton_shape_declines(t: Tensors, o: Options) -> str | None:
    """What of a call the kernels cannot take, wherever they run."""
    if reason := not_one_of(t.query.dtype, TRITON_DTYPES):
        return reason
    for name, size in (("query", t.query.shape[-1]), ("value", t.value.shape[-1])):
        if not 1 <= size <= LARGEST_HEAD:
            return f"the head size of {name} is {size}, not between 1 and {LARGEST_HEAD}"
    if o.weights and needs_grad(t):
        return "there is no kernel for the gradient of the weights as a result"
    return None
