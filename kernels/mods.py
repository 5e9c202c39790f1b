"""What may stand between q k^T and the weights: small functions of one tile, absent ones compiled away.

A tile lies with its queries along either axis: `i` (query), `j` (key) and, where rows belong to several heads, `h` come
as columns and rows of indices that broadcast against each other. `d` is the diagonal: the place of query i is key
i + d. An option that a call does not use is None in `Mods`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from seqkern.kernels.math import tanh

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


class Operand(NamedTuple):
    """A [B, H, rows, size] tensor whose last stride is 1, or a packed [total, H, size] one with batch stride 0."""

    p: Any
    batch: int
    head: int
    row: int


class Plane(NamedTuple):
    """A mask or bias [B, H, L, S]; the stride of a broadcast dimension is 0."""

    p: Any
    batch: int
    head: int
    row: int
    column: int


class Mods(NamedTuple):
    mask: Plane | None
    bias: Plane | None
    slopes: Any  #: (pointer to float32, stride of a batch, stride of a head)
    softcap: float | None
    left: int | None
    right: int | None
    seed: Any  #: pointer to int64
    threshold: int | None  #: of 2^24: the smallest that dropout keeps
    kept_scale: float | None  #: 1 / (1 - p)
    #: Always None. Triton 3.6 types a tuple before the constants in the tuples inside it are known, and again only when
    #: a constant of its own comes after them: without one, a stride of 1 in a plane turned into None.
    end: None = None


class Packed(NamedTuple):
    """Where packed sequences begin; the totals keep a wrong one inside the memory of the tensors."""

    p_q: Any
    p_k: Any
    total_q: int
    total_k: int


@triton.jit
def sequence(b, L, S, packed):
    """Where sequence b begins among the queries and the keys, and its lengths: at most L and S, by which the memory
    that kernels share is sized and which a caller may have told too small."""
    begin_q, begin_k = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    if packed is not None:
        begin_q = tl.load(packed.p_q + b).to(tl.int64)
        begin_k = tl.load(packed.p_k + b).to(tl.int64)
        end_q = tl.minimum(tl.load(packed.p_q + b + 1).to(tl.int64), packed.total_q)
        end_k = tl.minimum(tl.load(packed.p_k + b + 1).to(tl.int64), packed.total_k)
        L = tl.minimum((end_q - begin_q).to(tl.int32), L)
        S = tl.minimum((end_k - begin_k).to(tl.int32), S)
    return begin_q, begin_k, L, S


@triton.jit
def rows(p, offsets, ok, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows that begin at int64 offsets [R] -> [R, BLOCK], 0 past SIZE and where not ok; ok None reads all."""
    c = tl.arange(0, BLOCK)
    pointers = p + offsets[:, None] + c[None, :]
    if SIZE == BLOCK:
        if ok is None:
            x = tl.load(pointers)
        else:
            x = tl.load(pointers, mask=ok[:, None], other=0.0)
    elif ok is None:
        x = tl.load(pointers, mask=c[None, :] < SIZE, other=0.0)
    else:
        x = tl.load(pointers, mask=ok[:, None] & (c[None, :] < SIZE), other=0.0)
    return x


@triton.jit
def store_rows(p, offsets, ok, x, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    tl.store(
        p + offsets[:, None] + c[None, :], x.to(p.dtype.element_ty), mask=ok[:, None] & (c[None, :] < SIZE)
    )


@triton.jit
def plane_offsets(plane, b, h, i, j):
    at = b.to(tl.int64) * plane.batch + tl.cast(h, tl.int64) * plane.head
    return at + i.to(tl.int64) * plane.row + j.to(tl.int64) * plane.column


@triton.jit
def slopes(b, h, mods):
    p_slopes, stride_b, stride_h = mods.slopes
    return tl.load(p_slopes + b * stride_b + h * stride_h)


@triton.jit
def in_units(x, mods):
    """A natural logarithm in the units of a call's scores: those of log 2, so that a weight is a mere exp2. With a bias
    natural ones: in those of log 2 the lowest float, with which many a bias hides keys, is -inf.
    """
    if mods.bias is None:
        x = x * LOG2E
    return x


@triton.jit
def exponential(x, mods):
    """e to the power of a score's distance from another."""
    if mods.bias is not None:
        x = x * LOG2E
    return tl.exp2(x)


@triton.jit
def logarithm(m, l, mods):
    """The natural logarithm of the sum l of exponentials that are relative to the score m."""
    if mods.bias is None:
        found = (m + tl.log2(l)) * LN2
    else:
        found = m + tl.log2(l) * LN2
    return found


@triton.jit
def weights_again(x, lse, mods):
    """The weights of scores, by the log-sum-exp in their units. With a bias at most 1: where that is around 1e9, one
    place of it is 64, and e^64 times a gradient is soon no number.
    """
    away = x - lse
    if mods.bias is not None:
        away = tl.minimum(away, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return exponential(away, mods)


@triton.jit
def score(x, b, h, i, j, d, inside, scale, mods):
    """q k^T -> scores (`in_units`), and d cap(x) / dx. inside: where bias may be read, None for everywhere."""
    cap_slope = 1.0
    if mods.softcap is not None:
        t = tanh(x * (scale / mods.softcap))
        cap_slope = 1.0 - t * t
        x = t * in_units(mods.softcap, mods)
    else:
        x = x * in_units(scale, mods)
    if mods.bias is not None:
        p_bias = mods.bias.p + plane_offsets(mods.bias, b, h, i, j)
        if inside is None:
            x += tl.load(p_bias).to(tl.float32)
        else:
            x += tl.load(p_bias, mask=inside, other=0.0).to(tl.float32)
    if mods.slopes is not None:
        x -= in_units(slopes(b, h, mods), mods) * tl.abs(j - i - d).to(tl.float32)
    return x, cap_slope


@triton.jit
def reached(j, first, last, S, d, mods):
    """Which keys [N] some of the queries first..last see, as far as sizes and window tell."""
    ok = j < S
    if mods.left is not None:
        ok = ok & (j >= first + d - mods.left)
    if mods.right is not None:
        ok = ok & (j <= last + d + mods.right)
    return ok


@triton.jit
def shown(b, h, i, j, d, inside, mods):
    """Which weights there are: inside the sizes, the window and the mask."""
    see = inside
    if mods.left is not None:
        see = see & (j - i - d >= -mods.left)
    if mods.right is not None:
        see = see & (j - i - d <= mods.right)
    if mods.mask is not None:
        see = see & (tl.load(mods.mask.p + plane_offsets(mods.mask, b, h, i, j), mask=see, other=0) != 0)
    return see


@triton.jit
def kept(b, h, i, j_first, mods, N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Which weights dropout keeps: i (and h) as columns [M, 1] -> [M, N], or [N, M]. j_first is a multiple of 4.

    The words of a block of four keys are drawn at once: see seqkern.spec.dropout, whose twin this is.
    """
    quarter = j_first // 4 + tl.arange(0, N // 4)[None, :]
    seed = tl.load(mods.seed)
    w0, w1, w2, w3 = tl.philox(
        seed, i * 0 + quarter * 0 + b, i * 0 + quarter * 0 + h, i + quarter * 0, i * 0 + quarter
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [M, N / 4, j // 2 % 2, j % 2] in the order of j
    keep = (tl.reshape(words, (i.shape[0], N)) >> 8).to(tl.int32) >= mods.threshold
    if TRANSPOSED:
        keep = tl.trans(keep)
    return keep


@triton.jit
def drop(x, keep, mods):
    return tl.where(keep, x * mods.kept_scale, 0.0)


@triton.jit
def key_range(first, last, S, d, mods, BLOCK: tl.constexpr):
    """Blocks of keys that queries first..last see: [lo, full_lo) and [full_hi, hi) in part, [full_lo, full_hi) wholly.

    Multiples of BLOCK, but for hi. What a mask hides is not known here.
    """
    lo = 0
    hi = S
    if mods.left is not None:
        lo = tl.maximum(first + d - mods.left, 0) // BLOCK * BLOCK
    if mods.right is not None:
        hi = tl.minimum(hi, tl.maximum(last + d + mods.right + 1, 0))
    end = tl.cdiv(tl.maximum(hi, lo), BLOCK) * BLOCK
    full_lo = lo
    full_hi = hi // BLOCK * BLOCK
    if mods.left is not None:
        full_lo = tl.minimum(tl.cdiv(tl.maximum(last + d - mods.left, 0), BLOCK) * BLOCK, end)
    if mods.right is not None:
        full_hi = tl.minimum(full_hi, tl.maximum(first + d + mods.right + 1, 0) // BLOCK * BLOCK)
    return lo, full_lo, tl.maximum(full_hi, full_lo), hi


@triton.jit
def query_range(first, last, L, d, mods, BLOCK: tl.constexpr):
    """Blocks of queries that see some of the keys first..last: key j is seen by j - d - right .. j - d + left."""
    lo = 0
    hi = L
    if mods.right is not None:
        lo = tl.maximum(first - d - mods.right, 0) // BLOCK * BLOCK
    if mods.left is not None:
        hi = tl.minimum(hi, tl.maximum(last - d + mods.left + 1, 0))
    return lo, hi
