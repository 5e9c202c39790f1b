"""Attention of few queries to many keys: the keys are split among programs, whose parts are then combined.

One program serves all queries and all heads that read one key head, so that each key is read once (a row of its tile
is a query of a head). Where the keys are split depends on their number alone. Split keys:
Dao et al. 2023, "Flash-Decoding".
"""

import torch
import triton
import triton.language as tl

from seqkern.kernels.attention import attend_all, finish
from seqkern.kernels.launch import Launch, operand, prepare, run
from seqkern.kernels.mods import rows, sequence, store_rows
from seqkern.kernels.tuning_attention import choose, split_size


@triton.jit
def decode_kernel(
    q, k, v, part, part_lse, mods, packed, sizes, scale, splits,
    CHUNK: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
    RETRIES: tl.constexpr,
):  # fmt: skip
    """The part of one split: part [B, Hq, L, splits, DV] in float32 and its lse [B, Hq, L, splits]."""
    L, S, Hq, G = sizes
    longest = L
    at = tl.program_id(0)
    split = at % splits
    h_kv = at // splits % (Hq // G)
    b = at // splits // (Hq // G)
    begin_q, begin_k, L, S = sequence(b, L, S, packed)
    d = 0
    if BOTTOM_RIGHT:
        d = S - L
    r = tl.arange(0, BLOCK_M)
    i = r // G
    h = h_kv * G + r % G
    i64, h64 = i.to(tl.int64), h.to(tl.int64)
    base_q = b.to(tl.int64) * q.batch + begin_q * q.row
    qq = rows(q.p + base_q, i64 * q.row + h64 * q.head, i < L, D, BLOCK_D)
    base_k = b.to(tl.int64) * k.batch + h_kv.to(tl.int64) * k.head + begin_k * k.row
    base_v = b.to(tl.int64) * v.batch + h_kv.to(tl.int64) * v.head + begin_k * v.row
    begin = split * CHUNK
    acc, m, l = attend_all(
        qq, k, v, base_k, base_v, b, h[:, None], i[:, None], 0, L - 1, L, S, d, begin,
        tl.minimum(begin + CHUNK, S), scale, mods, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
        RETRIES,
    )  # fmt: skip
    acc, lse = finish(acc, m, l, None, mods)
    row = ((b.to(tl.int64) * Hq + h64) * longest + i64) * splits + split
    store_rows(part, row * DV, i < L, acc, DV, BLOCK_DV)
    tl.store(part_lse + row, lse, mask=i < L)


@triton.jit
def combine_kernel(
    part, part_lse, o, lse, sinks, packed, sizes, splits, DV: tl.constexpr, BLOCK_DV: tl.constexpr
):
    """The parts of one query of one head, each weighed by its share of the denominator."""
    L, S, Hq, _ = sizes
    longest = L
    at = tl.program_id(0)
    i = at % longest
    h = at // longest % Hq
    b = at // longest // Hq
    begin_q, _, L, S = sequence(b, L, S, packed)
    if i < L:
        row = at.to(tl.int64) * splits
        c = tl.arange(0, BLOCK_DV)
        top = tl.full((), -float("inf"), tl.float32)
        if sinks is not None:
            top = tl.load(sinks + h).to(tl.float32)
        for n in range(0, splits):
            top = tl.maximum(top, tl.load(part_lse + row + n))
        shift = tl.where(top == -float("inf"), 0.0, top)
        total = tl.full((), 0.0, tl.float32)
        if sinks is not None:
            total = tl.exp(tl.load(sinks + h).to(tl.float32) - shift)
        acc = tl.zeros((BLOCK_DV,), tl.float32)
        for n in range(0, splits):
            share = tl.exp(tl.load(part_lse + row + n) - shift)
            total += share
            x = tl.load(part + (row + n) * DV + c, mask=c < DV, other=0.0)
            acc += share * x
        safe = tl.where(total == 0.0, 1.0, total)
        base_o = b.to(tl.int64) * o.batch + h.to(tl.int64) * o.head + (begin_q + i) * o.row
        tl.store(o.p + base_o + c, (acc / safe).to(o.p.dtype.element_ty), mask=c < DV)
        base_lse = b.to(tl.int64) * lse.batch + h.to(tl.int64) * lse.head + begin_q + i
        tl.store(lse.p + base_lse, tl.where(total == 0.0, -float("inf"), shift + tl.log(safe)))


def decode_launches(t, o, output, lse) -> list[Launch]:
    """What `decode` launches in turn."""
    call = prepare(t, o)
    chunk = split_size(call.S)
    splits = triton.cdiv(call.S, chunk)
    config = choose("decode", call.shape)
    sizes = (call.L, call.S, call.Hq, call.G)
    DV = call.constants["DV"]
    rows_of = (call.B, call.Hq, call.L, splits)
    part = torch.empty((*rows_of, DV), device=output.device, dtype=torch.float32)
    part_lse = torch.empty(rows_of, device=output.device, dtype=torch.float32)
    split = dict(
        q=operand(call.q),
        k=operand(call.k),
        v=operand(call.v),
        part=part,
        part_lse=part_lse,
        mods=call.mods,
        packed=call.packed,
        sizes=sizes,
        scale=o.scale,
        splits=splits,
        CHUNK=chunk,
        BOTTOM_RIGHT=o.bottom_right,
        **call.constants,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        RETRIES=call.retries,
    )
    combine = {
        "part": part,
        "part_lse": part_lse,
        "o": operand(output),
        "lse": call.row_values(lse),
        "sinks": call.sinks,
        "packed": call.packed,
        "sizes": sizes,
        "splits": splits,
        "DV": DV,
        "BLOCK_DV": call.constants["BLOCK_DV"],
    }
    heads = call.B * (call.Hq // call.G)
    return [
        Launch(decode_kernel, splits * heads, split, config.num_warps, config.num_stages),
        Launch(combine_kernel, call.B * call.Hq * call.L, combine, 1, 1),
    ]


def decode(t, o, output, lse) -> None:
    """Writes output and lse of the op `seqkern::attention` for few queries."""
    for launch in decode_launches(t, o, output, lse):
        run(launch)
