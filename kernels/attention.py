"""Attention forward: one program for a block of queries of one head, keys in blocks, softmax on the way.

Online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867; blocks and recomputation: Dao 2023, arXiv:2307.08691.
"""

import triton
import triton.language as tl

from seqkern.kernels.launch import Launch, operand, prepare, run
from seqkern.kernels.mods import (
    drop,
    exponential,
    in_units,
    kept,
    key_range,
    logarithm,
    reached,
    rows,
    score,
    sequence,
    shown,
    store_rows,
)
from seqkern.kernels.tuning_attention import choose


@triton.jit
def softmax_block(acc, m, l, x, keep, mods):
    """A block of scores [M, N] (-inf where hidden) joins the running softmax; p weighs its values."""
    top = tl.maximum(m, tl.max(x, 1))
    shift = tl.where(top == -float("inf"), 0.0, top)
    p = exponential(x - shift[:, None], mods)
    fade = exponential(m - shift, mods)
    l = l * fade + tl.sum(p, 1)
    if mods.seed is not None:
        p = drop(p, keep, mods)
    acc = acc * fade[:, None]
    return acc, top, l, p


@triton.jit
def attend(
    acc, m, l, q, k, v, base_k, base_v, b, h, i, first, last, L, S, d, lo, hi, scale, mods,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, EDGE: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """The keys lo..hi for queries q [M, BLOCK_D]; i and h are columns [M, 1]. EDGE: some are hidden by their place.

    Keys that no query sees by their place are not read, nor, with GUARD, those that the mask hides from all of them.
    """
    MASKED: tl.constexpr = EDGE or mods.mask is not None
    for begin in tl.range(lo, hi, BLOCK_N):
        r = begin + tl.arange(0, BLOCK_N)
        j = r[None, :]
        inside = i < L
        ok = None
        if EDGE:
            inside = inside & (j < S)
            ok = reached(r, first, last, S, d, mods)
        kk = rows(k.p + base_k, r.to(tl.int64) * k.row, ok, D, BLOCK_D)
        x = tl.dot(q, tl.trans(kk), input_precision=PRECISION)
        x, _ = score(x, b, h, i, j, d, inside, scale, mods)
        if MASKED:
            see = shown(b, h, i, j, d, inside, mods)
            x = tl.where(see, x, -float("inf"))
            if GUARD:
                ok = tl.max(see.to(tl.int32), 0) > 0
        vv = rows(v.p + base_v, r.to(tl.int64) * v.row, ok, DV, BLOCK_DV)
        keep = None
        if mods.seed is not None:
            keep = kept(b, h, i, begin, mods, BLOCK_N, False)
        acc, m, l, p = softmax_block(acc, m, l, x, keep, mods)
        acc = tl.dot(p.to(vv.dtype), vv, acc, input_precision=PRECISION)
    return acc, m, l


@triton.jit
def attend_all(
    q, k, v, base_k, base_v, b, h, i, first, last, L, S, d, begin, end, scale, mods,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr, RETRIES: tl.constexpr,
):  # fmt: skip
    """The keys begin..end (multiples of BLOCK_N, or S) for queries first..last -> acc, running maximum and sum.

    0 times what a mask hides is NaN where that is NaN or infinite. Not to read what is hidden from all makes every
    block wait for its mask: RETRIES does so only where a NaN came out.
    """
    GUARD: tl.constexpr = mods.mask is not None and not RETRIES
    lo, full_lo, full_hi, hi = key_range(first, last, S, d, mods, BLOCK_N)
    lo, hi = tl.maximum(lo, begin), tl.minimum(hi, end)
    full_lo = tl.maximum(full_lo, lo)
    full_hi = tl.maximum(tl.minimum(full_hi, end), full_lo)
    acc, m, l = attend_ranges(
        q, k, v, base_k, base_v, b, h, i, first, last, L, S, d, lo, full_lo, full_hi, hi, scale, mods,
        D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION, GUARD,
    )  # fmt: skip
    if mods.mask is not None and RETRIES:  # noqa: SIM102  # the outer one is decided when the kernel is compiled
        if tl.max(tl.max((acc != acc).to(tl.int32), 1), 0) > 0:
            acc, m, l = attend_ranges(
                q, k, v, base_k, base_v, b, h, i, first, last, L, S, d, lo, full_lo, full_hi, hi, scale, mods,
                D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION, True,
            )  # fmt: skip
    return acc, m, l


@triton.jit
def attend_ranges(
    q, k, v, base_k, base_v, b, h, i, first, last, L, S, d, lo, full_lo, full_hi, hi, scale, mods,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """The keys lo..hi, of which full_lo..full_hi are hidden from no query by their place."""
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    if mods.left is not None:
        acc, m, l = attend(
            acc, m, l, q, k, v, base_k, base_v, b, h, i, first, last, L, S, d, lo, tl.minimum(full_lo, hi), scale,
            mods, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION, True, GUARD,
        )  # fmt: skip
    acc, m, l = attend(
        acc, m, l, q, k, v, base_k, base_v, b, h, i, first, last, L, S, d, full_lo, full_hi, scale, mods,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION, False, GUARD,
    )  # fmt: skip
    return attend(
        acc, m, l, q, k, v, base_k, base_v, b, h, i, first, last, L, S, d, full_hi, hi, scale, mods,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION, True, GUARD,
    )  # fmt: skip


@triton.jit
def finish(acc, m, l, sink, mods):
    """Running maximum and sum -> output and natural log-sum-exp; the sink (a logit, or None) joins the denominator."""
    if sink is not None:
        sink = in_units(sink.to(tl.float32), mods)
        top = tl.maximum(m, sink)
        shift = tl.where(top == -float("inf"), 0.0, top)  # no key, and no sink for this head
        fade = exponential(m - shift, mods)
        l = l * fade + exponential(sink - shift, mods)
        acc = acc * fade[:, None]
        m = top
    empty = l == 0.0
    acc = acc / tl.where(empty, 1.0, l)[:, None]
    lse = tl.where(empty, -float("inf"), logarithm(m, tl.where(empty, 1.0, l), mods))
    return acc, lse


@triton.jit
def forward_kernel(
    q, k, v, o, lse, sinks, mods, packed, sizes, scale,
    BOTTOM_RIGHT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr, RETRIES: tl.constexpr,
):  # fmt: skip
    L, S, Hq, G = sizes
    blocks = tl.cdiv(L, BLOCK_M)
    at = tl.program_id(0)
    # The last queries of a causal call see most keys: their programs begin first.
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
        base_q = b.to(tl.int64) * q.batch + h.to(tl.int64) * q.head + begin_q * q.row
        qq = rows(q.p + base_q, r.to(tl.int64) * q.row, r < L, D, BLOCK_D)
        base_k = b.to(tl.int64) * k.batch + (h // G).to(tl.int64) * k.head + begin_k * k.row
        base_v = b.to(tl.int64) * v.batch + (h // G).to(tl.int64) * v.head + begin_k * v.row
        acc, m, l = attend_all(
            qq, k, v, base_k, base_v, b, h, r[:, None], first, tl.minimum(first + BLOCK_M, L) - 1, L, S, d, 0, S,
            scale, mods, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION, RETRIES,
        )  # fmt: skip
        sink = None
        if sinks is not None:
            sink = tl.load(sinks + h)
        acc, total = finish(acc, m, l, sink, mods)
        base_o = b.to(tl.int64) * o.batch + h.to(tl.int64) * o.head + begin_q * o.row
        store_rows(o.p + base_o, r.to(tl.int64) * o.row, r < L, acc, DV, BLOCK_DV)
        base_lse = b.to(tl.int64) * lse.batch + h.to(tl.int64) * lse.head + begin_q
        tl.store(lse.p + base_lse + r, total, mask=r < L)


def forward_launch(t, o, output, lse) -> Launch:
    """What `forward` launches: t and o are the op's arguments, output and lse the memory for its results."""
    call = prepare(t, o)
    config = choose("forward", call.shape)
    arguments = dict(
        q=operand(call.q),
        k=operand(call.k),
        v=operand(call.v),
        o=operand(output),
        lse=call.row_values(lse),
        sinks=call.sinks,
        mods=call.mods,
        packed=call.packed,
        sizes=(call.L, call.S, call.Hq, call.G),
        scale=o.scale,
        BOTTOM_RIGHT=o.bottom_right,
        **call.constants,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        RETRIES=call.retries,
    )
    programs = triton.cdiv(call.L, config.block_m) * call.Hq * call.B
    return Launch(forward_kernel, programs, arguments, config.num_warps, config.num_stages)


def forward(t, o, output, lse) -> None:
    """Writes output and lse of the op `seqkern::attention` called with tensors t and options o."""
    run(forward_launch(t, o, output, lse))
