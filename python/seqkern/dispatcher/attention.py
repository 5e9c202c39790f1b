"""``aten::scaled_dot_product_attention``."""

from collections.abc import Callable

import torch
from torch import Tensor

from seqkern import functional
from seqkern.dispatcher.choice import ON_GPU, TOO_SMALL, attention_has_kernels, declined
from seqkern.functional._attention import short_way
from seqkern.ops import _backend, _surroundings, _torchs_own
from seqkern.ops._attention_backends import Wanted
from seqkern.spec.attention import Options, Tensors

# The op's gradient, called from Python, costs what torch's needs for less (docs/decisions.md).
WORTH_A_GRADIENT = 2_000_000  # multiplications and additions of both products
ASKED = "torch.nn.attention.sdpa_kernel asks for kernels of torch"


def _stays(query: Tensor, key: Tensor, value: Tensor) -> str:
    """Why a call stays torch's though a kernel of this package might serve it; empty if it need not."""
    compiling = torch.compiler.is_compiling()
    if not compiling and any(type(x) not in _surroundings.PLAIN for x in (query, key, value)):
        return "a tensor is of a subclass"
    if query.dim() < 3 or key.dim() < 3:
        return "there are no heads"
    if not compiling and _is_too_small(query, key, value):
        return TOO_SMALL
    return ASKED if _torch_is_asked_for() else ""


def _is_too_small(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return 4 * query.numel() * key.size(-2) < WORTH_A_GRADIENT and _surroundings.needs_grad(
        (query, key, value)
    )


def _torch_is_asked_for() -> bool:
    c = torch._C
    return not (
        c._get_flash_sdp_enabled() and c._get_math_sdp_enabled() and c._get_mem_efficient_sdp_enabled()  # type: ignore[attr-defined]
    )


def scaled_dot_product_attention(own: Callable) -> Callable:
    attention_has_kernels("cpu")  # found out here, where no compiler or fake tensor is at work

    def run(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
    ):
        special, has_kernels = _backend.special, attention_has_kernels(query.device.type)
        if _torchs_own.here.own or not (special or has_kernels):
            return own(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        plain = not (special or torch.compiler.is_compiling()) and dropout_p == 0
        plain = plain and query.dim() > 2 and key.dim() > 2
        if plain and not (_torch_is_asked_for() or _is_too_small(query, key, value)):
            output = short_way(query, key, value, attn_mask, is_causal, scale, enable_gqa)
            if output is not None:
                return output
        if not special or _backend.forced() is None:
            stays = _surroundings.in_transform() or (has_kernels and _stays(query, key, value))
            stays = stays or (not query.is_cpu and ON_GPU)
            if stays:
                if special and isinstance(stays, str):
                    declined(
                        _backend.Call("attention", Tensors(query, key, value), Wanted(Options(0.0))),
                        (("seqkern", stays),),
                    )
                return own(
                    query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
                )
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )

    return run


STAND_INS = {"scaled_dot_product_attention": scaled_dot_product_attention}
