"""The Triton kernels behind torch's own flash attention, through torch's plug-in door.

Importing this module makes the name known to torch and changes nothing else:

>>> import seqkern.integrations.torch_sdpa
>>> "seqkern" in torch.nn.attention.list_flash_attention_impls()
True

``torch.nn.attention.activate_flash_attention_impl("seqkern")`` then sends what torch's dispatcher picks its flash
backend for (dense CUDA tensors in half precision without a mask) to this package, for the whole process, until
``restore_flash_attention_impl()``. Graphs compiled in between keep what they were compiled with.
"""

from importlib import import_module

import torch
from torch import Tensor
from torch.nn.attention import register_flash_attention_impl

from seqkern.ops import attention as attention_op
from seqkern.ops._attention_backends import triton_declines
from seqkern.spec.attention import Options, Tensors

NAME = "seqkern"


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    seed: Tensor | None,
) -> tuple[Tensors, Options]:
    # torch sends its lower-right bias here as is_causal, and upper-left only where both are the same.
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    o = Options(factor, dropout_p=dropout_p, window_right=0 if is_causal else -1, bottom_right=True)
    return Tensors(query, key, value, seed=seed), o


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
):
    """``aten::_scaled_dot_product_flash_attention``; the state of its generator is the seed of our dropout."""
    if return_debug_mask:
        raise RuntimeError(
            "seqkern's flash attention keeps no dropout mask, expected return_debug_mask=False"
        )
    seed = torch.randint(2**62, (2,), device=query.device)  # of which torch's operator returns two, as uint64
    t, o = _call(query, key, value, dropout_p, is_causal, scale, seed[:1])
    _, lse, nothing = attention_op.empty_outputs(t, o)
    output = torch.empty_like(query)  # torch's compiler counts on the layout of the query
    if triton_declines(t, o):
        found, lse, _ = attention_op.run_spec(*t, *o)
        output.copy_(found)
    else:
        import_module("seqkern.kernels.serve").forward(t, o, output, lse, nothing)
    offset = torch.zeros((), dtype=torch.int64, device=query.device)
    state = (seed.view(torch.uint64), offset.view(torch.uint64))
    return output, lse, None, None, query.shape[2], key.shape[2], *state, nothing


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``aten::_scaled_dot_product_flash_attention_backward``."""
    t, o = _call(query, key, value, dropout_p, is_causal, scale, philox_seed.view(torch.int64)[:1])
    needs = (True, True, False, False, False)
    found = tuple(torch.empty_like(x) for x in (query, key, value))
    if triton_declines(t, o):
        gradients = attention_op.run_spec_backward(grad_out, None, None, out, logsumexp, *t, *o, *needs)
        for x, d in zip(found, gradients):
            x.copy_(d)
    else:
        serve = import_module("seqkern.kernels.serve")
        serve.backward(t, o, grad_out, None, out, logsumexp, found, needs)
    return found  # type: ignore[return-value]


class _Handle:
    """Keeps the kernels registered until torch asks to remove them."""

    def __init__(self, library: torch.library.Library) -> None:
        self.library: torch.library.Library | None = library

    def remove(self) -> None:
        self.library = None


def activate() -> _Handle:
    """What ``activate_flash_attention_impl`` calls."""
    library = torch.library.Library("aten", "IMPL", "CUDA")
    library.impl("_scaled_dot_product_flash_attention", forward, "CUDA")
    library.impl("_scaled_dot_product_flash_attention_backward", backward, "CUDA")
    return _Handle(library)


register_flash_attention_impl(NAME, register_fn=activate)
