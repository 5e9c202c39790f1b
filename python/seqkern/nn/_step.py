"""A decoding step of one layer as one call of `seqkern::transformer_step`, instead of some fifty of its parts."""

from typing import Any

import torch
from torch import Tensor, nn

from seqkern.nn._modules import activation_name, unheard
from seqkern.nn.attention import MultiheadAttention
from seqkern.nn.cache import KVCache
from seqkern.ops import _backend
from seqkern.ops._linear_backends import few_rows
from seqkern.ops.linear import ACTIVATIONS
from seqkern.ops.transformer import op


def in_one_call(
    layer: nn.Module, x: Tensor, cache: KVCache, index: int, mask: Tensor | None
) -> Tensor | None:
    """The layer's step for one new position of each sequence, x [B, 1, E]; None where only its parts will do.

    Those are hooks, parts of another class, many sequences, other devices, and another backend that is forced, or one
    that is watched.
    """
    if x.shape[1] != 1 or x.shape[0] > few_rows(x.dtype) or not _backend.unseen("cpu"):
        return None
    if not (_backend.CPU_READY and x.is_cpu and x.dtype in _backend.CPU_DTYPES):
        return None
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled() or _backend.in_transform():  # type: ignore[attr-defined]
        return None
    parts: Any = layer._modules
    activation = activation_name(layer.activation)  # type: ignore[arg-type]
    known = activation is not None and not (activation == "gelu" and x.dtype is torch.float64)
    if not known or not _plain(parts, x.shape[2]):
        return None
    weights = [*_of_attention(parts["self_attn"]), *_of(parts["norm1"])]
    eps = [parts["norm1"].eps]
    keys, values, seen = None, None, (None, None)
    last = parts["norm2"]
    if "multihead_attn" in parts:
        weights += [*_of_attention(parts["multihead_attn"]), *_of(parts["norm2"])]
        eps.append(parts["norm2"].eps)
        keys, values = cache.recall(index)
        seen = cache.memory_seen.mask, cache.memory_seen.bias
        last = parts["norm3"]
    weights += [*_of(parts["linear1"]), *_of(parts["linear2"]), *_of(last)]
    eps.append(last.eps)
    dtype = x.dtype
    if any(
        w is not None and (type(w) not in _backend.PLAIN or w.dtype is not dtype or not w.is_cpu)
        for w in weights
    ):
        return None
    if seen[1] is not None and seen[1].dtype not in (dtype, torch.promote_types(dtype, torch.float32)):
        return None
    heads = parts["self_attn"].num_heads
    own = cache.storage(index, x, heads)
    with torch._C._AutoDispatchBelowAutograd():
        y = op(
            x[:, 0],
            own,
            cache.length,
            mask,
            keys,
            values,
            *seen,
            weights,
            layer.norm_first,  # type: ignore[arg-type]
            ACTIVATIONS[activation],
            eps,
        )
    return y[:, None]


def _plain(parts: dict[str, Any], features: int) -> bool:
    """Whether the parts of a layer are what torch.nn makes them, so that the op computes what they would."""
    for name, part in parts.items():
        if name.startswith("norm"):
            if not unheard(part, nn.LayerNorm) or part.normalized_shape != (features,):
                return False
        elif name.startswith("linear"):
            if not unheard(part, nn.Linear):
                return False
        elif name.startswith("dropout"):
            if part.training or not unheard(part, nn.Dropout):
                return False
        elif name.endswith("attn") and type(part) is not MultiheadAttention:
            return False
    return True


def _of(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    p = module._parameters
    return p.get("weight"), p.get("bias")


def _of_attention(attention: nn.Module) -> tuple[Tensor | None, ...]:
    p = attention._parameters
    return p.get("in_proj_weight"), p.get("in_proj_bias"), *_of(attention._modules["out_proj"])  # type: ignore[arg-type]
