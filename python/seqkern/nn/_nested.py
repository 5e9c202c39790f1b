"""Nested tensors, which torch's own TransformerEncoder hands to its layers in place of padded sequences.

Their rows lie one after another, which is the layout of packed sequences: where a kernel serves these, no padding is
computed. Elsewhere the sequences are padded and masked.
"""

from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor

from seqkern.functional import attention, linear
from seqkern.ops import _backend, _surroundings
from seqkern.ops._attention_backends import Wanted
from seqkern.spec.attention import Options, Tensors


def check(module: torch.nn.MultiheadAttention, query, key, value, key_padding_mask, attn_mask) -> None:
    """torch's own conditions for nested tensors."""
    for unmet, what in (
        (query is not key or key is not value, "query, key and value are not one tensor"),
        (query.layout != torch.strided, f"the layout is {query.layout}, not torch.strided"),
        (query.dim() != 3, f"query is {query.dim()}-D, not 3-D"),
        (not module.batch_first, "batch_first is False"),
        (not module._qkv_same_embed_dim, "kdim or vdim is not embed_dim"),
        (module.bias_k is not None or module.add_zero_attn, "the module adds keys"),
        (key_padding_mask is not None or attn_mask is not None, "a mask is given as well"),
        (module.training, "the module is in training mode"),
        (_surroundings.needs_grad((query, *module.parameters())), "a gradient is needed"),
    ):
        if unmet:
            raise AssertionError(
                f"MultiheadAttention takes a nested tensor in self-attention without gradients only, and {what}; "
                "pad it with .to_padded_tensor and give key_padding_mask"
            )
    if query._nested_tensor_size()[:, 1].ne(module.embed_dim).any():
        raise AssertionError(
            f"MultiheadAttention: query is nested, expected embed_dim = {module.embed_dim} features"
        )


def attend(module: torch.nn.MultiheadAttention, nested: Tensor, weights) -> tuple[Tensor, Tensor | None]:
    """Self-attention of a nested tensor that `check` let pass."""
    found: Any
    nested = nested.contiguous()
    sizes = nested._nested_tensor_size()
    lengths = sizes[:, 0]
    heads = (module.num_heads, module.head_dim)
    rows = nested.values().view(-1, module.embed_dim)
    projected = linear(rows, module.in_proj_weight, module.in_proj_bias)
    q, k, v = (x.unflatten(1, heads) for x in projected.split(module.embed_dim, dim=1))
    cu = TF.pad(lengths.cumsum(0), (1, 0)).to(rows.device, torch.int32)
    if not weights and _fused(Tensors(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)):
        found, shares = attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu), None
    else:
        at = torch.arange(int(lengths.max()) if len(lengths) else 0, device=rows.device)
        real = at < lengths.to(rows.device)[:, None]
        q, k, v = (_padded(x, real).transpose(1, 2) for x in (q, k, v))
        both = (real[:, :, None] & real[:, None, :])[:, None]
        found = attention(q, k, v, mask=both if weights else real[:, None, None], return_weights=weights)
        found, shares = found if weights else (found, None)
        found = found.transpose(1, 2)[real]
    output = linear(found.flatten(1), module.out_proj.weight, module.out_proj.bias)
    strides, offsets = nested._nested_tensor_strides(), nested._nested_tensor_storage_offsets()
    return torch._nested_view_from_buffer(output.view(-1), sizes, strides, offsets), shares  # type: ignore[attr-defined]


def _padded(rows: Tensor, real: Tensor) -> Tensor:
    """[total, H, D] -> [B, L, H, D] with zeros where ``real`` [B, L] is False."""
    x = rows.new_zeros(*real.shape, *rows.shape[1:])
    x[real] = rows
    return x


def _fused(t: Tensors) -> bool:
    """Whether a fused kernel would take packed sequences; the reference goes through them one by one."""
    try:
        return _backend.pick(_backend.Call("attention", t, Wanted(Options(0.0)))).name in _backend.BY_OPS
    except RuntimeError:  # the forced backend does not
        return False
