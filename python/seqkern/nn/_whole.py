"""A layer of a Transformer without a gradient as few calls instead of those of its modules."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seqkern.functional import _layer, attention
from seqkern.functional._attention import short_way
from seqkern.functional._layer import Attention, Layer, Norm, Product
from seqkern.nn import _masks
from seqkern.nn._modules import activation_name, changed
from seqkern.nn._step import is_plain, weights_of, weights_of_attention
from seqkern.ops import _surroundings


class Hidden(NamedTuple):
    """What the caller tells an attention of the keys that its queries may not see."""

    mask: Tensor | None = None
    padding: Tensor | None = None
    is_causal: bool = False


class Memory(NamedTuple):
    """What a decoder's layer looks at besides."""

    x: Tensor  # [B, S, E] ([S, B, E])
    hidden: Hidden


def in_few_calls(layer: nn.Module, x: Tensor, hidden: Hidden, memory: Memory | None = None) -> Tensor | None:
    """What the layer makes of x [B, L, E] ([L, B, E]); None where its modules must be called.

    That is where a gradient may be asked for, layer or parts are no plain modules in eval mode (as for a step), inputs
    are nested, unbatched, empty or of no kernel's kind, both masks are given, or somebody watches what is called.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not vars(type(layer)).get("in_one_call"):
        return None
    if not _may_come(x, hidden) or not (memory is None or _may_come(memory.x, memory.hidden)):
        return None
    activation = activation_name(layer.activation)  # type: ignore[arg-type]
    if activation is None or torch._C._is_any_autocast_enabled() or not _layer.may_be_short(x, activation):  # type: ignore[attr-defined]
        return None
    parts: Any = layer._modules
    E = x.shape[2]
    if not is_plain(layer, E):
        return None
    own, other = parts["self_attn"], parts.get("multihead_attn")
    names = ("norm1", "norm2") if memory is None else ("norm1", "norm2", "norm3")
    if (other is None) != (memory is None) or any(name not in parts for name in names):
        return None
    first = own.batch_first
    for each in (own,) if other is None else (own, other):
        if changed(each) or each.training or each.embed_dim != E or each._why_no_step():
            return None
        if each.batch_first != first:
            return None
    t: Any = *weights_of_attention(own), *weights_of(parts["linear1"]), *weights_of(parts["linear2"])
    named = [parts[name] for name in names]
    of_norms: Any = [weights_of(norm) for norm in named]
    of_other: Any = () if other is None else weights_of_attention(other)
    for each in (*t, *of_other, *(w for pair in of_norms for w in pair)):
        if each is not None and type(each) not in _surroundings.PLAIN:
            return None  # also for text, see weights_of
    attentions = [Attention(t[:2], t[2:4], _to_itself(x, hidden, own.num_heads, first))]
    if other is not None and memory is not None:
        if not _fits_memory(x, memory.x, first, *of_other[:2]):
            return None
        (w, w_memory), (b, b_memory) = other._in_proj_parts()
        to_memory = _to_memory(x, memory, other.num_heads, first, (w_memory, b_memory))
        attentions.append(Attention((w, b), of_other[2:], to_memory))
    norms = tuple(Norm(w, b, norm.eps) for (w, b), norm in zip(of_norms, named))
    whole = Layer(tuple(attentions), t[4:6], t[6:], norms, layer.norm_first, activation)  # type: ignore[arg-type]
    return _layer.in_few_calls(x, whole) if _layer.fits(x, whole) else None


def _may_come(x: Tensor, hidden: Hidden) -> bool:
    if type(x) not in _surroundings.PLAIN or x.is_nested or x.dim() != 3:
        return False
    return hidden.mask is None or hidden.padding is None


def _fits_memory(x: Tensor, memory: Tensor, first: bool, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether what is made of the memory alone fits, as `_layer.fits` looks at the rest."""
    E, batch = x.shape[2], 0 if first else 1
    if memory.shape[2] != E or memory.shape[batch] != x.shape[batch] or not memory.numel():
        return False
    if memory.dtype is not x.dtype or not memory.is_cpu or memory.layout is not torch.strided:
        return False
    return weight.shape == (3 * E, E) and (bias is None or bias.shape == (3 * E,))


def _seen(hidden: Hidden, sizes: tuple[int, int, int, int]) -> _masks.Seen:
    mask, padding, is_causal = hidden
    if mask is None and padding is None and not is_causal:
        return _masks.Seen()
    _masks.check_dtypes(mask, padding)
    _masks.check_ranks(mask, padding, ())
    return _masks.seen(mask, padding, is_causal, exact=False, more_keys=0, sizes=sizes)


def _sizes(x: Tensor, first: bool) -> tuple[int, int]:
    """Batch and length."""
    return (x.shape[0], x.shape[1]) if first else (x.shape[1], x.shape[0])


def _to_itself(x: Tensor, hidden: Hidden, H: int, first: bool) -> Callable[[Tensor], Tensor]:
    B, L = _sizes(x, first)
    seen = _seen(hidden, (B, H, L, L))

    def attend(three: Tensor) -> Tensor:
        q, k, v = _heads(three, 3, H, first).unbind()
        return _attend(q, k, v, seen, first)

    return attend


def _to_memory(
    x: Tensor, memory: Memory, H: int, first: bool, keys_and_values: Product
) -> Callable[[Tensor], Tensor]:
    (B, L), (_, S) = _sizes(x, first), _sizes(memory.x, first)
    seen = _seen(memory.hidden, (B, H, L, S))

    def attend(q: Tensor) -> Tensor:
        y = memory.x
        pair = _layer.with_bias(y.reshape(-1, y.shape[2]), *keys_and_values).view(*y.shape[:2], -1)
        k, v = _heads(pair, 2, H, first).unbind()
        return _attend(_heads(q, 1, H, first)[0], k, v, seen, first)

    return attend


def _heads(x: Tensor, count: int, H: int, first: bool) -> Tensor:
    """[B, L, count H D], or [L, B, ..] where the batch stands second, -> [count, B, H, L, D], a view."""
    parts = x.view(*x.shape[:2], count, H, x.shape[2] // (count * H))
    return parts.permute((2, 0, 3, 1, 4) if first else (2, 1, 3, 0, 4))


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: _masks.Seen, first: bool) -> Tensor:
    mask, bias, causal = seen
    short = bias is None and not (causal and mask is not None)
    heads: Any = short_way(q, k, v, mask, causal, None, False) if short else None
    if heads is None:
        heads = attention(q, k, v, mask=mask, bias=bias, causal=causal)
    return heads.transpose(1, 2) if first else heads.permute(2, 0, 1, 3)
