"""The attention ops by Triton: which kernels a call needs."""

import torch

from seqkern.kernels import attention, attention_backward, decode, weights
from seqkern.kernels.tuning_attention import is_decode


def forward(t, o, output, lse, shares) -> None:
    """Writes the results of `seqkern::attention` for its tensors t and options o into the memory given."""
    if not t.query.numel():
        return
    packed = t.cu_seqlens_q is not None
    heads, kv_heads = t.query.shape[1], t.key.shape[1]
    L, S = (o.max_seqlen_q, o.max_seqlen_k) if packed else (t.query.shape[2], t.key.shape[2])
    run = decode.decode if is_decode(L, S, heads // max(kv_heads, 1)) else attention.forward
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
    with torch.cuda.device_of(t.query):
        attention_backward.backward(t, o, grad_output, grad_lse, output, lse, gradients, needs)
