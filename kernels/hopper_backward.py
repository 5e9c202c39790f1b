"""Attention backward on Hopper: 16-bit, heads of 64 or 128, no option but causal; tiles come through TMA.

The equations are those of `attention_backward`. Operands come by descriptors, which need no address registers and fill
with zeros past the end, so the blocks are larger; the scale is folded into the exponent and into the last product.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from seqkern.kernels.attention_backward import gradient_of_rows
from seqkern.kernels.launch import Launch, RowValues, operand, run, unit_last
from seqkern.kernels.mods import LOG2E, rows, store_rows
from seqkern.kernels.tuning_hopper import KEYS, QUERIES, readable, seen_keys

PAD = 128  # rows of a head in the buffers are a multiple of every block of queries
ROWS = 64  # that a program of the small kernel reads
INTERPRETED = triton.knobs.runtime.interpret


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
    total = tl.where(y == -float("inf"), 0.0, total)
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


def described(x: torch.Tensor, seen: int, block: int) -> TensorDescriptor:
    """Blocks of the first rows of one head; a dimension of one element may have had any stride."""
    size = x.shape[-1]
    strides = [s if n > 1 else size for n, s in zip(x.shape[:-1], x.stride())]
    return TensorDescriptor(x, [*x.shape[:2], seen, size], [*strides, 1], [1, 1, block, size])


def backward_launches(t, o, grad_output, grad_lse, output, lse, gradients, needs) -> list[Launch]:
    """What `backward` launches in turn."""
    q, k, v = t.query, t.key, t.value
    (B, Hq, L, D), S = q.shape, k.shape[2]
    dq, dk, dv = gradients[:3]
    g = torch.zeros_like(output) if grad_output is None else unit_last(grad_output)
    g = g if readable(g) else g.clone(memory_format=torch.contiguous_format)
    padded = triton.cdiv(L, PAD) * PAD
    values = torch.empty((2, B * Hq, padded), device=q.device, dtype=torch.float32)
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
    seen = seen_keys(L, S, o)

    def made(kernel, c, programs: int, **results) -> Launch:
        arguments = {
            "q": described(q, L, c.block_m),
            "k": described(k, seen, c.block_n),
            "v": described(v, seen, c.block_n),
            "g": described(g, L, c.block_m),
            "sizes": (L, S, Hq, Hq // k.shape[1]),
            "d": S - L if o.bottom_right else 0,
            "scale": o.scale,
            "scale_2": o.scale * float(LOG2E.value),
            "CAUSAL": o.window_right == 0,
            "D": D,
            "BLOCK_M": c.block_m,
            "BLOCK_N": c.block_n,
        }
        return Launch(kernel, programs, arguments | results, c.num_warps, c.num_stages)

    if needs[1]:
        blocks = [TensorDescriptor(x, [B * Hq, padded], [padded, 1], [1, KEYS.block_m]) for x in values]
        results = {"dk": operand(dk), "dv": operand(dv), "lse": blocks[0], "delta": blocks[1]}
        programs = triton.cdiv(S, KEYS.block_n) * k.shape[1] * B
        launches.append(made(keys_kernel, KEYS, programs, **results, GPU=not INTERPRETED))
    if needs[0]:
        results = {"dq": operand(dq), "lse": values[0], "delta": values[1], "padded": padded}
        programs = triton.cdiv(L, QUERIES.block_m) * Hq * B
        launches.append(made(queries_kernel, QUERIES, programs, **results))
    return launches


def backward(t, o, grad_output, grad_lse, output, lse, gradients, needs) -> None:
    """Writes the gradients of query, key and value, as far as needed, of a call that `tuning_hopper.takes`."""
    for launch in backward_launches(t, o, grad_output, grad_lse, output, lse, gradients, needs):
        run(launch)
