"""Attention as pure functions of tensors: torch's own door, and a wide one with every option."""

from numbers import Real
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkern.ops import _backend, _surroundings, _torchs_own
from seqkern.ops._attention_backends import CPU_DTYPES, CPU_READY, PLAIN, Wanted
from seqkern.ops._attention_checks import (
    check_cu_seqlens,
    check_extras,
    check_options,
    check_shapes,
    sequence_lengths,
)
from seqkern.ops.attention import direct_attention
from seqkern.spec import attention as spec
from seqkern.spec.attention import Options, Tensors

__all__ = ["attention", "scaled_dot_product_attention"]

_op = torch.ops.seqkern.attention.default
_sdpa = torch.ops.seqkern.sdpa.default._op if CPU_READY else None  # past a Python function around it
_NUMBERS = (int, float)
FAR = 2**30  # keys to a side: no sequence is so long, and kernels count them in 32 bits
Window = int | tuple[int | None, int | None] | None


def _diagonal(causal: bool | str, window: Window) -> tuple[int, int, bool]:
    """window_left, window_right and bottom_right of the op; -1 for no limit."""
    if isinstance(causal, bool | torch.SymBool):
        causal = "top-left" if causal else False  # known from here on, also to a compiler
    elif causal not in (False, True, "top-left", "bottom-right"):
        raise ValueError(
            f"attention: causal is {causal!r}, expected False, True, 'top-left' or 'bottom-right'"
        )
    sides = window if isinstance(window, tuple | list) else (window, window)
    if len(sides) != 2 or any(
        side is not None and not isinstance(side, int | torch.SymInt) for side in sides
    ):
        raise TypeError(
            f"attention: window is {window!r}, expected a whole number of keys or a pair (left, right) of them"
        )
    if any(side is not None and side < 0 for side in sides):
        raise ValueError(
            f"attention: window is {window!r}, expected numbers of keys that are not negative; None for no limit"
        )
    left, right = (-1 if side is None or side >= FAR else side for side in sides)
    return left, 0 if causal else right, causal not in (True, "top-left")


def _four(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dim() == 4 else x[(None,) * (4 - x.dim())]


def _longest(name: str, cu: Tensor, total: int, rows: str, given: int | None) -> int:
    """The longest packed sequence; without ``given`` the lengths are read, and checked, from ``cu``."""
    if torch.compiler.is_compiling():
        return total if given is None else given
    if given is not None and not cu.is_cpu:
        return given
    longest = max(sequence_lengths(f"cu_seqlens_{name}", cu, total, rows), default=0)
    if given is not None and given < longest:
        raise RuntimeError(
            f"attention: max_seqlen_{name} is {given}, but a sequence of cu_seqlens_{name} is {longest} long"
        )
    return longest if given is None else given


def _run(name: str, t: Tensors, o: Options) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Output, lse and weights by a backend; the last two are None where they were not wanted."""
    if name == "torch":
        return _torch(t, o), None, None
    if o.dropout_p > 0 and t.seed is None:
        t = t._replace(seed=torch.randint(2**62, (1,), device=t.query.device))
    # A compiler cannot follow the spec where it reads how long packed sequences are.
    if name == "reference" and not (torch.compiler.is_compiling() and t.cu_seqlens_q is not None):
        return spec.attention(*t, *o)
    return (_op if _surroundings.is_looked_on() else direct_attention)(*t, *o)


def _torch(t: Tensors, o: Options) -> Tensor:
    """torch's kernel, with what it does not know by name expressed as its mask."""
    q, k, v = t.query, t.key, t.value
    L, S = q.shape[2], k.shape[2]
    gqa = bool(q.shape[1] != k.shape[1])  # of what torch.onnx.export traces, a tensor
    offset = S - L if o.bottom_right else 0
    left, right = o.window_left, o.window_right
    plain = t.mask is None and t.bias is None and t.alibi_slopes is None and left < 0
    if plain and (right < 0 or (right == 0 and offset == 0)):
        return _torchs_own.call(
            F.scaled_dot_product_attention,
            q,
            k,
            v,
            dropout_p=o.dropout_p,
            is_causal=right == 0,
            scale=o.scale,
            enable_gqa=gqa,
        )
    distance = torch.arange(S, device=q.device) - torch.arange(L, device=q.device)[:, None] - offset
    mask, bias = t.mask, t.bias
    if left >= 0:
        mask = distance >= -left if mask is None else mask & (distance >= -left)
    if right >= 0:
        mask = distance <= right if mask is None else mask & (distance <= right)
    if t.alibi_slopes is not None:
        slopes = (
            t.alibi_slopes[..., None, None] if t.alibi_slopes.dim() == 2 else t.alibi_slopes[:, None, None]
        )
        alibi = -slopes.to(torch.promote_types(q.dtype, torch.float32)) * distance.abs()
        bias = alibi if bias is None else bias + alibi
    mask = _four(mask)
    if mask is not None:
        # torch multiplies what nobody sees by zero, and NaN survives that.
        seen = mask.any(dim=-2)
        seen = seen.any(dim=1, keepdim=True) if seen.shape[1] != 1 else seen
        k, v = (torch.where(seen[..., None], x, 0.0) for x in (k, v))
    if bias is not None:
        # In 32 bits on a CPU, whose kernels take it: 16 would round the scores.
        bias = bias.to(torch.promote_types(q.dtype, torch.float32) if q.is_cpu else q.dtype)
        mask = bias if mask is None else torch.where(mask, bias, -torch.inf)
    return _torchs_own.call(
        F.scaled_dot_product_attention,
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=o.dropout_p,
        scale=o.scale,
        enable_gqa=gqa,
    )


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value as torch's own attention gets them under autocast."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x for x in tensors
    )


def short_way(query, key, value, mask, causal, scale, gqa) -> Tensor | None:
    """The output of a call that the compiled kernels serve, on a CPU, where nobody looks on; past the choice, which
    would take longer than a short call. None: the long way finds out who serves it."""
    if _surroundings.is_looked_on() or _backend.special or not _sdpa:
        return None
    for x in (query, key, value) if mask is None else (query, key, value, mask):
        if type(x) not in PLAIN or not x.is_cpu:
            return None
    if not (type(causal) is type(gqa) is bool and (scale is None or type(scale) is float)):
        return None
    cast = torch._C._is_any_autocast_enabled()  # type: ignore[attr-defined]
    if torch.is_grad_enabled() and torch._C._any_requires_grad(query, key, value, mask):  # type: ignore[attr-defined]
        if cast or mask is not None or not _agree(query, key, value, gqa):
            return None
        o = Options(query.shape[-1] ** -0.5 if scale is None else scale, window_right=0 if causal else -1)
        return direct_attention(*Tensors(query, key, value), *o)[0]
    if cast:
        query, key, value = _autocast(query, key, value)
    return _sdpa(query, key, value, mask, causal, scale, gqa)


def _agree(query: Tensor, key: Tensor, value: Tensor, gqa: bool) -> bool:
    """Whether tensors are of rank 4, of one dtype and of sizes that the compiled kernels take."""
    for x in (query, key, value):
        if x.dim() != 4 or x.is_nested or x.dtype is not query.dtype or x.layout is not torch.strided:
            return False
    B, Hq, _, D = query.shape
    _, Hkv, S, Dv = value.shape
    if key.shape != (B, Hkv, S, D) or value.shape[0] != B or not (Hq and Hkv and D and Dv):
        return False
    return query.dtype in CPU_DTYPES and Hq % Hkv == 0 and (gqa or Hq == Hkv)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool | str = False,
    window: Window = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    return_weights: Literal[False, "heads", "mean"] = False,
    backend: str | None = None,
):
    r"""Scaled dot-product attention with every option, in any combination.

    .. math::
        s_{ij} &= \mathrm{cap}(\mathrm{scale}\; q_i \cdot k_j) + b_{ij} - a\,|j - i - d| \\
        o_i &= \sum_{j \in V_i} \mathrm{dropout}\Big(\frac{e^{s_{ij}}}{e^{\mathrm{sink}} + \sum_{j \in V_i} e^{s_{ij}}}
        \Big)\, v_j

    Query i sees the keys that ``mask`` shows and that lie in ``window`` around its place on the diagonal, key i + d.
    d is 0 for ``causal=True`` and ``"top-left"``, else S - L: the last query stands at the last key. A query that sees
    no key gets 0 and no gradient. A key that no query sees may be NaN.

    Args:
        query: [B, Hq, L, D], or packed [total_q, Hq, D] with ``cu_seqlens_q`` (the layout of flash-attn's varlen).
        key: [B, Hkv, S, D] or [total_k, Hkv, D]; Hkv divides Hq, and query head h reads head h // (Hq / Hkv).
        value: [B, Hkv, S, Dv] or [total_k, Hkv, Dv].
        mask: bool, True = attend, broadcast to [B, Hq, L, S] (of packed input: to the longest lengths).
        bias: added to the scores, broadcast as ``mask``; gets a gradient of its own shape.
        causal: no key after the query: False, True (torch's ``is_causal``), ``"top-left"``, ``"bottom-right"``.
        window: how many keys before and after its place a query sees: (left, right), None for no limit; a number
            stands for both sides. With ``causal`` the right is 0.
        softcap: c in :math:`\mathrm{cap}(x) = c \tanh(x / c)`; 0 for none.
        alibi_slopes: a, [Hq] or [B, Hq].
        sinks: [Hq], logits that join the denominator of every row.
        dropout_p: probability that a weight is dropped. Not switched off by anything but 0.
        dropout_seed: int64, one element; the same seed drops the same weights on every backend. Drawn from torch's
            generator if None.
        scale: 1 / sqrt(D) if None.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 [B + 1], where each sequence begins, and the total.
        max_seqlen_q, max_seqlen_k: the longest sequences. If None they are read from ``cu_seqlens``, for which a GPU is
            waited for. On a CPU the values of ``cu_seqlens`` are always checked, on a GPU only then.
        return_lse: also return the logarithm of the denominators, [B, Hq, L] or [Hq, total_q] in float32 (float64 for
            float64).
        return_weights: also return the weights after dropout, of dense input: ``"heads"`` [B, Hq, L, S], ``"mean"``
            over the heads [B, L, S].
        backend: forces a backend for this call, before `seqkern.backend` does.

    Returns:
        output [B, Hq, L, Dv] or [total_q, Hq, Dv]; with ``return_lse`` or ``return_weights`` a tuple (output[, lse][,
        weights]).

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit, a mask that does not broadcast, a ``dropout_p`` that is
            no probability, ``cu_seqlens`` that descend or do not end at the total, a forced backend that cannot serve.
        ValueError: a negative window or softcap, an unknown word for an option, weights of packed input.
        TypeError: something else than a tensor; a window that is no number; a scale or softcap that is a tensor and
            requires a gradient.

    Source: Vaswani et al. 2017, arXiv:1706.03762; the options' sources are listed in `seqkern.spec.attention`.

    >>> q, k, v = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 5, 8), torch.arange(5.).expand(1, 2, 8, 5).mT
    >>> attention(q, k, v, causal="bottom-right")[0, 0, :, 0]
    tensor([1.0000, 1.5000, 2.0000])
    """
    if isinstance(query, Tensor) and scale is None:
        scale = max(query.shape[-1] if query.dim() else 1, 1) ** -0.5
    nothing_else = bias is alibi_slopes is sinks is dropout_seed is window is backend is None
    not_packed = cu_seqlens_q is cu_seqlens_k is max_seqlen_q is max_seqlen_k is None
    if (
        nothing_else
        and not_packed
        and type(softcap) in _NUMBERS
        and type(dropout_p) in _NUMBERS
        and softcap == dropout_p == 0
        and return_lse is return_weights is False
        and isinstance(query, Tensor)
        and query.dim() == 4
        and (mask is None or getattr(mask, "dtype", None) is torch.bool)
    ):
        output = short_way(query, key, value, mask, causal, scale, True)
        if output is not None:
            return output
    left, right, bottom_right = _diagonal(causal, window)
    weights = return_weights if isinstance(return_weights, str) else ""
    o = Options(scale or 0.0, softcap or 0.0, dropout_p, left, right, bottom_right, weights=weights)
    if all(isinstance(x, Tensor) for x in (query, key, value)):
        query, key, value = _autocast(query, key, value)
    t = Tensors(query, key, value, mask, bias, alibi_slopes, sinks, dropout_seed, cu_seqlens_q, cu_seqlens_k)
    check_options(t, o, return_weights)
    check_shapes(t)
    if cu_seqlens_q is None and cu_seqlens_k is None:
        if max_seqlen_q is not None or max_seqlen_k is not None:
            given = "max_seqlen_q" if max_seqlen_q is not None else "max_seqlen_k"
            raise RuntimeError(
                f"attention: {given} is given without cu_seqlens_q and cu_seqlens_k, which packed input needs; leave "
                "it out of dense input"
            )
        batch, L, S = query.shape[0], query.shape[2], key.shape[2]
    else:
        check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query.shape[0], "rows of query")
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, key.shape[0], "rows of key")
        assert cu_seqlens_q is not None and cu_seqlens_k is not None
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise RuntimeError(
                f"attention: cu_seqlens_q is {list(cu_seqlens_q.shape)} and cu_seqlens_k "
                f"{list(cu_seqlens_k.shape)}, expected both to be [sequences + 1]"
            )
        if return_weights:
            raise ValueError(
                "attention: return_weights needs dense input, packed sequences have no common shape; pad them and hide "
                "the padding by mask"
            )
        batch = cu_seqlens_q.shape[0] - 1
        L = _longest("q", cu_seqlens_q, query.shape[0], "rows of query", max_seqlen_q)
        S = _longest("k", cu_seqlens_k, key.shape[0], "rows of key", max_seqlen_k)
        o = o._replace(max_seqlen_q=L, max_seqlen_k=S)
    check_extras(t, batch, L, S)
    t = t._replace(mask=_four(mask), bias=_four(bias))
    wanted = Wanted(o, return_lse, dropout_seed is not None)
    name = _backend.choose(_backend.Call("attention", t, wanted), backend).name
    output, lse, shares = _run(name, t, o)
    found = (output, *([lse] if return_lse else []), *([shares] if return_weights else []))
    return found if len(found) > 1 else output


def _beyond(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, gqa: bool, dropout_p: float, scale
) -> str:
    """Why only torch's kernel knows what to do with these arguments, which may be to raise; empty if they are plain."""
    if not all(isinstance(flag, bool | torch.SymBool) for flag in (is_causal, gqa)):
        return "is_causal or enable_gqa is no bool"
    if isinstance(scale, Tensor) or not (
        scale is None or isinstance(scale, Real | torch.SymFloat | torch.SymInt)
    ):
        return "the scale is no number"
    if any(x is not None and x.is_nested for x in (q, k, v, mask)):
        return "a tensor is nested"
    if any(x.layout != torch.strided for x in (q, k, v)):
        return "a tensor is not strided"
    if not 2 <= q.dim() <= 4 or q.dim() != k.dim() or q.dim() != v.dim():
        return "query, key and value are not all of one rank between 2 and 4"
    if is_causal and mask is not None:
        return "is_causal is given together with a mask"
    if not q.is_floating_point() or q.dtype != k.dtype or q.dtype != v.dtype:
        return "query, key and value are not of one floating-point dtype"
    if any(x is not None and x.device != q.device for x in (k, v, mask)):
        return "the tensors are on several devices"
    if q.shape[-1] != k.shape[-1] or k.shape[:-1] != v.shape[:-1] or q.shape[:-3] != k.shape[:-3]:
        return "the sizes of query, key and value do not agree"
    if q.dim() > 2 and q.shape[-3] != k.shape[-3]:
        divides = k.shape[-3] > 0 and q.shape[-3] % k.shape[-3] == 0
        if not (gqa and divides):
            return "the numbers of heads differ and are not declared as groups"
    if mask is not None:
        full = (*q.shape[:-1], k.shape[-2])
        if mask.dtype not in (torch.bool, torch.float32, q.dtype) or mask.dim() > q.dim():
            return "the mask has a dtype or rank of its own"
        if any(n not in (1, m) for n, m in zip(reversed(mask.shape), reversed(full))):
            return "the mask does not broadcast"
    if not isinstance(dropout_p, int | float) or not 0 <= dropout_p <= 1:
        return "dropout_p is not a probability"
    return ""


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    r"""``torch.nn.functional.scaled_dot_product_attention``, by the fastest backend that serves the call.

    .. math:: o = \mathrm{softmax}(\mathrm{scale}\; q k^\top + m)\, v

    Args:
        query, key, value: [..., Hq, L, D], [..., Hkv, S, D] and [..., Hkv, S, Dv].
        attn_mask: bool (True = attend), or added to the scores and then given its gradient; broadcast to
            [..., Hq, L, S].
        dropout_p: probability that a weight is dropped, whether or not a module is training.
        is_causal: query i sees the keys up to i.
        scale: 1 / sqrt(D) if None.
        enable_gqa: Hkv may be smaller than Hq, which it divides.

    Returns:
        [..., Hq, L, Dv].

    Raises: what torch raises: arguments beyond those above are handed to torch's function as they are.

    Source: Vaswani et al. 2017, arXiv:1706.03762.

    >>> q, k, v = torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 5, 8), torch.ones(2, 4, 5, 6)
    >>> scaled_dot_product_attention(q, k, v, is_causal=True).shape
    torch.Size([2, 4, 3, 6])
    """

    def by_torch() -> Tensor:
        arguments = (query, key, value, attn_mask, dropout_p, is_causal)
        return _torchs_own.call(
            F.scaled_dot_product_attention, *arguments, scale=scale, enable_gqa=enable_gqa
        )

    if type(dropout_p) in _NUMBERS and dropout_p == 0:
        output = short_way(query, key, value, attn_mask, is_causal, scale, enable_gqa)
        if output is not None:
            return output
    given = (query, key, value, *(() if attn_mask is None else (attn_mask,)))
    if not all(isinstance(x, Tensor) for x in given):
        return by_torch()
    q, k, v = _autocast(query, key, value)
    beyond = _beyond(q, k, v, attn_mask, is_causal, enable_gqa, dropout_p, scale)
    o = Options(0.0)
    t = Tensors(q, k, v)
    if not beyond:
        lead = (None,) * (4 - q.dim())
        is_bool = attn_mask is not None and attn_mask.dtype == torch.bool
        t = Tensors(
            *(x[lead] for x in (q, k, v)),
            mask=_four(attn_mask) if is_bool else None,
            bias=None if is_bool else _four(attn_mask),
        )
        o = Options(
            max(q.shape[-1], 1) ** -0.5 if scale is None else scale,
            dropout_p=dropout_p,
            window_right=0 if is_causal else -1,
        )
    name = _backend.choose(_backend.Call("attention", t, Wanted(o, only_torch=beyond))).name
    if name == "torch":
        return by_torch()
    output = _run(name, t, o)[0]
    return output.reshape(*query.shape[:-1], value.shape[-1])
