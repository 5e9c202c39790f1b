"""The attention ops by Triton: which kernels a call needs."""

from seqkern.kernels import attention, attention_backward, decode, weights
from seqkern.kernels.tuning_attention import is_decode


def forward(t, o, output, lse, shares) -> None:
    """Writes the results of `seqkern::attention` for its tensors t and options o into the memory given."""
    packed = t.cu_seqlens_q is not None
    heads, kv_heads = t.query.shape[1], t.key.shape[1]
    L, S = (o.max_seqlen_q, o.max_seqlen_k) if packed else (t.query.shape[2], t.key.shape[2])
    run = decode.decode if is_decode(L, S, heads // max(kv_heads, 1)) else attention.forward
    run(t, o, output, lse)
    if o.weights:
        weights.weights(t, o, lse, shares)


def backward(t, o, grad_output, grad_lse, output, lse, gradients, needs) -> None:
    """Writes the results of `seqkern::attention_backward`, in its order; ``needs`` are its flags."""
    attention_backward.backward(t, o, grad_output, grad_lse, output, lse, gradients, needs)
