"""An encoder layer without a gradient as few calls instead of those of its modules."""

from typing import Any

import torch
from torch import Tensor, nn

from seqkern.functional import _layer, attention
from seqkern.functional._layer import Layer, Norm
from seqkern.functional.attention import short_way
from seqkern.nn import _masks
from seqkern.nn._modules import activation_name, changed
from seqkern.nn._step import is_plain, weights_of, weights_of_attention
from seqkern.ops import _backend


def in_few_calls(
    layer: nn.Module, x: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool
) -> Tensor | None:
    """What the layer makes of x [B, L, E] ([L, B, E]); None where its modules must be called.

    That is where a gradient may be asked for, layer or parts are no plain modules in eval mode (as for a step), inputs
    are nested, unbatched, empty or of no kernel's kind, both masks are given, or somebody watches what is called.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not vars(type(layer)).get("in_one_call"):
        return None
    if (
        type(x) not in _backend.PLAIN
        or x.is_nested
        or x.dim() != 3
        or (mask is not None and padding is not None)
    ):
        return None
    activation = activation_name(layer.activation)  # type: ignore[arg-type]
    if activation is None or torch._C._is_any_autocast_enabled() or not _layer.may_be_short(x, activation):  # type: ignore[attr-defined]
        return None
    parts: Any = layer._modules
    E = x.shape[2]
    if not is_plain(layer, E):
        return None
    own = parts["self_attn"]
    if changed(own) or own.training or own.embed_dim != E or own._why_no_step():
        return None
    t: Any = (
        *weights_of_attention(own),
        *weights_of(parts["linear1"]),
        *weights_of(parts["linear2"]),
        *weights_of(parts["norm1"]),
        *weights_of(parts["norm2"]),
    )
    if any(each is not None and type(each) not in _backend.PLAIN for each in t):
        return None  # also for text, see weights_of
    norms = Norm(t[8], t[9], parts["norm1"].eps), Norm(t[10], t[11], parts["norm2"].eps)
    whole = Layer(t[:2], t[2:4], t[4:6], t[6:8], norms, layer.norm_first, activation)  # type: ignore[arg-type]
    if not _layer.fits(x, whole):
        return None
    first, H = own.batch_first, own.num_heads
    seen = None
    if mask is not None or padding is not None or is_causal:
        _masks.check_dtypes(mask, padding)
        _masks.check_ranks(mask, padding, ())
        B, L = x.shape[:2] if first else (x.shape[1], x.shape[0])
        seen = _masks.seen(mask, padding, is_causal, exact=False, more_keys=0, sizes=(B, H, L, L))

    def attend(three: Tensor) -> Tensor:
        q, k, v = (
            three.view(*x.shape[:2], 3, H, E // H)
            .permute((2, 0, 3, 1, 4) if first else (2, 1, 3, 0, 4))
            .unbind()
        )
        heads: Any = short_way(q, k, v, None, False, None, False) if seen is None else None
        if heads is None:
            heads = attention(q, k, v, **(seen or _masks.Seen())._asdict())
        return heads.transpose(1, 2) if first else heads.permute(2, 0, 1, 3)

    return _layer.in_few_calls(x, whole, attend)
