"""The attention ops by Triton: which kernels a call needs."""

import warnings
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


@cache
def hopper(name: str) -> Any:
    """A module of the kernels written for Hopper; None, with a warning, where this Triton cannot even read it.

    They need Gluon, which is experimental and changes with Triton's versions.
    """
    try:
        return import_module(f"seqkern.kernels.{name}")
    except (ImportError, AttributeError) as e:
        warnings.warn(
            f"Triton {triton.__version__} lacks what the attention kernels for Hopper need ({e}): the portable ones "
            "run instead, which take up to twice the time",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def by_hopper(t, o, name: str) -> Any:
    """The module of the kernels written for Hopper, if they serve a call."""
    able = not triton.knobs.runtime.interpret and not force.get().portable
    return hopper(name) if able and takes(architecture(t.query), t, o) else None


def forward(t, o, output, lse, shares) -> None:
    """Writes the results of `seqkern::attention` for its tensors t and options o into the memory given."""
    if not t.query.numel():
        return
    packed = t.cu_seqlens_q is not None
    heads, kv_heads = t.query.shape[1], t.key.shape[1]
    L, S = (o.max_seqlen_q, o.max_seqlen_k) if packed else (t.query.shape[2], t.key.shape[2])
    run = attention.forward
    if is_decode(L, S, heads // max(kv_heads, 1)):
        run = decode.decode
    elif readable(output) and (special := by_hopper(t, o, "hopper")):
        run = special.forward
    with torch.cuda.device_of(t.query):  # Triton launches on the current GPU, wherever the tensors are
        run(t, o, output, lse)
        if o.weights:
            weights.weights(t, o, lse, shares)


def backward(t, o, grad_output, grad_lse, output, lse, gradients, needs) -> None:
    """Writes the results of `seqkern::attention_backward`, in its order; ``needs`` are its flags."""
    if not t.query.numel():
        for each in gradients:
            each.zero_()
        return
    run = attention_backward.backward
    if special := by_hopper(t, o, "hopper_backward"):
        run = special.backward
    with torch.cuda.device_of(t.query):
        run(t, o, grad_output, grad_lse, output, lse, gradients, needs)
