"""``aten::_transformer_encoder_layer_fwd`` and ``aten::_native_multi_head_attention``.

torch.nn's encoder layer and attention call these in eval mode where no gradient is needed, and never reach
scaled_dot_product_attention then. A padded batch arrives as a nested tensor: its rows are attended to as packed
sequences.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkern import functional
from seqkern.dispatcher.choice import TOO_SMALL, attention_has_kernels, declined, takes
from seqkern.functional import _layer
from seqkern.ops import _backend, _surroundings, _torchs_own
from seqkern.ops._attention_backends import Wanted
from seqkern.spec.attention import Options, Tensors

# torch's paths are a few calls in C++; ours is a dozen from Python, of 5 us and less each (docs/decisions.md).
WORTH_A_LAYER = 100_000_000  # multiplications and additions of both products of the attention


class _Rows(NamedTuple):
    """Tokens to attend among: dense [B, L, E], or packed [total, E]."""

    data: Tensor
    sizes: Tensor | None = None  # of the nested tensor that the packed rows come from, [B, 2]

    @property
    def cu_seqlens(self) -> Tensor | None:
        return None if self.sizes is None else F.pad(self.sizes[:, 0].cumsum(0), (1, 0)).to(self.data.device)

    def like(self, data: Tensor) -> Tensor:
        """The result in the form of the input."""
        if self.sizes is None:
            return data
        strides = torch.tensor([data.shape[-1], 1]).expand(self.sizes.shape[0], 2).contiguous()
        sizes = self.sizes.clone()
        sizes[:, 1] = data.shape[-1]
        starts = (sizes.prod(1).cumsum(0) - sizes.prod(1)).contiguous()
        return torch._nested_view_from_buffer(data.reshape(-1), sizes, strides, starts)  # type: ignore[attr-defined]


def _rows(x: Tensor) -> _Rows | None:
    """None for a nested tensor that is not one piece of memory."""
    if not x.is_nested:
        return _Rows(x) if x.dim() == 3 else None
    if x.layout is not torch.strided or not x.is_contiguous() or x.dim() != 3:
        return None
    sizes = x._nested_tensor_size()
    return _Rows(x.values().view(-1, int(sizes[0, 1])), sizes) if sizes.shape[0] else None


def _seen(mask: Tensor | None, kind: int | None) -> Tensor | None:
    """True = attend, in four dimensions; torch takes every number but 0 for masked, and so does this."""
    if mask is None:
        return None
    if kind == 0:  # [L, L]
        mask = mask[None, None]
    elif kind == 1:  # [B, L]
        mask = mask[:, None, None]
    for at in range(3):  # expanded by the module: one copy says it all
        if mask.shape[at] > 1 and mask.stride(at) == 0:
            mask = mask.narrow(at, 0, 1)
    return ~mask.bool()


def _split(x: Tensor, rows: _Rows, heads: int, parts: int) -> tuple[Tensor, ...]:
    """[..., parts * E] as `parts` tensors in the layout of `functional.attention`."""
    found = x.unflatten(-1, (parts, heads, -1)).unbind(-3)
    return found if rows.sizes is not None else tuple(each.transpose(1, 2) for each in found)


def _attend(rows: _Rows, qkv: Tensor, heads: int, seen: Tensor | None, weights: Any = ""):
    """Attention among the rows, with the heads merged again, and the weights if they are wanted."""
    q, k, v = _split(qkv, rows, heads, 3)
    more = {}
    if rows.sizes is not None:
        cu, longest = rows.cu_seqlens, int(rows.sizes[:, 0].max())
        more = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}
    found = functional.attention(q, k, v, mask=seen, return_weights=weights or False, **more)
    output, shares = found if isinstance(found, tuple) else (found, None)
    assert isinstance(output, Tensor)
    if rows.sizes is None:
        output = output.transpose(1, 2)
    return output.flatten(-2), shares


def _work(x: Tensor) -> int:
    """Of a dense batch, or of a nested tensor, whose sizes are read."""
    if not x.is_nested:
        return 4 * x.numel() * x.shape[1] if x.dim() == 3 else 0
    sizes = x._nested_tensor_size()
    return (
        4 * int(sizes[:, 0].square().sum()) * int(sizes[0, 1]) if sizes.dim() == 2 and sizes.shape[0] else 0
    )


def _ours(x: Tensor, heads: int, mask: Tensor | None, kind: int | None, weights: str, params):
    """The rows and the keys that each sees, where the call is ours; else None."""
    special, has_kernels = _backend.special, attention_has_kernels(x.device.type)
    if _torchs_own.here.own or not (special or (has_kernels and not weights)):
        return None
    worth = _work(x) >= WORTH_A_LAYER
    if not (worth or special):
        return None
    rows = _rows(x)
    if rows is None or any(type(t) not in _surroundings.PLAIN or t.is_nested for t in (rows.data, *params)):
        return None
    if torch._C._is_any_autocast_enabled():  # type: ignore[attr-defined]
        return None
    seen = _seen(mask, kind)
    (part,) = _split(rows.data, rows, heads, 1)
    cu = rows.cu_seqlens
    t = Tensors(part, part, part, mask=seen, cu_seqlens_q=cu, cu_seqlens_k=cu)
    call = _backend.Call("attention", t, Wanted(Options(1.0, weights=weights)))
    if has_kernels and not worth and _backend.forced() is None:
        declined(call, (("seqkern", TOO_SMALL),))
    elif weights and _backend.forced() is None:
        declined(call, (("seqkern", "torch's path has the weights at hand, which are asked for"),))
    elif rows.sizes is not None and weights:
        declined(call, (("seqkern", "the weights of a nested tensor are asked for"),))
    elif takes(call):
        return rows, seen
    return None


def encoder_layer(own: Callable) -> Callable:
    def run(
        src,
        embed_dim,
        num_heads,
        qkv_weight,
        qkv_bias,
        proj_weight,
        proj_bias,
        use_gelu,
        norm_first,
        eps,
        norm_weight_1,
        norm_bias_1,
        norm_weight_2,
        norm_bias_2,
        ffn_weight_1,
        ffn_bias_1,
        ffn_weight_2,
        ffn_bias_2,
        mask=None,
        mask_type=None,
    ):
        attends = (qkv_weight, qkv_bias, proj_weight, proj_bias)
        norms = (norm_weight_1, norm_bias_1, norm_weight_2, norm_bias_2)
        feeds = (ffn_weight_1, ffn_bias_1, ffn_weight_2, ffn_bias_2)
        ours = _ours(src, num_heads, mask, mask_type, "", (*attends, *norms, *feeds))
        if ours is None:
            options = (use_gelu, norm_first, eps, *norms, *feeds, mask, mask_type)
            return _torchs_own.call(own, src, embed_dim, num_heads, *attends, *options)
        rows, seen = ours

        def attend(three: Tensor) -> Tensor:
            return _attend(rows, three, num_heads, seen)[0]

        layer = _layer.Layer(
            (_layer.Attention((qkv_weight, qkv_bias), (proj_weight, proj_bias), attend),),
            (ffn_weight_1, ffn_bias_1),
            (ffn_weight_2, ffn_bias_2),
            (_layer.Norm(norm_weight_1, norm_bias_1, eps), _layer.Norm(norm_weight_2, norm_bias_2, eps)),
            norm_first,
            "gelu" if use_gelu else "relu",
        )
        return rows.like(_layer.whole_layer(rows.data, layer))

    return run


def multi_head_attention(own: Callable) -> Callable:
    def run(
        query,
        key,
        value,
        embed_dim,
        num_head,
        qkv_weight,
        qkv_bias,
        proj_weight,
        proj_bias,
        mask=None,
        need_weights=True,
        average_attn_weights=True,
        mask_type=None,
    ):
        params = (qkv_weight, qkv_bias, proj_weight, proj_bias)
        weights = "" if not need_weights else "mean" if average_attn_weights else "heads"
        itself = query is key and query is value
        ours = _ours(query, num_head, mask, mask_type, weights, params) if itself else None
        if ours is None:
            options = (mask, need_weights, average_attn_weights, mask_type)
            return _torchs_own.call(own, query, key, value, embed_dim, num_head, *params, *options)
        rows, seen = ours
        output, shares = _attend(
            rows, functional.linear(rows.data, qkv_weight, qkv_bias), num_head, seen, weights
        )
        return rows.like(functional.linear(output, proj_weight, proj_bias)), shares

    return run


STAND_INS = {
    "_transformer_encoder_layer_fwd": encoder_layer,
    "_native_multi_head_attention": multi_head_attention,
}
