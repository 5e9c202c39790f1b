"""Attention backward: gradients of keys and values, of queries, and of a bias, each summed by one program alone.

The weights are computed again from the log-sum-exp (Dao et al. 2022, arXiv:2205.14135). Nothing is added by atomics:
the result is the same in every run. With w the weights after dropout, g the gradient of the output:

    dv = w^T g       ds = p (drop(g v^T) - delta)       delta = rowsum(o g) - dlse       dq = ds k       dk = ds^T q
"""

import torch
import triton
import triton.language as tl

from seqkern.kernels.launch import Launch, RowValues, operand, plane, prepare, run, unit_last
from seqkern.kernels.mods import (
    drop,
    in_units,
    kept,
    key_range,
    plane_offsets,
    query_range,
    reached,
    rows,
    score,
    sequence,
    shown,
    store_rows,
    weights_again,
)
from seqkern.kernels.tuning_attention import DELTA_ROWS, choose


@triton.jit
def row_value(x, b, h, begin, r, L, other):
    return tl.load(
        x.p + b.to(tl.int64) * x.batch + h.to(tl.int64) * x.head + begin + r, mask=r < L, other=other
    )


@triton.jit
def delta_kernel(
    o, do, lse, dlse, delta, packed, sizes, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr
):
    """What the softmax takes back from every weight of a row: rowsum(o g), less the gradient of lse."""
    L, S, Hq, _ = sizes
    blocks = tl.cdiv(L, BLOCK_M)
    at = tl.program_id(0)
    h = at // blocks % Hq
    b = at // blocks // Hq
    begin_q, _, L, S = sequence(b, L, S, packed)
    r = at % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    r64 = r.to(tl.int64)
    base_o = b.to(tl.int64) * o.batch + h.to(tl.int64) * o.head + begin_q * o.row
    base_do = b.to(tl.int64) * do.batch + h.to(tl.int64) * do.head + begin_q * do.row
    x = rows(o.p + base_o, r64 * o.row, r < L, DV, BLOCK_DV).to(tl.float32)
    g = rows(do.p + base_do, r64 * do.row, r < L, DV, BLOCK_DV).to(tl.float32)
    total = tl.sum(x * g, 1)
    if dlse is not None:
        base = b.to(tl.int64) * dlse.batch + h.to(tl.int64) * dlse.head + begin_q * dlse.row
        total -= tl.load(dlse.p + base + r64 * dlse.row, mask=r < L, other=0.0).to(tl.float32)
    # What is not finite in the gradients of a row that sees nothing must not meet its weights of 0.
    total = tl.where(row_value(lse, b, h, begin_q, r, L, 0.0) == -float("inf"), 0.0, total)
    base = b.to(tl.int64) * delta.batch + h.to(tl.int64) * delta.head + begin_q
    tl.store(delta.p + base + r, total, mask=r < L)


@triton.jit
def denominator(lse, b, h, begin, r, L, mods):
    """lse in the units of scores; +inf, which makes every weight 0, for empty rows and rows past the end."""
    x = row_value(lse, b, h, begin, r, L, float("inf"))
    return tl.where(x == -float("inf"), float("inf"), in_units(x, mods))


@triton.jit
def grad_scores(
    x, dw, lse, delta, b, h, i, j, column, first, d, inside, see, scale, mods,
    N: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """x = q k^T and dw = g v^T -> w, ds, d cap / dx. column: the queries as [M, 1], whichever way the tile lies."""
    x, cap_slope = score(x, b, h, i, j, d, inside, scale, mods)
    p = weights_again(x, lse, mods)
    if see is not None:
        p = tl.where(see, p, 0.0)
    w = p
    if mods.seed is not None:
        keep = kept(b, h, column, first, mods, N, TRANSPOSED)
        w = drop(p, keep, mods)
        dw = drop(dw, keep, mods)
    ds = p * (dw - delta)
    if see is not None:
        ds = tl.where(see, ds, 0.0)  # a hidden key may be NaN
        if mods.softcap is not None:
            cap_slope = tl.where(see, cap_slope, 0.0)
    return w, ds, cap_slope


@triton.jit
def keys_block(
    dk, dv, kk, vv, q, do, lse, delta, base_q, base_do, b, h, begin_q, j, first_key, L, S, d, lo, hi, scale, mods,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The queries lo..hi of one head for a block of keys. Tiles lie transposed: keys down, queries across.

    Where there is a window every tile is held against it: a loop of its own for tiles that are seen wholly took more
    registers than there are. Rows past the end weigh nothing (`denominator`), keys past the end are not stored.
    """
    MASKED: tl.constexpr = mods.left is not None or mods.right is not None or mods.mask is not None
    for first in tl.range(lo, hi, BLOCK_M):
        r = first + tl.arange(0, BLOCK_M)
        r64 = r.to(tl.int64)
        i = r[None, :]
        inside = (i < L) & (j < S)
        qq = rows(q.p + base_q, r64 * q.row, r < L, D, BLOCK_D)
        x = tl.dot(kk, tl.trans(qq), input_precision=PRECISION)
        gg = rows(do.p + base_do, r64 * do.row, r < L, DV, BLOCK_DV)
        dw = tl.dot(vv, tl.trans(gg), input_precision=PRECISION)
        see = None
        if MASKED:
            see = shown(b, h, i, j, d, inside, mods)
        logsum = denominator(lse, b, h, begin_q, r, L, mods)[None, :]
        back = row_value(delta, b, h, begin_q, r, L, 0.0)[None, :]
        w, ds, cap_slope = grad_scores(
            x, dw, logsum, back, b, h, i, j, r[:, None], first_key, d, inside, see, scale, mods, BLOCK_N, True
        )
        dv = tl.dot(w.to(gg.dtype), gg, dv, input_precision=PRECISION)
        dk = tl.dot((ds * cap_slope).to(qq.dtype), qq, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def keys_kernel(
    q, k, v, do, dk, dv, lse, delta, mods, packed, sizes, scale,
    BOTTOM_RIGHT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys, over all queries of all heads that read it."""
    L, S, Hq, G = sizes
    blocks = tl.cdiv(S, BLOCK_N)
    Hkv = Hq // G
    at = tl.program_id(0)
    h_kv = at // blocks % Hkv
    b = at // blocks // Hkv
    begin_q, begin_k, L, S = sequence(b, L, S, packed)
    first = at % blocks * BLOCK_N
    if first < S:
        d = 0
        if BOTTOM_RIGHT:
            d = S - L
        r = first + tl.arange(0, BLOCK_N)
        r64 = r.to(tl.int64)
        j = r[:, None]
        base_k = b.to(tl.int64) * k.batch + h_kv.to(tl.int64) * k.head + begin_k * k.row
        base_v = b.to(tl.int64) * v.batch + h_kv.to(tl.int64) * v.head + begin_k * v.row
        kk = rows(k.p + base_k, r64 * k.row, r < S, D, BLOCK_D)
        vv = rows(v.p + base_v, r64 * v.row, r < S, DV, BLOCK_DV)
        dkk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dvv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
        lo, hi = query_range(first, tl.minimum(first + BLOCK_N, S) - 1, L, d, mods, BLOCK_M)
        for g in range(0, G):
            h = h_kv * G + g
            base_q = b.to(tl.int64) * q.batch + h.to(tl.int64) * q.head + begin_q * q.row
            base_do = b.to(tl.int64) * do.batch + h.to(tl.int64) * do.head + begin_q * do.row
            dkk, dvv = keys_block(
                dkk, dvv, kk, vv, q, do, lse, delta, base_q, base_do, b, h, begin_q, j, first, L, S, d, lo, hi,
                scale, mods, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
        base_dk = b.to(tl.int64) * dk.batch + h_kv.to(tl.int64) * dk.head + begin_k * dk.row
        base_dv = b.to(tl.int64) * dv.batch + h_kv.to(tl.int64) * dv.head + begin_k * dv.row
        store_rows(dk.p + base_dk, r64 * dk.row, r < S, dkk * scale, D, BLOCK_D)
        store_rows(dv.p + base_dv, r64 * dv.row, r < S, dvv, DV, BLOCK_DV)


@triton.jit
def queries_block(
    dq, dslope, qq, gg, logsum, back, k, v, base_k, base_v, b, h, i, first, last, L, S, d, lo, hi, dbias, scale, mods,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, EDGE: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """The keys lo..hi for a block of queries: dq, and each row's part of the slope's gradient. GUARD as in `attend`."""
    MASKED: tl.constexpr = EDGE or mods.mask is not None
    for begin in tl.range(lo, hi, BLOCK_N):
        r = begin + tl.arange(0, BLOCK_N)
        r64 = r.to(tl.int64)
        j = r[None, :]
        inside = i < L
        ok = None
        see = None
        if EDGE:
            inside = inside & (j < S)
            ok = reached(r, first, last, S, d, mods)
        if MASKED:
            see = shown(b, h, i, j, d, inside, mods)
            if GUARD:
                ok = tl.max(see.to(tl.int32), 0) > 0
        kk = rows(k.p + base_k, r64 * k.row, ok, D, BLOCK_D)
        x = tl.dot(qq, tl.trans(kk), input_precision=PRECISION)
        vv = rows(v.p + base_v, r64 * v.row, ok, DV, BLOCK_DV)
        dw = tl.dot(gg, tl.trans(vv), input_precision=PRECISION)
        _, ds, cap_slope = grad_scores(
            x, dw, logsum, back, b, h, i, j, i, begin, d, inside, see, scale, mods, BLOCK_N, False
        )
        if dbias is not None:
            p_dbias = dbias.p + plane_offsets(dbias, b, h, i, j)
            tl.store(p_dbias, ds.to(dbias.p.dtype.element_ty), mask=inside)
        if mods.slopes is not None:
            dslope -= tl.sum(ds * tl.abs(j - i - d).to(tl.float32), 1)
        dq = tl.dot((ds * cap_slope).to(kk.dtype), kk, dq, input_precision=PRECISION)
    return dq, dslope


@triton.jit
def queries_ranges(
    qq, gg, logsum, back, k, v, base_k, base_v, b, h, i, first, last, L, S, d, dbias, scale, mods,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """All keys that queries first..last see: dq, and each row's part of the slope's gradient."""
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dslope = tl.zeros((BLOCK_M,), tl.float32)
    lo, full_lo, full_hi, hi = key_range(first, last, S, d, mods, BLOCK_N)
    if mods.left is not None:
        dq, dslope = queries_block(
            dq, dslope, qq, gg, logsum, back, k, v, base_k, base_v, b, h, i, first, last, L, S, d, lo,
            tl.minimum(full_lo, hi), dbias, scale, mods, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION, True, GUARD,
        )  # fmt: skip
    dq, dslope = queries_block(
        dq, dslope, qq, gg, logsum, back, k, v, base_k, base_v, b, h, i, first, last, L, S, d, full_lo, full_hi,
        dbias, scale, mods, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION, False, GUARD,
    )  # fmt: skip
    return queries_block(
        dq, dslope, qq, gg, logsum, back, k, v, base_k, base_v, b, h, i, first, last, L, S, d, full_hi, hi,
        dbias, scale, mods, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION, True, GUARD,
    )  # fmt: skip


@triton.jit
def queries_kernel(
    q, k, v, do, dq, lse, delta, dslopes, dbias, mods, packed, sizes, scale,
    BOTTOM_RIGHT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr, RETRIES: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries of one head; also ds where the bias has a value for each score."""
    GUARD: tl.constexpr = mods.mask is not None and not RETRIES
    L, S, Hq, G = sizes
    longest = L
    blocks = tl.cdiv(L, BLOCK_M)
    at = tl.program_id(0)
    block = blocks - 1 - at % blocks
    h = at // blocks % Hq
    b = at // blocks // Hq
    begin_q, begin_k, L, S = sequence(b, L, S, packed)
    first = block * BLOCK_M
    if first < L:
        d = 0
        if BOTTOM_RIGHT:
            d = S - L
        r = first + tl.arange(0, BLOCK_M)
        r64 = r.to(tl.int64)
        i = r[:, None]
        base_q = b.to(tl.int64) * q.batch + h.to(tl.int64) * q.head + begin_q * q.row
        base_do = b.to(tl.int64) * do.batch + h.to(tl.int64) * do.head + begin_q * do.row
        base_k = b.to(tl.int64) * k.batch + (h // G).to(tl.int64) * k.head + begin_k * k.row
        base_v = b.to(tl.int64) * v.batch + (h // G).to(tl.int64) * v.head + begin_k * v.row
        qq = rows(q.p + base_q, r64 * q.row, r < L, D, BLOCK_D)
        gg = rows(do.p + base_do, r64 * do.row, r < L, DV, BLOCK_DV)
        logsum = denominator(lse, b, h, begin_q, r, L, mods)[:, None]
        back = row_value(delta, b, h, begin_q, r, L, 0.0)[:, None]
        last = tl.minimum(first + BLOCK_M, L) - 1
        acc, dslope = queries_ranges(
            qq, gg, logsum, back, k, v, base_k, base_v, b, h, i, first, last, L, S, d, dbias, scale, mods,
            D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION, GUARD,
        )  # fmt: skip
        if mods.mask is not None and RETRIES:  # noqa: SIM102  # the outer one is decided when the kernel is compiled
            if tl.max(tl.max((acc != acc).to(tl.int32), 1), 0) > 0:  # as in `attend_all`
                acc, dslope = queries_ranges(
                    qq, gg, logsum, back, k, v, base_k, base_v, b, h, i, first, last, L, S, d, dbias, scale, mods,
                    D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION, True,
                )  # fmt: skip
        base_dq = b.to(tl.int64) * dq.batch + h.to(tl.int64) * dq.head + begin_q * dq.row
        store_rows(dq.p + base_dq, r64 * dq.row, r < L, acc * scale, D, BLOCK_D)
        if dslopes is not None:
            tl.store(dslopes + (b.to(tl.int64) * Hq + h) * longest + r, dslope, mask=r < L)


@triton.jit
def bias_kernel(
    q, k, v, do, dbias, shared, lse, delta, mods, packed, sizes, scale,
    BOTTOM_RIGHT: tl.constexpr, OVER_L: tl.constexpr, OVER_S: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of a bias gradient, summed over what the bias is shared by.

    shared = (B, H) says over how many batches and heads a program sums; OVER_L and OVER_S: over all queries, all keys.
    """
    L, S, Hq, G = sizes
    over_b, over_h = shared
    rows_of = 1 if OVER_L else tl.cdiv(L, BLOCK_M)
    columns_of = 1 if OVER_S else tl.cdiv(S, BLOCK_N)
    at = tl.program_id(0)
    column = at % columns_of
    row = at // columns_of % rows_of
    h_out = at // columns_of // rows_of % (Hq // over_h)
    b_out = at // columns_of // rows_of // (Hq // over_h)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for each in range(0, over_b * over_h):
        b = b_out * over_b + each // over_h
        h = h_out * over_h + each % over_h
        begin_q, begin_k, length, keys = sequence(b, L, S, packed)
        d = 0
        if BOTTOM_RIGHT:
            d = keys - length
        base_q = b.to(tl.int64) * q.batch + h.to(tl.int64) * q.head + begin_q * q.row
        base_do = b.to(tl.int64) * do.batch + h.to(tl.int64) * do.head + begin_q * do.row
        base_k = b.to(tl.int64) * k.batch + (h // G).to(tl.int64) * k.head + begin_k * k.row
        base_v = b.to(tl.int64) * v.batch + (h // G).to(tl.int64) * v.head + begin_k * v.row
        first_row = row * BLOCK_M
        last_row = tl.minimum(length, first_row + BLOCK_M)
        if OVER_L:
            last_row = length
        for first in range(first_row, last_row, BLOCK_M):
            r = first + tl.arange(0, BLOCK_M)
            r64 = r.to(tl.int64)
            i = r[:, None]
            qq = rows(q.p + base_q, r64 * q.row, r < length, D, BLOCK_D)
            gg = rows(do.p + base_do, r64 * do.row, r < length, DV, BLOCK_DV)
            logsum = denominator(lse, b, h, begin_q, r, length, mods)[:, None]
            back = row_value(delta, b, h, begin_q, r, length, 0.0)[:, None]
            lo, _lo, _hi, hi = key_range(
                first, tl.minimum(first + BLOCK_M, length) - 1, keys, d, mods, BLOCK_N
            )
            if not OVER_S:
                lo = tl.maximum(lo, column * BLOCK_N)
                hi = tl.minimum(hi, column * BLOCK_N + BLOCK_N)
            for first_key in range(lo, hi, BLOCK_N):
                c = first_key + tl.arange(0, BLOCK_N)
                c64 = c.to(tl.int64)
                j = c[None, :]
                inside = (i < length) & (j < keys)
                see = shown(b, h, i, j, d, inside, mods)
                ok = c < keys
                kk = rows(k.p + base_k, c64 * k.row, ok, D, BLOCK_D)
                vv = rows(v.p + base_v, c64 * v.row, ok, DV, BLOCK_DV)
                x = tl.dot(qq, tl.trans(kk), input_precision=PRECISION)
                dw = tl.dot(gg, tl.trans(vv), input_precision=PRECISION)
                _w, ds, _slope = grad_scores(
                    x, dw, logsum, back, b, h, i, j, i, first_key, d, inside, see, scale, mods, BLOCK_N, False
                )
                total += ds
    i = row * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    j = column * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    if OVER_L:
        total = tl.sum(total, 0, keep_dims=True)
        i = row + tl.arange(0, 1)[:, None]
        L = 1
    if OVER_S:
        total = tl.sum(total, 1, keep_dims=True)
        j = column + tl.arange(0, 1)[None, :]
        S = 1
    p_dbias = dbias.p + plane_offsets(dbias, b_out, h_out, i, j)
    tl.store(p_dbias, total.to(dbias.p.dtype.element_ty), mask=(i < L) & (j < S))


def gradient_of_rows(x: torch.Tensor | None) -> RowValues | None:
    """The gradient of lse with whatever strides it comes: an expanded one has none at all."""
    if x is None:
        return None
    return RowValues(x, 0 if x.dim() == 2 else x.stride(0), x.stride(-2), x.stride(-1))


def backward_launches(
    t, o, grad_output, grad_lse, output, lse, gradients, needs
) -> tuple[list[Launch], dict]:
    """What `backward` launches in turn, and the buffers that it sums afterwards."""
    call = prepare(t, o)
    dq, dk, dv, *others = gradients
    dbias = others[0] if others else None
    need_query, need_key_value, need_bias, need_slopes, _ = needs
    g = torch.zeros_like(output) if grad_output is None else unit_last(grad_output)
    delta = torch.empty_like(lse)
    sizes = (call.L, call.S, call.Hq, call.G)
    widths = {"DV": call.constants["DV"], "BLOCK_DV": call.constants["BLOCK_DV"]}
    launches = [
        Launch(
            delta_kernel,
            triton.cdiv(call.L, DELTA_ROWS) * call.Hq * call.B,
            dict(
                o=operand(output),
                do=operand(g),
                lse=call.row_values(lse),
                dlse=gradient_of_rows(grad_lse),
                delta=call.row_values(delta),
                packed=call.packed,
                sizes=sizes,
                **widths,
                BLOCK_M=DELTA_ROWS,
            ),
            4,
            1,
        )
    ]
    common = dict(
        q=operand(call.q),
        k=operand(call.k),
        v=operand(call.v),
        do=operand(g),
        lse=call.row_values(lse),
        delta=call.row_values(delta),
        mods=call.mods,
        packed=call.packed,
        sizes=sizes,
        scale=o.scale,
        BOTTOM_RIGHT=o.bottom_right,
        **call.constants,
    )
    buffers: dict = {"delta": delta}
    if need_key_value:
        config = choose("keys", call.shape)
        programs = triton.cdiv(call.S, config.block_n) * (call.Hq // call.G) * call.B
        own = {"dk": operand(dk), "dv": operand(dv), "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        launches.append(Launch(keys_kernel, programs, common | own, config.num_warps, config.num_stages))
    full = tuple(t.bias.shape) == (call.B, call.Hq, call.L, call.S) if need_bias else False
    if need_query or need_slopes or full:
        config = choose("queries", call.shape)
        programs = triton.cdiv(call.L, config.block_m) * call.Hq * call.B
        if need_slopes:
            buffers["slopes"] = torch.zeros((call.B, call.Hq, call.L), device=lse.device)
        own = {
            "dq": operand(dq if need_query else torch.empty_like(call.q)),
            "dslopes": buffers.get("slopes"),
            "dbias": plane(dbias.zero_()) if full else None,  # blocks that nobody sees are not visited
            "RETRIES": call.retries,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        }
        launches.append(Launch(queries_kernel, programs, common | own, config.num_warps, config.num_stages))
    if need_bias and not full:
        config = choose("bias", call.shape)
        over_l, over_s = (t.bias.shape[n] == 1 for n in (2, 3))
        # A gradient of few values is first summed by every head for itself, or few programs would do it all.
        joint = not (over_l or over_s)
        over = tuple(n if joint and size == 1 else 1 for n, size in zip((call.B, call.Hq), t.bias.shape))
        lead = [n // m for n, m in zip((call.B, call.Hq), over)]
        shape = [*lead, 1 if over_l else call.L, 1 if over_s else call.S]
        part = dbias if joint else torch.empty(shape, device=lse.device, dtype=torch.float32)
        buffers |= {} if joint else {"bias": part}
        own = {
            "dbias": plane(part),
            "shared": over,
            "OVER_L": over_l,
            "OVER_S": over_s,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        }
        tiles = (1 if over_l else triton.cdiv(call.L, config.block_m)) * (
            1 if over_s else triton.cdiv(call.S, config.block_n)
        )
        programs = tiles * lead[0] * lead[1]
        launches.append(Launch(bias_kernel, programs, common | own, config.num_warps, config.num_stages))
    return launches, buffers


def backward(t, o, grad_output, grad_lse, output, lse, gradients, needs) -> None:
    """Writes the gradients of the op `seqkern::attention_backward` that ``needs`` names."""
    launches, buffers = backward_launches(t, o, grad_output, grad_lse, output, lse, gradients, needs)
    for launch in launches:
        run(launch)
    dbias, dslopes, dsinks = gradients[3:] or (None, None, None)
    if "bias" in buffers:
        dbias.copy_(buffers["bias"].sum_to_size(dbias.shape))
    # One number from all rows of a head, which largely cancel: such sums are taken in float64.
    if "slopes" in buffers:
        dslopes.copy_(buffers["slopes"].sum(-1, dtype=torch.float64).sum_to_size(dslopes.shape))
    if needs[4]:
        share = torch.exp(t.sinks.double()[:, None] - lse) * buffers["delta"]  # [B, Hq, L] or [Hq, total]
        share = share.where(lse != -torch.inf, 0)  # no key, and no sink for this head
        dsinks.copy_(-share.sum(-1).sum_to_size(dsinks.shape))
