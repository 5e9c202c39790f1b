"""Attention backward on Hopper: 16-bit, heads of 64 or 128, no option but causal; tiles come through TMA.

The equations are those of `attention_backward`. Operands come by descriptors, which need no address registers and fill
with zeros past the end, so the blocks are larger; the scale is folded into the exponent and into the last product.

Either two kernels (seven products: scores and their gradients are computed twice), or one (five), in which the programs
of a head add to the gradient of a block of queries in turn: float32 sums in a fixed order, the same in every run.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from seqkern.kernels.attention_backward import gradient_of_rows
from seqkern.kernels.launch import Launch, RowValues, operand, unit_last
from seqkern.kernels.mods import LOG2E, rows, store_rows

PAD = 128  # rows of a head in the buffers are a multiple of every block of queries
ROWS = 64  # that a program of the small kernels reads
SLACK = 2  # blocks by which a program of the fused kernel stays behind the one before, so that it seldom has to ask
# $0: a counter, read from $1 until it is at least $4, unless $2, what it was before, is at least $3.
AWAIT = tl.constexpr("""
{
.reg .pred %ready;
mov.b32 $0, $2;
setp.ge.s32 %ready, $0, $3;
@%ready bra over;
again:
ld.acquire.gpu.global.b32 $0, [$1];
setp.ge.s32 %ready, $0, $4;
@!%ready bra again;
over:
}
""")
# Writes $2 to $1 for who reads it with `AWAIT`, after what all threads wrote before.
TELL = tl.constexpr("""
{
.reg .pred %first;
.reg .b32 %thread;
bar.sync 0;
mov.u32 %thread, %tid.x;
setp.eq.u32 %first, %thread, 0;
@%first st.release.gpu.global.b32 [$1], $2;
mov.b32 $0, 0;
}
""")
INTERPRETED = triton.knobs.runtime.interpret


class Config(NamedTuple):
    block_m: int  #: queries of a block
    block_n: int  #: keys of a block
    num_warps: int
    num_stages: int
    gluon: bool = False  #: whether the kernel is that of `hopper_fused`
    ahead: bool = False  #: in Gluon: whether the next scores are begun before this block is done
    heads: int = 8  #: fused: heads whose programs take turns, so that few programs of one head run at once


class Configs(NamedTuple):
    """Of one call: either the first two, or the fused kernel alone, where all three gradients are needed."""

    keys: Config | None
    queries: Config | None
    fused: Config | None = None


# Candidates, kernel -> head size -> configurations. All compile for sm_90 without spills, but for those of heads of 128
# that begin ahead in the fused kernel: 16 to 24 bytes.
CONFIGS: dict[str, dict[int, tuple[Config, ...]]] = {
    "keys": {
        64: (
            Config(64, 128, 8, 2),
            Config(128, 128, 8, 2),
            Config(64, 64, 4, 2),
            Config(64, 128, 8, 2, True),
            Config(64, 128, 8, 2, True, True),
            Config(64, 64, 4, 2, True, True),
        ),
        128: (
            Config(64, 128, 8, 2),
            Config(64, 64, 4, 2),
            Config(64, 128, 8, 2, True),
            Config(64, 128, 8, 2, True, True),
        ),
    },
    "queries": {
        64: (
            Config(128, 64, 8, 2),
            Config(128, 128, 8, 2),
            Config(64, 64, 4, 2),
            Config(128, 64, 8, 4, True),
            Config(64, 64, 4, 4, True),
        ),
        128: (
            Config(128, 64, 8, 2),
            Config(128, 128, 8, 2),
            Config(64, 64, 4, 2),
            Config(128, 64, 8, 4, True),
            Config(128, 64, 8, 3, True),
        ),
    },
    "fused": {
        64: (
            Config(64, 128, 8, 2),
            Config(128, 128, 8, 2),
            Config(64, 128, 8, 2, True),
            Config(64, 128, 8, 2, True, True),
            Config(64, 128, 8, 2, True, True, 32),
            Config(64, 64, 4, 2, True),
            Config(64, 64, 4, 2, True, True),
        ),
        128: (
            Config(64, 128, 8, 2),
            Config(64, 128, 8, 2, True),
            Config(64, 128, 8, 2, True, False, 32),
            Config(64, 128, 8, 2, True, True),
            Config(64, 128, 8, 2, True, True, 32),
        ),
    },
}


@triton.jit
def rows_kernel(o, do, lse, dlse, values, L, padded, heads, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """For each row, padded to `padded` rows a head: [2, ...] numbers, lse in units of log 2 and delta.

    delta is what the softmax takes back: rowsum(o g), less the gradient of lse. lse is +inf, which makes all weights 0,
    for rows that see nothing and past the end.
    """
    blocks = padded // BLOCK_M
    at = tl.program_id(0)
    h = at // blocks % heads
    b = at // blocks // heads
    r = at % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    r64 = r.to(tl.int64)
    ok = r < L
    x = rows(o.p + b.to(tl.int64) * o.batch + h.to(tl.int64) * o.head, r64 * o.row, ok, D, D)
    g = rows(do.p + b.to(tl.int64) * do.batch + h.to(tl.int64) * do.head, r64 * do.row, ok, D, D)
    total = tl.sum(x.to(tl.float32) * g.to(tl.float32), 1)
    if dlse is not None:
        base = dlse.p + b.to(tl.int64) * dlse.batch + h.to(tl.int64) * dlse.head
        total -= tl.load(base + r64 * dlse.row, mask=ok, other=0.0).to(tl.float32)
    base = lse.p + b.to(tl.int64) * lse.batch + h.to(tl.int64) * lse.head
    y = tl.load(base + r64 * lse.row, mask=ok, other=-float("inf"))
    each = tl.num_programs(0).to(tl.int64) * BLOCK_M
    into = values + (b.to(tl.int64) * heads + h) * padded + r
    tl.store(into, tl.where(y == -float("inf"), float("inf"), y * LOG2E))
    tl.store(into + each, total)


@triton.jit
def tile(x, b, h, first, ROWS: tl.constexpr, D: tl.constexpr):
    return tl.reshape(x.load([b, h, first, 0]), (ROWS, D))


@triton.jit
def row(x, head, first, BLOCK: tl.constexpr):
    return tl.reshape(x.load([head, first]), (BLOCK,))


@triton.jit
def finish_products(n, GPU: tl.constexpr):
    """Waits for all products in flight: those that were so at the loop's end made the assembler serialize them all."""
    if GPU:
        tl.inline_asm_elementwise(
            "wgmma.wait_group.sync.aligned 0; mov.b32 $0, $1;",
            "=r,r",
            [n],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def keys_tiles(
    dk, dv, kk, vv, q, g, lse, delta, b, h, head, j, d, lo, hi, scale_2,
    EDGE: tl.constexpr, GPU: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The queries lo..hi of one head for a block of keys. Tiles lie transposed: keys down, queries across."""
    for first in tl.range(lo, hi, BLOCK_M):
        r = first + tl.arange(0, BLOCK_M)
        qq = tile(q, b, h, first, BLOCK_M, D)
        x = tl.dot(kk, tl.trans(qq))
        gg = tile(g, b, h, first, BLOCK_M, D)
        dw = tl.dot(vv, tl.trans(gg))
        p = tl.exp2(x * scale_2 - row(lse, head, first, BLOCK_M)[None, :])
        if EDGE:
            p = tl.where(j <= r[None, :] + d, p, 0.0)
        dv = tl.dot(p.to(gg.dtype), gg, dv)
        ds = p * (dw - row(delta, head, first, BLOCK_M)[None, :])
        if EDGE:
            ds = tl.where(j <= r[None, :] + d, ds, 0.0)  # a hidden key may be NaN
        dk = tl.dot(ds.to(qq.dtype), qq, dk)
        finish_products(first, GPU)
    return dk, dv


@triton.jit
def keys_kernel(
    q, k, v, g, dk, dv, lse, delta, sizes, d, scale, scale_2,
    CAUSAL: tl.constexpr, GPU: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys, over all queries of all heads that read it."""
    L, S, Hq, G = sizes
    blocks = tl.cdiv(S, BLOCK_N)
    at = tl.program_id(0)
    h_kv = at // blocks % (Hq // G)
    b = at // blocks // (Hq // G)
    start = at % blocks * BLOCK_N
    r = start + tl.arange(0, BLOCK_N)
    kk = tile(k, b, h_kv, start, BLOCK_N, D)
    vv = tile(v, b, h_kv, start, BLOCK_N, D)
    dkk = tl.zeros((BLOCK_N, D), tl.float32)
    dvv = tl.zeros((BLOCK_N, D), tl.float32)
    lo = 0
    if CAUSAL:
        lo = tl.maximum(start - d, 0) // BLOCK_M * BLOCK_M
        full = tl.minimum(tl.cdiv(tl.maximum(start + BLOCK_N - 1 - d, 0), BLOCK_M) * BLOCK_M, L)
    for each in range(0, G):
        h = h_kv * G + each
        head = b * Hq + h
        if CAUSAL:
            dkk, dvv = keys_tiles(
                dkk, dvv, kk, vv, q, g, lse, delta, b, h, head, r[:, None], d, lo, full, scale_2,
                True, GPU, D, BLOCK_M,
            )  # fmt: skip
            dkk, dvv = keys_tiles(
                dkk, dvv, kk, vv, q, g, lse, delta, b, h, head, r[:, None], d, full, L, scale_2,
                False, GPU, D, BLOCK_M,
            )  # fmt: skip
        else:
            dkk, dvv = keys_tiles(
                dkk, dvv, kk, vv, q, g, lse, delta, b, h, head, r[:, None], d, lo, L, scale_2,
                False, GPU, D, BLOCK_M,
            )  # fmt: skip
    r64 = r.to(tl.int64)
    base_dk = b.to(tl.int64) * dk.batch + h_kv.to(tl.int64) * dk.head
    base_dv = b.to(tl.int64) * dv.batch + h_kv.to(tl.int64) * dv.head
    store_rows(dv.p + base_dv, r64 * dv.row, r < S, dvv, D, D)
    store_rows(dk.p + base_dk, r64 * dk.row, r < S, dkk * scale, D, D)


@triton.jit
def queries_tiles(
    dq, qq, gg, lse, delta, k, v, b, h_kv, i, S, d, lo, hi, scale_2,
    EDGE: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The keys lo..hi for a block of queries."""
    for first in tl.range(lo, hi, BLOCK_N):
        kk = tile(k, b, h_kv, first, BLOCK_N, D)
        x = tl.dot(qq, tl.trans(kk))
        vv = tile(v, b, h_kv, first, BLOCK_N, D)
        dw = tl.dot(gg, tl.trans(vv))
        ds = tl.exp2(x * scale_2 - lse) * (dw - delta)
        if EDGE:
            j = (first + tl.arange(0, BLOCK_N))[None, :]
            see = j < S
            if CAUSAL:
                see = see & (j <= i + d)
            ds = tl.where(see, ds, 0.0)
        dq = tl.dot(ds.to(kk.dtype), kk, dq)
    return dq


@triton.jit
def queries_kernel(
    q, k, v, g, dq, lse, delta, sizes, padded, d, scale, scale_2,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries of one head."""
    L, S, Hq, G = sizes
    blocks = tl.cdiv(L, BLOCK_M)
    at = tl.program_id(0)
    start = (blocks - 1 - at % blocks) * BLOCK_M  # those that see most keys begin first
    h = at // blocks % Hq
    b = at // blocks // Hq
    r = start + tl.arange(0, BLOCK_M)
    i = r[:, None]
    qq = tile(q, b, h, start, BLOCK_M, D)
    gg = tile(g, b, h, start, BLOCK_M, D)
    base = (b.to(tl.int64) * Hq + h) * padded
    row_lse = tl.load(lse + base + r)[:, None]
    row_delta = tl.load(delta + base + r)[:, None]
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    hi = S
    full = S // BLOCK_N * BLOCK_N
    if CAUSAL:
        hi = tl.minimum(S, tl.maximum(start + BLOCK_M + d, 0))
        full = tl.minimum(full, tl.maximum(start + d + 1, 0) // BLOCK_N * BLOCK_N)
    acc = queries_tiles(
        acc, qq, gg, row_lse, row_delta, k, v, b, h // G, i, S, d, 0, full, scale_2, False, CAUSAL, D, BLOCK_N
    )
    acc = queries_tiles(
        acc, qq, gg, row_lse, row_delta, k, v, b, h // G, i, S, d, full, hi, scale_2, True, CAUSAL, D, BLOCK_N
    )
    base_dq = b.to(tl.int64) * dq.batch + h.to(tl.int64) * dq.head
    store_rows(dq.p + base_dq, r.to(tl.int64) * dq.row, r < L, acc * scale, D, D)


@triton.jit
def await_progress(p, seen, needed, least, GPU: tl.constexpr):
    """Reads a counter until it is at least `least`, unless `seen`, what it was before, is `needed`: the new `seen`.

    Every thread asks for itself. The interpreter runs the programs one after the other, so there it has nothing to do.
    """
    if GPU:
        seen = tl.inline_asm_elementwise(
            AWAIT,
            "=&r,l,r,r,r",
            [p, seen, needed, least],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    return seen


@triton.jit
def tell_progress(p, done, GPU: tl.constexpr):
    """Writes a counter once all threads' additions before are seen by who reads it."""
    if GPU:  # in assembly: a loop with a barrier that the compiler knows of is not pipelined
        tl.inline_asm_elementwise(
            TELL,
            "=r,l,r",
            [p, done],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def fused_tiles(
    dk, dv, seen, kk, vv, q, g, lse, delta, sums, p_own, b, h, head, padded, j, S, d, top, lo, hi, done, total,
    scale_2, EDGE: tl.constexpr, CAUSAL: tl.constexpr, GPU: tl.constexpr, SLACK: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The blocks of queries lo..hi, counted down from block `top`, of one head for a block of keys.

    A block is added to after the program of the keys before has done so; `done` of `total` have passed before. How far
    it is, a program tells when the next scores are there: by then its additions have arrived.
    """
    for n in tl.range(lo, hi, disable_licm=True):
        first = (top - n) * BLOCK_M
        r = first + tl.arange(0, BLOCK_M)
        qq = tile(q, b, h, first, BLOCK_M, D)
        x = tl.dot(kk, tl.trans(qq))
        gg = tile(g, b, h, first, BLOCK_M, D)
        dw = tl.dot(vv, tl.trans(gg))
        at = done + n
        tell_progress(p_own, at, GPU)
        p = tl.exp2(x * scale_2 - row(lse, head, first, BLOCK_M)[None, :])
        if EDGE:
            see = j < S
            if CAUSAL:
                see = see & (j <= r[None, :] + d)
            p = tl.where(see, p, 0.0)
        dv = tl.dot(p.to(gg.dtype), gg, dv)
        ds = p * (dw - row(delta, head, first, BLOCK_M)[None, :])
        if EDGE:
            ds = tl.where(
                see, ds, 0.0
            )  # a hidden key may be NaN; weights of zeros past the end may be infinite
        ds = ds.to(qq.dtype)
        dk = tl.dot(ds, qq, dk)
        part = tl.dot(tl.trans(kk), ds)
        seen = await_progress(p_own - 1, seen, at + 1, tl.minimum(at + 1 + SLACK, total), GPU)
        into = sums + (head.to(tl.int64) * padded + first) * D
        into += tl.arange(0, D)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        tl.atomic_add(into, part, sem="relaxed")
    return dk, dv, seen


@triton.jit
def fused_kernel(
    q, k, v, g, dk, dv, sums, progress, lse, delta, sizes, padded, d, scale, scale_2, heads,
    CAUSAL: tl.constexpr, GPU: tl.constexpr, SLACK: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys; its part of dq is added to float32 `sums`, after those of all blocks before.

    A program waits for the one before of its head alone, whose number is lower: the GPU values programs in order, so
    what is waited for runs or has run. Blocks of queries pass from the last to the first: the last see all keys.
    """
    L, S, Hq, G = sizes
    blocks = tl.cdiv(S, BLOCK_N)
    Hkv = Hq // G
    at = tl.program_id(0)
    together = at // (heads * blocks) * heads
    some = tl.minimum(heads, tl.num_programs(0) // blocks - together)
    within = at - together * blocks
    block = within // some
    head_kv = together + within % some
    h_kv = head_kv % Hkv
    b = head_kv // Hkv
    start = block * BLOCK_N
    r = start + tl.arange(0, BLOCK_N)
    kk = tile(k, b, h_kv, start, BLOCK_N, D)
    vv = tile(v, b, h_kv, start, BLOCK_N, D)
    dkk = tl.zeros((BLOCK_N, D), tl.float32)
    dvv = tl.zeros((BLOCK_N, D), tl.float32)
    p_own = progress + head_kv * blocks + block
    seen = tl.where(block > 0, 0, 2**30)  # the first never asks
    top = tl.cdiv(L, BLOCK_M) - 1
    count = top + 1  # blocks of queries of a head that see some of the keys, and those that see all of them
    full = count
    if CAUSAL:
        count -= tl.minimum(tl.maximum(start - d, 0) // BLOCK_M, count)
        full -= tl.minimum(tl.cdiv(tl.maximum(start + BLOCK_N - 1 - d, 0), BLOCK_M), full)
    if start + BLOCK_N > S:
        full = 0
    # A block of keys of another head begins where the last ended only if all blocks count the same.
    for each in range(0, G):
        h = h_kv * G + each
        head = b * Hq + h
        done = each * (top + 1)
        dkk, dvv, seen = fused_tiles(
            dkk, dvv, seen, kk, vv, q, g, lse, delta, sums, p_own, b, h, head, padded, r[:, None], S, d,
            top, 0, full, done, done + count, scale_2, False, CAUSAL, GPU, SLACK, D, BLOCK_M,
        )  # fmt: skip
        dkk, dvv, seen = fused_tiles(
            dkk, dvv, seen, kk, vv, q, g, lse, delta, sums, p_own, b, h, head, padded, r[:, None], S, d,
            top, full, count, done, done + count, scale_2, True, CAUSAL, GPU, SLACK, D, BLOCK_M,
        )  # fmt: skip
        tell_progress(p_own, done + top + 1, GPU)
    r64 = r.to(tl.int64)
    base_dk = b.to(tl.int64) * dk.batch + h_kv.to(tl.int64) * dk.head
    base_dv = b.to(tl.int64) * dv.batch + h_kv.to(tl.int64) * dv.head
    store_rows(dv.p + base_dv, r64 * dv.row, r < S, dvv, D, D)
    store_rows(dk.p + base_dk, r64 * dk.row, r < S, dkk * scale, D, D)


@triton.jit
def scale_kernel(
    sums, dq, L, Hq, padded, scale, D: tl.constexpr, BLOCK_M: tl.constexpr, SHUFFLED: tl.constexpr
):
    """The float32 sums of the fused kernel, in which the tiles lie transposed, -> dq.

    SHUFFLED: a thread's four columns of sixteen are beside each other, as the kernel in Gluon adds them.
    """
    blocks = padded // BLOCK_M
    at = tl.program_id(0)
    h = at // blocks % Hq
    b = at // blocks // Hq
    r = at % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    r64 = r.to(tl.int64)
    c = tl.arange(0, BLOCK_M)
    if SHUFFLED:
        c = c // 16 * 16 + c % 8 // 2 * 4 + c // 8 % 2 * 2 + c % 2
    tile_sums = sums + at.to(tl.int64) * D * BLOCK_M
    x = tl.trans(tl.load(tile_sums + tl.arange(0, D)[:, None] * BLOCK_M + c[None, :]))
    base = b.to(tl.int64) * dq.batch + h.to(tl.int64) * dq.head
    store_rows(dq.p + base, r64 * dq.row, r < L, x * scale, D, D)


def described(x: torch.Tensor, block: int) -> TensorDescriptor:
    """Blocks of rows of one head; a dimension of one element may have had any stride."""
    size = x.shape[-1]
    strides = [s if n > 1 else size for n, s in zip(x.shape[:-1], x.stride())]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, block, size])


def readable(x: torch.Tensor) -> bool:
    """Whether TMA takes it: rows of 16-byte pieces, no overlap."""
    each = x.element_size()
    far = [s for n, s in zip(x.shape[:-1], x.stride()) if n > 1]
    aligned = all(s > 0 and s * each % 16 == 0 for s in far) and x.data_ptr() % 16 == 0
    return x.numel() > 0 and x.stride(-1) == 1 and aligned


def in_gluon(launch: Launch, config: Config) -> Launch:
    """The launch of one of the kernels above, of that in Gluon."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as Described

    from seqkern.kernels import hopper_fused

    arguments = launch.arguments | {"STAGES": config.num_stages}
    kernel = hopper_fused.queries_kernel
    if launch.kernel is not queries_kernel:
        kernel = hopper_fused.fused_kernel
        sums = launch.kernel is fused_kernel
        absent = {"sums": None, "progress": None, "heads": config.heads, "SLACK": 0, "padded": 0}
        arguments = absent | arguments | {"SUMS": sums, "AHEAD": config.ahead}
    for name, x in arguments.items():
        if isinstance(x, TensorDescriptor):
            wide = len(x.shape) == 4
            layout = NVMMASharedLayout(128 if wide else 0, 16 if wide else 32, len(x.shape))
            arguments[name] = Described(x.base, x.shape, x.strides, x.block_shape, layout)
    return Launch(kernel, launch.programs, arguments, config.num_warps, 1)


def suits(t, o) -> bool:
    """Whether this path computes the call (the gradient of the output is copied where it does not lie right)."""
    extras = (t.mask, t.bias, t.alibi_slopes, t.sinks, t.cu_seqlens_q)
    plain = all(x is None for x in extras) and not (o.softcap or o.dropout_p) and o.window_left < 0
    size = t.query.shape[-1]
    heads = size in (64, 128) and t.value.shape[-1] == size
    halves = t.query.dtype in (torch.float16, torch.bfloat16)
    return (
        plain and heads and halves and o.window_right <= 0 and o.scale > 0 and all(readable(x) for x in t[:3])
    )


def backward_launches(
    t, o, grad_output, grad_lse, output, lse, gradients, needs, config: Configs
) -> list[Launch]:
    """What computes the gradients of a call that `suits`, in turn."""
    q, k, v = t.query, t.key, t.value
    (B, Hq, L, D), S = q.shape, k.shape[2]
    dq, dk, dv = gradients[:3]
    g = torch.zeros_like(output) if grad_output is None else unit_last(grad_output)
    g = g if readable(g) else g.contiguous()
    padded = triton.cdiv(L, PAD) * PAD
    values = torch.empty((2, B * Hq, padded), device=q.device, dtype=torch.float32)
    sizes = (L, S, Hq, Hq // k.shape[1])
    own = {
        "o": operand(unit_last(output)),
        "do": operand(g),
        "lse": RowValues(lse, lse.stride(0), lse.stride(1), lse.stride(2)),
        "dlse": gradient_of_rows(grad_lse),
        "values": values,
        "L": L,
        "padded": padded,
        "heads": Hq,
        "D": D,
        "BLOCK_M": ROWS,
    }
    launches = [Launch(rows_kernel, padded // ROWS * Hq * B, own, 4, 1)]
    common = {
        "D": D,
        "sizes": sizes,
        "d": S - L if o.bottom_right else 0,
        "scale": o.scale,
        "scale_2": o.scale * float(LOG2E.value),
        "CAUSAL": o.window_right == 0,
    }

    def row_blocks(c: Config) -> dict:
        blocks = (TensorDescriptor(x, [B * Hq, padded], [padded, 1], [1, c.block_m]) for x in values)
        return dict(zip(("lse", "delta"), blocks))

    def made(kernel, c: Config, programs: int, **results) -> Launch:
        tiles = {"q": described(q, c.block_m), "g": described(g, c.block_m)}
        tiles |= {"k": described(k, c.block_n), "v": described(v, c.block_n)}
        blocks = {"BLOCK_M": c.block_m, "BLOCK_N": c.block_n}
        return Launch(kernel, programs, common | tiles | results | blocks, c.num_warps, c.num_stages)

    if needs[1] and config.keys is not None:
        programs = triton.cdiv(S, config.keys.block_n) * k.shape[1] * B
        results = {"dk": operand(dk), "dv": operand(dv)}
        results |= row_blocks(config.keys) | {"GPU": not INTERPRETED}
        each = made(keys_kernel, config.keys, programs, **results)
        launches.append(in_gluon(each, config.keys) if config.keys.gluon else each)
    if needs[0] and config.queries is not None:
        programs = triton.cdiv(L, config.queries.block_m) * Hq * B
        results = {"dq": operand(dq), "lse": values[0], "delta": values[1], "padded": padded}
        each = made(queries_kernel, config.queries, programs, **results)
        launches.append(in_gluon(each, config.queries) if config.queries.gluon else each)
    fused = config.fused
    if fused is not None:
        assert needs[0] and needs[1]
        programs = triton.cdiv(S, fused.block_n) * k.shape[1] * B
        sums = torch.zeros((B, Hq, padded, D), device=q.device, dtype=torch.float32)
        results = {"dk": operand(dk), "dv": operand(dv), "sums": sums, "padded": padded}
        results["progress"] = torch.zeros(programs, device=q.device, dtype=torch.int32)
        results |= row_blocks(fused) | {"heads": fused.heads, "GPU": not INTERPRETED, "SLACK": SLACK}
        each = made(fused_kernel, fused, programs, **results)
        launches.append(in_gluon(each, fused) if fused.gluon else each)
        own = {"sums": sums, "dq": operand(dq), "L": L, "Hq": Hq, "padded": padded, "scale": o.scale}
        own |= {"D": D, "BLOCK_M": fused.block_m, "SHUFFLED": fused.gluon}
        launches.append(Launch(scale_kernel, padded // fused.block_m * Hq * B, own, 8, 1))
    return launches
