"""The attention ops by Triton: which kernels a call needs."""

from importlib import import_module

import torch
import triton

from seqkern.kernels import attention, attention_backward, decode, weights
from seqkern.kernels.launch import architecture
from seqkern.kernels.tuning_attention import is_decode
from seqkern.kernels.tuning_cache import force
from seqkern.kernels.tuning_hopper import readable, takes


def by_hopper(t, o) -> bool:
    """Whether the kernels written for Hopper serve a call; their modules are imported for one that they do."""
    able = not triton.knobs.runtime.interpret and not force.get().portable
    return able and takes(architecture(t.query), t, o)


def forward(t, o, output, lse, shares) -> None:
    """Writes the results of `seqkern::attention` for its tensors t and options o into the memory given."""
    if not t.query.numel():
        return
    packed = t.cu_seqlens_q is not None
    heads, kv_heads = t.query.shape[1], t.key.shape[1]
    L, S = (o.max_seqlen_q, o.max_seqlen_k) if packed else (t.query.shape[2], t.key.shape[2])
    if is_decode(L, S, heads // max(kv_heads, 1)):
        run = decode.decode
    elif by_hopper(t, o) and readable(output):
        run = import_module("seqkern.kernels.hopper").forward
    else:
        run = attention.forward
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
    if by_hopper(t, o):
        run = import_module("seqkern.kernels.hopper_backward").backward
    with torch.cuda.device_of(t.query):
        run(t, o, grad_output, grad_lse, output, lse, gradients, needs)
