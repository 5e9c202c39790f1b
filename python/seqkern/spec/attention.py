r"""Scaled dot-product attention with all of its options, and its gradient.

.. math::
    s_{ij} &= \mathrm{cap}(\mathrm{scale}\; q_i \cdot k_j) + b_{ij} - a\,|j - i - d|
        \qquad \mathrm{cap}(x) = c \tanh(x / c) \\
    \mathrm{lse}_i &= \log\Big(e^{\mathrm{sink}} + \sum_{j \in V_i} e^{s_{ij}}\Big) \qquad
    p_{ij} = e^{s_{ij} - \mathrm{lse}_i}\ (j \in V_i), \; 0\ \text{elsewhere} \qquad
    o_i = \sum_j \mathrm{dropout}(p)_{ij}\, v_j

:math:`V_i` holds the keys that the mask shows and that lie in the window,
:math:`-\mathrm{left} \le j - i - d \le \mathrm{right}`; the diagonal d is 0, or S - L if the last query stands at the
last key (``bottom_right``). A row with empty :math:`V_i` gives 0, no gradient, and lse = sink, -inf without one.
A key that no query sees is never read, so its NaN does not leak.

Sources: Vaswani et al. 2017, arXiv:1706.03762; grouped heads: Ainslie et al. 2023, arXiv:2305.13245; ALiBi: Press et
al. 2022, arXiv:2108.12409; capped scores: Gemma 2, arXiv:2408.00118; sinks: Xiao et al. 2024, arXiv:2309.17453.

Sizes: B batch, Hq heads of the queries, Hkv heads of keys and values (Hq = G * Hkv, query head h reads head h // G),
L queries, S keys, D head size, Dv head size of the values. Half precision is computed in float32 and rounded once at
the end; kernels that multiply bfloat16 numbers round the weights and the gradients of the scores as well.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from seqkern.spec.dropout import kept


class Tensors(NamedTuple):
    """The tensors of a call, in the order of the op's arguments."""

    query: Tensor  #: [B, Hq, L, D], or packed [total_q, Hq, D] with cu_seqlens
    key: Tensor  #: [B, Hkv, S, D], or packed [total_k, Hkv, D]
    value: Tensor  #: [B, Hkv, S, Dv], or packed [total_k, Hkv, Dv]
    mask: Tensor | None = None  #: bool, True = attend; four dimensions, each of B, Hq, L, S or 1
    bias: Tensor | None = None  #: added to the scores; shape as mask
    alibi_slopes: Tensor | None = None  #: [Hq] or [B, Hq]
    sinks: Tensor | None = None  #: [Hq]
    seed: Tensor | None = None  #: int64, one element; read where dropout_p > 0
    cu_seqlens_q: Tensor | None = (
        None  #: [B + 1], where each packed sequence of queries begins, and the total
    )
    cu_seqlens_k: Tensor | None = None  #: [B + 1], the same for keys and values


class Options(NamedTuple):
    """The numbers of a call, in the order of the op's arguments."""

    scale: float
    softcap: float = 0.0  #: c; 0 for none
    dropout_p: float = 0.0
    window_left: int = -1  #: keys before the diagonal that a query sees; -1 for all
    window_right: int = -1  #: keys after it; -1 for all, 0 for causal
    bottom_right: bool = False
    max_seqlen_q: int = 0  #: of packed input: the longest sequence, also the size of mask and bias
    max_seqlen_k: int = 0
    weights: str = ""  #: "heads", "mean" (over the heads), or "" for none


class Gradients(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _per_head(slopes: Tensor) -> Tensor:
    """[Hq] or [B, Hq] -> [1 or B, Hq, 1, 1]."""
    return slopes[..., None, None] if slopes.dim() == 2 else slopes[None, :, None, None]


class _Rows(NamedTuple):
    """What forward and backward share; k and v without the keys that nobody sees."""

    q: Tensor
    k: Tensor
    v: Tensor
    visible: Tensor | None  # [B or 1, Hq or 1, L, S]
    distance: Tensor  # j - i - d: [L, S]
    slope_of_cap: Tensor | None  # d cap(x) / dx: [B, Hq, L, S]
    p: Tensor  # [B, Hq, L, S]
    lse: Tensor  # [B, Hq, L]
    keep: Tensor | None
    p_sink: Tensor | None  # the sink's share of each row: [B, Hq, L]


def _times(per_query_head: Tensor, per_key_head: Tensor) -> Tensor:
    """[B, Hq, L, X] @ [B, Hkv, X, Y] -> [B, Hq, L, Y], each key head serving its group of query heads."""
    B, Hq, L, X = per_query_head.shape
    Hkv, Y = per_key_head.shape[1], per_key_head.shape[3]
    grouped = per_query_head.reshape(B, Hkv, (Hq // max(Hkv, 1)) * L, X)
    return (grouped @ per_key_head).reshape(B, Hq, L, Y)


def _over_queries(left: Tensor, right: Tensor, Hkv: int) -> Tensor:
    """Sum over the queries of a group: [B, Hq, L, X], [B, Hq, L, Y] -> [B, Hkv, X, Y]."""
    B, Hq, L = left.shape[:3]
    rows = (Hq // max(Hkv, 1)) * L
    left, right = (x.reshape(B, Hkv, rows, x.shape[3]) for x in (left, right))
    return left.transpose(-1, -2) @ right


def _rows(t: Tensors, o: Options, batch: Tensor) -> _Rows:
    q, k, v = _wide(t.query), _wide(t.key), _wide(t.value)
    (_, Hq, L, _), (_, Hkv, S, _) = q.shape, k.shape
    at = torch.arange(S, device=q.device) - torch.arange(L, device=q.device)[:, None]
    distance = at - (S - L) if o.bottom_right else at
    visible = t.mask
    for outside in (
        distance < -o.window_left if o.window_left >= 0 else None,
        distance > o.window_right if o.window_right >= 0 else None,
    ):
        if outside is not None:
            inside = ~outside[None, None]
            visible = inside if visible is None else visible & inside
    if visible is not None:
        seen = visible.any(dim=-2)  # [B or 1, Hq or 1, S]
        if seen.shape[1] != 1:
            seen = seen.unflatten(1, (Hkv, -1)).any(dim=2)
        k, v = (torch.where(seen[..., None], x, 0.0) for x in (k, v))
    s = _times(q, k.transpose(-1, -2)) * o.scale
    slope_of_cap = None
    if o.softcap:
        t_s = torch.tanh(s / o.softcap)
        s, slope_of_cap = o.softcap * t_s, 1 - t_s.square()
    if t.bias is not None:
        s = s + t.bias.to(s.dtype)
    if t.alibi_slopes is not None:
        s = s - _per_head(t.alibi_slopes.to(s.dtype)) * distance.abs()
    if visible is not None:
        s = torch.where(visible, s, -torch.inf)
    sink = None if t.sinks is None else t.sinks.to(s.dtype)[None, :, None, None]
    # The result does not depend on the shift, so no gradient flows through it.
    shift = s.detach().amax(dim=-1, keepdim=True) if S else torch.full_like(q[..., :1].detach(), -torch.inf)
    if sink is not None:
        shift = torch.maximum(shift, sink.detach())
    shift = torch.where(shift == -torch.inf, 0.0, shift)
    e = torch.exp(s - shift)
    total = e.sum(dim=-1, keepdim=True)
    e_sink = None if sink is None else torch.exp(sink - shift)
    if e_sink is not None:
        total = total + e_sink
    empty = total == 0
    safe = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -torch.inf, shift + torch.log(safe)).squeeze(-1)
    keep = None
    if o.dropout_p > 0:
        assert t.seed is not None
        keep = kept(t.seed, o.dropout_p, batch, Hq, L, S)
    p_sink = None if e_sink is None else (e_sink / safe).squeeze(-1)
    return _Rows(q, k, v, visible, distance, slope_of_cap, e / safe, lse, keep, p_sink)


def _drop(x: Tensor, keep: Tensor | None, p: float) -> Tensor:
    if keep is None:
        return x
    return torch.where(keep, x * (1 / (1 - p) if p < 1 else 0.0), 0.0)


def _dense(t: Tensors, o: Options, batch: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    r = _rows(t, o, batch)
    w = _drop(r.p, r.keep, o.dropout_p)
    output = _times(w, r.v).to(t.query.dtype)
    if not o.weights:
        return output, r.lse, None
    return output, r.lse, (w.mean(dim=1) if o.weights == "mean" else w).to(t.query.dtype)


def _sum_to(x: Tensor, like: Tensor) -> Tensor:
    return x.sum_to_size(like.shape).to(like.dtype)


def _dense_backward(
    grads: Sequence[Tensor | None], t: Tensors, o: Options, batch: Tensor
) -> tuple[Tensor | None, ...]:
    grad_output, grad_lse, grad_weights = (None if g is None else _wide(g) for g in grads)
    r = _rows(t, o, batch)
    Hkv = r.k.shape[1]
    dw = torch.zeros_like(r.p)
    dv = torch.zeros_like(r.v)
    if grad_output is not None:
        dw = _times(grad_output, r.v.transpose(-1, -2))
        dv = _over_queries(_drop(r.p, r.keep, o.dropout_p), grad_output, Hkv)
    if grad_weights is not None:
        dw = dw + (grad_weights[:, None] / dw.shape[1] if o.weights == "mean" else grad_weights)
    dp = _drop(dw, r.keep, o.dropout_p)
    if r.visible is not None:
        dp = torch.where(r.visible, dp, 0.0)
    # How a row's sum of exponentials answers: what the softmax takes back, less what lse is asked for.
    delta = (r.p * dp).sum(dim=-1)
    if grad_lse is not None:
        delta = delta - torch.where(r.lse == -torch.inf, 0.0, grad_lse)
    ds = r.p * (dp - delta[..., None])
    dbias = None if t.bias is None else _sum_to(ds, t.bias)
    dslopes = dsinks = None
    if t.alibi_slopes is not None:
        dslopes = _sum_to(-(ds * r.distance.abs()).sum(dim=(-2, -1)), t.alibi_slopes)
    if t.sinks is not None:
        assert r.p_sink is not None
        dsinks = _sum_to(-(r.p_sink * delta).sum(dim=-1), t.sinks)
    if r.slope_of_cap is not None:
        ds = ds * r.slope_of_cap
    ds = ds * o.scale
    dq = _times(ds, r.k).to(t.query.dtype)
    dk = _over_queries(ds, r.q, Hkv)
    return dq, dk.to(t.key.dtype), dv.to(t.value.dtype), dbias, dslopes, dsinks


def _sequences(t: Tensors) -> list[tuple[slice, slice]]:
    assert t.cu_seqlens_q is not None and t.cu_seqlens_k is not None
    q, k = ([slice(*ends) for ends in pairwise(cu.tolist())] for cu in (t.cu_seqlens_q, t.cu_seqlens_k))
    return list(zip(q, k))


def _cut(x: Tensor | None, b: int, L: int, S: int) -> Tensor | None:
    """Sequence b's part of a mask or bias for the longest sequences."""
    if x is None:
        return None
    x = x if x.shape[0] == 1 else x[b : b + 1]
    x = x if x.shape[2] == 1 else x[:, :, :L]
    return x if x.shape[3] == 1 else x[..., :S]


def _one(t: Tensors, b: int, queries: slice, keys: slice) -> Tensors:
    """Sequence b of a packed call, as a dense call with a batch of one."""
    L, S = queries.stop - queries.start, keys.stop - keys.start
    slopes = t.alibi_slopes
    return Tensors(
        t.query[queries].transpose(0, 1)[None],
        t.key[keys].transpose(0, 1)[None],
        t.value[keys].transpose(0, 1)[None],
        _cut(t.mask, b, L, S),
        _cut(t.bias, b, L, S),
        slopes if slopes is None or slopes.dim() == 1 else slopes[b : b + 1],
        t.sinks,
        t.seed,
    )


def _packed(x: Tensor) -> Tensor:
    """[1, H, L, D] -> [L, H, D]."""
    return x[0].transpose(0, 1)


def attention(*arguments) -> tuple[Tensor, Tensor, Tensor | None]:
    """Arguments are the fields of `Tensors` and then of `Options`, in order.

    Returns output [B, Hq, L, Dv] or [total_q, Hq, Dv] in the query's dtype; lse [B, Hq, L] or [Hq, total_q] in float32
    (float64 for float64), natural logarithm; and the weights after dropout, [B, Hq, L, S], or [B, L, S] for "mean".
    """
    t, o = Tensors(*arguments[:10]), Options(*arguments[10:])
    device = t.query.device
    if t.cu_seqlens_q is None:
        return _dense(t, o, torch.arange(t.query.shape[0], device=device))
    nothing = t.query[:0].sum(-1)  # made of the query, so that it has a gradient where there is no sequence
    outputs, lses = [nothing.unsqueeze(-1).expand(-1, -1, t.value.shape[2])], [_wide(nothing).T]
    for b, (queries, keys) in enumerate(_sequences(t)):
        output, lse, _ = _dense(_one(t, b, queries, keys), o, torch.full((1,), b, device=device))
        outputs.append(_packed(output))
        lses.append(lse[0])
    return torch.cat(outputs), torch.cat(lses, dim=1), None


def attention_backward(grads: Sequence[Tensor | None], *arguments) -> Gradients:
    """The gradients of `attention` for those of output, lse and weights (None where there is none).

    Itself differentiable. The result depends on the gradients and the arguments alone.
    """
    t, o = Tensors(*arguments[:10]), Options(*arguments[10:])
    device = t.query.device
    if t.cu_seqlens_q is None:
        found = _dense_backward(grads, t, o, torch.arange(t.query.shape[0], device=device))
        return Gradients(*found)  # type: ignore[arg-type]
    grad_output, grad_lse, _ = grads
    parts: list[list[Tensor]] = [[x.new_empty((0, *x.shape[1:]))] for x in t[:3]]
    totals = [None if x is None else torch.zeros_like(x) for x in (t.bias, t.alibi_slopes, t.sinks)]
    for b, (queries, keys) in enumerate(_sequences(t)):
        own = (
            None if grad_output is None else grad_output[queries].transpose(0, 1)[None],
            None if grad_lse is None else grad_lse[None, :, queries],
            None,
        )
        one = _one(t, b, queries, keys)
        found = _dense_backward(own, one, o, torch.full((1,), b, device=device))
        for part, d in zip(parts, found):
            assert d is not None
            part.append(_packed(d))
        for place, d in enumerate(found[3:]):
            whole = totals[place]
            if whole is None or d is None:
                continue
            if whole.dim() == 4:
                pads = [n for size, had in zip(whole.shape[:1:-1], d.shape[:1:-1]) for n in (0, size - had)]
                d = torch.nn.functional.pad(d, pads)
            if whole.dim() in (2, 4) and whole.shape[0] != 1:
                at = torch.arange(whole.shape[0], device=device).view([-1] + [1] * (whole.dim() - 1)) == b
                d = torch.where(at, d, 0.0)
            totals[place] = whole + d
    return Gradients(*(torch.cat(part) for part in parts), *totals)  # type: ignore[arg-type]
