"""The attention ops by Triton: which kernels a call needs."""

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
import triton

from seqkern.kernels import attention, attention_backward, decode, weights
from seqkern.kernels.launch import architecture
from seqkern.kernels.tuning_attention import is_decode
from seqkern.kernels.tuning_cache import force
from seqkern.kernels.tuning_hopper import readable, takes

# Modules of the kernels written for Hopper that this Triton cannot read or compile: they need Gluon, which is
# experimental and changes with Triton's versions.
_unfit: set[str] = set()


def _give_up(name: str, error: Exception) -> None:
    if name not in _unfit:
        _unfit.add(name)
        said = (str(error).strip().splitlines() or [""])[-1]
        warnings.warn(
            f"Triton {triton.__version__} could not launch the attention kernels for Hopper ({type(error).__name__}: "
            f"{said}): the portable ones run instead, which take up to twice the time",
            RuntimeWarning,
            stacklevel=3,
        )


@cache
def hopper(name: str) -> Any:
    """A module of the kernels written for Hopper; None, with a warning, where this Triton cannot even read it."""
    try:
        return import_module(f"seqkern.kernels.{name}")
    except (ImportError, AttributeError) as e:
        _give_up(name, e)
        return None


def by_hopper(t, o, name: str) -> Any:
    """The module of the kernels written for Hopper, if they serve a call."""
    able = not triton.knobs.runtime.interpret and not force.get().portable and name not in _unfit
    return hopper(name) if able and takes(architecture(t.query), t, o) else None


def run_or(portable: Callable[..., None], special: Callable[..., None] | None, name: str, *arguments) -> None:
    """Calls ``special`` of the module ``name``, or ``portable`` where there is none or it cannot be launched."""
    if special is not None:
        try:
            return special(*arguments)
        except (triton.TritonError, AttributeError) as e:  # all results are written again
            _give_up(name, e)
    return portable(*arguments)


def forward(t, o, output, lse, shares) -> None:
    """Writes the results of `seqkern::attention` for its tensors t and options o into the memory given."""
    if not t.query.numel():
        return
    packed = t.cu_seqlens_q is not None
    heads, kv_heads = t.query.shape[1], t.key.shape[1]
    L, S = (o.max_seqlen_q, o.max_seqlen_k) if packed else (t.query.shape[2], t.key.shape[2])
    special = None
    if is_decode(L, S, heads // max(kv_heads, 1)):
        portable = decode.decode
    else:
        portable = attention.forward
        special = by_hopper(t, o, "hopper") if readable(output) else None
    with torch.cuda.device_of(t.query):  # Triton launches on the current GPU, wherever the tensors are
        run_or(portable, special and special.forward, "hopper", t, o, output, lse)
        if o.weights:
            weights.weights(t, o, lse, shares)


def backward(t, o, grad_output, grad_lse, output, lse, gradients, needs) -> None:
    """Writes the results of `seqkern::attention_backward`, in its order; ``needs`` are its flags."""
    if not t.query.numel():
        for each in gradients:
            each.zero_()
        return
    portable, special = attention_backward.backward, by_hopper(t, o, "hopper_backward")
    arguments = (t, o, grad_output, grad_lse, output, lse, gradients, needs)
    with torch.cuda.device_of(t.query):
        run_or(portable, special and special.backward, "hopper_backward", *arguments)
