"""Attention forward on Hopper: blocks of keys and values come by TMA, products run on warpgroups.

For plain calls: 16-bit, one head size of 64 or 128, dense, no option but causal; `tuning_hopper.takes` says which.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from seqkern.kernels.launch import Launch, RowValues, run
from seqkern.kernels.mods import LN2, LOG2E
from seqkern.kernels.tuning_hopper import Forward, forward_config, seen_keys

# By their names since Triton 3.7 and 3.9, or those of 3.6, which 3.9 has left as stubs that raise.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
save = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

SHARED_KEYS = 24 * 2**20  # bytes of keys and values that programs in flight read: less than the L2 cache


@triton.jit
def place(at, blocks, heads, group):
    """Program -> block of queries, and head counted over all batches.

    The heads come in groups whose keys and values stay in the L2 cache. Within a group the last blocks begin first: of
    a causal call they see most keys.
    """
    section = at // (blocks * group)
    at -= section * (blocks * group)
    size = tl.minimum(group, heads - section * group)
    return blocks - 1 - at // size, section * group + at % size


class Work(NamedTuple):
    """What a program needs to find its blocks of queries and their keys."""

    B: int
    Hq: int
    G: int
    L: int
    S: int
    d: int  #: the diagonal: the place of query i is key i + d
    group: int  #: heads whose keys and values share the L2 cache


@gluon.jit
def rounds(work, BLOCK_M: gl.constexpr):
    """Blocks of queries that this program computes: every round gives each program one, every other one in reverse."""
    tiles = (work.L + BLOCK_M - 1) // BLOCK_M * work.B * work.Hq
    p, P = gl.program_id(0), gl.num_programs(0)
    whole = tiles // P
    if whole % 2 == 1:
        p = P - 1 - p
    return whole + (p < tiles - whole * P).to(gl.int32)


@gluon.jit
def tile(i, work, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """Of round i: batch, head, first query, blocks of keys, and how many of these are seen by all queries."""
    p, P = gl.program_id(0), gl.num_programs(0)
    if i % 2 == 1:
        p = P - 1 - p
    blocks = (work.L + BLOCK_M - 1) // BLOCK_M
    block, head = place(i * P + p, blocks, work.B * work.Hq, work.group)
    first = block * BLOCK_M
    hi = work.S
    full = work.S // BLOCK_N
    if CAUSAL:
        hi = gl.minimum(hi, gl.maximum(gl.minimum(first + BLOCK_M, work.L) + work.d, 0))
        full = gl.minimum(full, gl.maximum(first + work.d + 1, 0) // BLOCK_N)
    n = gl.maximum((hi + BLOCK_N - 1) // BLOCK_N, 1)  # where no key is seen, one block is, wholly hidden
    return head // work.Hq, head % work.Hq, first, n, full


@gluon.jit
def load_keys(x, b, h, row, tiles, ready, free, count, STAGES: gl.constexpr):
    """Loads a block of keys or values, the one of number `count`, into its place of the ring."""
    at = count % STAGES
    mbarrier.wait(free.index(at), (count // STAGES & 1) ^ 1)
    mbarrier.expect(ready.index(at), x.block_type.nbytes)
    load(x, [b, h, row, 0], ready.index(at), tiles.index(at))


@gluon.jit
def produce(
    q, k, v, tiles, ready, free, work, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """Loads queries, and their keys and values from the last block to the first; values one block later than keys."""
    tiles_q, tiles_k, tiles_v, _ = tiles
    ready_q, ready_k, ready_v = ready
    free_q, free_k, free_v = free
    GROUPS: gl.constexpr = BLOCK_M // 64
    count = 0
    for i in range(rounds(work, BLOCK_M)):
        b, h, first, n, _full = tile(i, work, BLOCK_M, BLOCK_N, CAUSAL)
        kv = h // work.G
        load_keys(k, b, kv, (n - 1) * BLOCK_N, tiles_k, ready_k, free_k, count, STAGES)
        mbarrier.wait(free_q, (i & 1) ^ 1)
        mbarrier.expect(ready_q, GROUPS * q.block_type.nbytes)
        for g in gl.static_range(GROUPS):
            load(q, [b, h, first + 64 * g, 0], ready_q, tiles_q.index(g))
        for step in range(1, n):
            load_keys(k, b, kv, (n - 1 - step) * BLOCK_N, tiles_k, ready_k, free_k, count + step, STAGES)
            load_keys(v, b, kv, (n - step) * BLOCK_N, tiles_v, ready_v, free_v, count + step - 1, STAGES)
        load_keys(v, b, kv, 0, tiles_v, ready_v, free_v, count + n - 1, STAGES)
        count += n


@gluon.jit
def hide(x, seen):
    """Only the first `seen` products of each row are left."""
    j = gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))
    return gl.where(j[None, :] < seen[:, None], x, -float("inf"))


@gluon.jit
def partial_sums(p):
    """[M, N] -> [M, 8], sums within each thread: in what a warpgroup multiplies, a thread has columns 8 apart."""
    return gl.sum(gl.reshape(p, (p.shape[0], p.shape[1] // 8, 8)), 1)


@gluon.jit
def across(row, like):
    """[M] -> [M, 1] in the layout of a matrix."""
    return gl.convert_layout(row, gl.SliceLayout(1, like.type.layout), assert_trivial=True)[:, None]


@gluon.jit
def softmax(x, m, l, scale):
    """A block of products x [M, N], -inf where hidden, joins the running softmax; m is in their units, l partial."""
    top = gl.maximum(m, gl.max(x, 1))
    shift = gl.where(top == -float("inf"), 0.0, top * scale)
    p = gl.exp2(x * scale - shift[:, None])
    fade = gl.exp2(m * scale - shift)
    return p, top, l * across(fade, l) + partial_sums(p), fade


@gluon.jit
def packed(w, dtype: gl.constexpr):
    """Weights [M, N] as pairs of 16-bit numbers: int32 [M, N / 2]. As such they are carried around a loop in half the
    registers."""
    low, high = gl.split(gl.reshape(w, (w.shape[0], w.shape[1] // 2, 2)))
    CODE: gl.constexpr = (
        "cvt.rn.bf16x2.f32 $0, $2, $1;" if dtype == gl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    )
    return gl.inline_asm_elementwise(CODE, "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def unpacked(x, dtype: gl.constexpr, layout: gl.constexpr):
    low = (x & 0xFFFF).to(gl.int16).to(dtype, bitcast=True)
    high = (x >> 16).to(gl.int16).to(dtype, bitcast=True)
    w = gl.reshape(gl.join(low, high), (x.shape[0], 2 * x.shape[1]))
    return gl.convert_layout(w, layout, assert_trivial=True)


@gluon.jit
def advance(
    acc, m, l, p, tile_q, tiles, ready, free, turn, count, passes, limit, row, scale,
    BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, ORDERED: gl.constexpr, GROUP: gl.constexpr,
    GROUPS: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """Products with the keys of block number `count`, whose first is `row`, while weights p of the block before meet
    its values. `passes` counts the calls."""
    _, tiles_k, tiles_v, _ = tiles
    _, ready_k, ready_v = ready
    _, free_k, free_v = free
    at, before = count % STAGES, (count - 1) % STAGES
    phase, phase_before = count // STAGES & 1, (count - 1) // STAGES & 1
    zeros = gl.zeros((64, BLOCK_N), gl.float32, scores_layout(BLOCK_N))
    weights = unpacked(p, tiles_v.dtype, gl.DotOperandLayout(0, output_layout(D), 2))
    mbarrier.wait(ready_k.index(at), phase)
    if ORDERED:
        mbarrier.wait(turn.index(GROUP), passes & 1)
    keys = tiles_k.index(at).reshape((BLOCK_N, D)).permute((1, 0))
    x = warpgroup_mma(tile_q, keys, zeros, use_acc=False, is_async=True)
    mbarrier.wait(ready_v.index(before), phase_before)
    acc = warpgroup_mma(weights, tiles_v.index(before).reshape((BLOCK_N, D)), acc, is_async=True)
    if ORDERED:
        barrier()
        mbarrier.arrive(turn.index((GROUP + 1) % GROUPS), count=1)
    x = warpgroup_mma_wait(1, deps=[x])
    barrier()
    mbarrier.arrive(free_k.index(at), count=1)
    if EDGE:
        x = hide(x, limit - row)
    w, m, l, fade = softmax(x, m, l, scale)
    # A branch, which the assembler does not move the softmax behind: the products with values are under way.
    mbarrier.wait(ready_v.index(before), phase_before)
    acc = warpgroup_mma_wait(0, deps=[acc])
    barrier()
    mbarrier.arrive(free_v.index(before), count=1)
    acc = acc * across(fade, acc)
    return acc, m, l, packed(w, tiles_v.dtype)


@gluon.constexpr_function
def scores_layout(BLOCK_N):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])


@gluon.constexpr_function
def output_layout(D):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])


@gluon.jit
def consume(
    o, lse, tiles, ready, free, turn, work, scale,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    ORDERED: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """64 queries of a block: the products of one block of keys are under way beside the softmax of another."""
    tiles_q, tiles_k, tiles_v, tiles_o = tiles
    ready_q, ready_k, ready_v = ready
    free_q, free_k, free_v = free
    GROUPS: gl.constexpr = BLOCK_M // 64
    LAYOUT: gl.constexpr = scores_layout(BLOCK_N)
    OUT: gl.constexpr = output_layout(D)
    tile_q = tiles_q.index(GROUP).reshape((64, D))
    if ORDERED and GROUP == GROUPS - 1:  # the first turn is that of group 0
        mbarrier.arrive(turn.index(0), count=1)
    count = 0
    for i in range(rounds(work, BLOCK_M)):
        b, h, first, n, full = tile(i, work, BLOCK_M, BLOCK_N, CAUSAL)
        first += 64 * GROUP
        r = first + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
        limit = gl.full((64,), work.S, gl.int32, gl.SliceLayout(1, LAYOUT))
        if CAUSAL:
            limit = gl.minimum(limit, r + work.d + 1)
        acc = gl.zeros((64, D), gl.float32, OUT)
        m = gl.full((64,), -float("inf"), gl.float32, gl.SliceLayout(1, LAYOUT))
        l = partial_sums(gl.zeros((64, BLOCK_N), gl.float32, LAYOUT))
        at = count % STAGES
        mbarrier.wait(ready_q, i & 1)
        mbarrier.wait(ready_k.index(at), count // STAGES & 1)
        zeros = gl.zeros((64, BLOCK_N), gl.float32, LAYOUT)
        keys = tiles_k.index(at).reshape((BLOCK_N, D)).permute((1, 0))
        x = warpgroup_mma(tile_q, keys, zeros, use_acc=False, is_async=True)
        x = warpgroup_mma_wait(0, deps=[x])
        barrier()
        mbarrier.arrive(free_k.index(at), count=1)
        x = hide(x, limit - (n - 1) * BLOCK_N)
        w, m, l, _fade = softmax(x, m, l, scale)
        p = packed(w, o.dtype)
        edge = gl.maximum(n - full, 1)  # blocks of which some keys are hidden, the first one among them
        passes = count - i  # one less than blocks of keys, for each block of queries
        for step in range(1, edge):
            acc, m, l, p = advance(
                acc, m, l, p, tile_q, tiles, ready, free, turn, count + step, passes + step - 1, limit,
                (n - 1 - step) * BLOCK_N, scale, BLOCK_N, D, STAGES, ORDERED, GROUP, GROUPS, True,
            )  # fmt: skip
        for step in range(edge, n):
            acc, m, l, p = advance(
                acc, m, l, p, tile_q, tiles, ready, free, turn, count + step, passes + step - 1, limit,
                (n - 1 - step) * BLOCK_N, scale, BLOCK_N, D, STAGES, ORDERED, GROUP, GROUPS, False,
            )  # fmt: skip
        barrier()
        mbarrier.arrive(free_q, count=1)
        count += n
        at = (count - 1) % STAGES
        mbarrier.wait(ready_v.index(at), (count - 1) // STAGES & 1)
        weights = unpacked(p, o.dtype, gl.DotOperandLayout(0, OUT, 2))
        acc = warpgroup_mma(weights, tiles_v.index(at).reshape((BLOCK_N, D)), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        barrier()
        mbarrier.arrive(free_v.index(at), count=1)
        l = gl.convert_layout(gl.sum(l, 1), gl.SliceLayout(1, LAYOUT), assert_trivial=True)
        empty = l == 0.0
        l = gl.where(empty, 1.0, l)
        total = gl.where(empty, -float("inf"), (m * scale + gl.log2(l)) * LN2)
        gl.store(lse.p + b.to(gl.int64) * lse.batch + h.to(gl.int64) * lse.head + r, total, mask=r < work.L)
        acc = gl.where(across(empty, acc), 0.0, acc * across(1.0 / l, acc))
        tma.store_wait(0)  # the output of the last round has left
        barrier()
        tiles_o.index(GROUP).reshape((64, D)).store(acc.to(o.dtype))
        fence_async_shared()
        barrier()
        save(o, [b, h, first, 0], tiles_o.index(GROUP))
    tma.store_wait(0)


@gluon.jit
def warpgroups_kernel(
    q, k, v, o, lse, work, scale,
    CAUSAL: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    ORDERED: gl.constexpr,
):  # fmt: skip
    """One warp loads; two or three groups of four warps compute 64 queries each, one after the other if ORDERED."""
    GROUPS: gl.constexpr = BLOCK_M // 64
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    tiles_q = gl.allocate_shared_memory(q.dtype, [GROUPS] + q.block_type.shape, q.layout)
    tiles_k = gl.allocate_shared_memory(k.dtype, [STAGES] + k.block_type.shape, k.layout)
    tiles_v = gl.allocate_shared_memory(v.dtype, [STAGES] + v.block_type.shape, v.layout)
    tiles_o = gl.allocate_shared_memory(o.dtype, [GROUPS] + o.block_type.shape, o.layout)
    ready_q = gl.allocate_shared_memory(gl.int64, [1], BAR)
    free_q = gl.allocate_shared_memory(gl.int64, [1], BAR)
    ready_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    ready_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    free_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    free_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    turn = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], BAR)
    mbarrier.init(ready_q, 1)
    mbarrier.init(free_q, GROUPS)
    for s in gl.static_range(STAGES):
        mbarrier.init(ready_k.index(s), 1)
        mbarrier.init(ready_v.index(s), 1)
        mbarrier.init(free_k.index(s), GROUPS)
        mbarrier.init(free_v.index(s), GROUPS)
    for g in gl.static_range(GROUPS):
        mbarrier.init(turn.index(g), 1)
    fence_async_shared()
    scale = scale * LOG2E
    tiles = (tiles_q, tiles_k, tiles_v, tiles_o)
    ready = (ready_q, ready_k, ready_v)
    free = (free_q, free_k, free_v)
    # fmt: off
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (consume, (o, lse, tiles, ready, free, turn, work, scale,
                           BLOCK_M, BLOCK_N, D, STAGES, CAUSAL, ORDERED, 0)),
                (consume, (o, lse, tiles, ready, free, turn, work, scale,
                           BLOCK_M, BLOCK_N, D, STAGES, CAUSAL, ORDERED, 1)),
                (produce, (q, k, v, tiles, ready, free, work, BLOCK_M, BLOCK_N, STAGES, CAUSAL)),
            ],
            [4, 1], [240, 24],
        )
    else:
        gl.static_assert(GROUPS == 3)
        gl.warp_specialize(
            [
                (consume, (o, lse, tiles, ready, free, turn, work, scale,
                           BLOCK_M, BLOCK_N, D, STAGES, CAUSAL, ORDERED, 0)),
                (consume, (o, lse, tiles, ready, free, turn, work, scale,
                           BLOCK_M, BLOCK_N, D, STAGES, CAUSAL, ORDERED, 1)),
                (consume, (o, lse, tiles, ready, free, turn, work, scale,
                           BLOCK_M, BLOCK_N, D, STAGES, CAUSAL, ORDERED, 2)),
                (produce, (q, k, v, tiles, ready, free, work, BLOCK_M, BLOCK_N, STAGES, CAUSAL)),
            ],
            [4, 4, 1], [160, 160, 24],
        )
    # fmt: on


def descriptor(x: Tensor, rows: int, block: int) -> TensorDescriptor:
    """Of the first rows of x, read in blocks of one head; rows past them read 0 and are not written."""
    shape = [x.shape[0], x.shape[1], rows, x.shape[3]]
    strides = [s if n > 1 else 8 for n, s in zip(x.shape[:-1], x.stride())] + [1]
    layout = gl.NVMMASharedLayout(128, 16, rank=4)
    return TensorDescriptor(x, shape, strides, [1, 1, block, x.shape[3]], layout)


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def forward_launch(t, o, output: Tensor, lse: Tensor, config: Forward | None = None) -> Launch:
    """What `forward` launches: t and o are the op's arguments, output and lse the memory for its results."""
    q, k, v = t.query, t.key, t.value
    (B, Hq, L, D), (_, Hkv, S, _) = q.shape, k.shape
    causal = o.window_right == 0
    config = config or forward_config(D, causal)
    seen = seen_keys(L, S, o)
    together = max(1, SHARED_KEYS // (2 * S * D * q.element_size())) * (Hq // Hkv)
    arguments = {
        "q": descriptor(q, L, 64),
        "k": descriptor(k, seen, config.block_n),
        "v": descriptor(v, seen, config.block_n),
        "o": descriptor(output, L, 64),
        "lse": RowValues(lse, lse.stride(0), lse.stride(1)),
        "work": Work(B, Hq, Hq // Hkv, L, S, S - L if o.bottom_right else 0, min(together, B * Hq)),
        "scale": o.scale,
        "CAUSAL": causal,
        "D": D,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "STAGES": config.stages,
        "ORDERED": config.turns,
    }
    programs = triton.cdiv(L, config.block_m) * Hq * B
    if config.resident:
        programs = min(programs, multiprocessors(q.device))
    return Launch(warpgroups_kernel, programs, arguments, 4, 1)


def forward(t, o, output: Tensor, lse: Tensor) -> None:
    """Writes output and lse of a call that `tuning_hopper.takes`."""
    run(forward_launch(t, o, output, lse))
