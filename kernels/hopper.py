"""Attention forward on Hopper: blocks of keys and values come by TMA, products run on warpgroups.

For plain calls: 16-bit, one head size of 64 or 128, dense, no option but causal; `fits` says which.
"""

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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as LaidOutDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from seqkern.kernels.launch import Launch, RowValues, run
from seqkern.kernels.mods import LN2, LOG2E

SHARED_KEYS = 24 * 2**20  # bytes of keys and values that programs in flight read: less than the L2 cache


class Config(NamedTuple):
    variant: str  #: "tma", or "specialized": the compiler gives the loads a warp of their own
    block_m: int  #: queries of a block
    block_n: int  #: keys of a block
    num_warps: int
    num_stages: int
    maxnreg: int | None = None  #: most registers of a thread

    @property
    def name(self) -> str:
        limit = f"-r{self.maxnreg}" if self.maxnreg else ""
        return f"{self.variant}-{self.block_m}x{self.block_n}-w{self.num_warps}-s{self.num_stages}{limit}"


CONFIGS = {
    64: [
        Config("warpgroups", 128, 128, 4, 2),
        Config("warpgroups", 128, 128, 4, 4),
        Config("turns", 128, 128, 4, 4),
        Config("warpgroups", 192, 128, 4, 2),
        Config("warpgroups", 192, 128, 4, 4),
        Config("turns", 192, 128, 4, 4),
        Config("tma", 128, 64, 8, 3),
        Config("tma", 128, 128, 8, 2),
        Config("tma", 128, 128, 8, 3),
        Config("tma", 64, 64, 4, 3),
        Config("tma", 64, 128, 4, 2),
        Config("tma", 64, 128, 4, 3),
    ],
    128: [
        Config("warpgroups", 128, 128, 4, 2),
        Config("warpgroups", 128, 128, 4, 3),
        Config("turns", 128, 128, 4, 2),
        Config("turns", 128, 128, 4, 3),
        Config("warpgroups", 128, 64, 4, 4),
        Config("tma", 128, 64, 8, 2),
        Config("tma", 128, 64, 8, 3),
        Config("tma", 128, 128, 8, 2),
        Config("tma", 64, 64, 4, 2),
        Config("tma", 64, 64, 4, 3),
    ],
}


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


@triton.jit
def attend(
    acc, m, l, q, k, v, b, h, i, S, d, lo, hi, scale,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """The keys lo..hi for queries q [M, D] at rows i [M, 1]; m in units of q k^T. EDGE: some are hidden."""
    D: tl.constexpr = q.shape[1]
    for first in tl.range(lo, hi, BLOCK_N, warp_specialize=SPECIALIZED):
        kk = k.load([b, h, first, 0]).reshape(BLOCK_N, D)
        x = tl.dot(q, kk.T)
        if EDGE:
            j = first + tl.arange(0, BLOCK_N)[None, :]
            see = j < S
            if CAUSAL:
                see = see & (j <= i + d)
            x = tl.where(see, x, -float("inf"))
        top = tl.maximum(m, tl.max(x, 1))
        shift = tl.where(top == -float("inf"), 0.0, top * scale)
        p = tl.exp2(x * scale - shift[:, None])
        fade = tl.exp2(m * scale - shift)
        l = l * fade + tl.sum(p, 1)
        acc = acc * fade[:, None]
        vv = v.load([b, h, first, 0]).reshape(BLOCK_N, D)
        acc = tl.dot(p.to(vv.dtype), vv, acc)
        m = top
    return acc, m, l


@triton.jit
def tma_kernel(
    q, k, v, o, lse, sizes, group, scale,
    CAUSAL: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPECIALIZED: tl.constexpr,
):  # fmt: skip
    B, Hq, G, L, S = sizes
    block, at = place(tl.program_id(0), tl.cdiv(L, BLOCK_M), B * Hq, group)
    b = at // Hq
    h = at % Hq
    first = block * BLOCK_M
    d = 0
    if BOTTOM_RIGHT:
        d = S - L
    hi = S
    full = S // BLOCK_N * BLOCK_N
    if CAUSAL:
        hi = tl.minimum(S, tl.maximum(tl.minimum(first + BLOCK_M, L) + d, 0))
        full = tl.minimum(full, tl.maximum(first + d + 1, 0) // BLOCK_N * BLOCK_N)
    scale = scale * LOG2E
    r = first + tl.arange(0, BLOCK_M)
    i = r[:, None]
    qq = q.load([b, h, first, 0]).reshape(BLOCK_M, D)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc, m, l = attend(acc, m, l, qq, k, v, b, h // G, i, S, d, 0, full, scale, BLOCK_N, CAUSAL, False, SPECIALIZED)
    acc, m, l = attend(acc, m, l, qq, k, v, b, h // G, i, S, d, full, hi, scale, BLOCK_N, CAUSAL, True, False)
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    acc = tl.where(empty[:, None], 0.0, acc / l[:, None])
    o.store([b, h, first, 0], acc.to(o.dtype).reshape(1, 1, BLOCK_M, D))
    total = tl.where(empty, -float("inf"), (m * scale + tl.log2(l)) * LN2)
    base = b.to(tl.int64) * lse.batch + h.to(tl.int64) * lse.head
    tl.store(lse.p + base + r, total, mask=r < L)


@gluon.jit
def produce(
    q, k, v, tiles, ready, free, work, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Loads the queries once, and n blocks of keys and values from the last to the first into rings of STAGES."""
    tiles_q, tiles_k, tiles_v = tiles
    ready_q, ready_k, ready_v = ready
    free_k, free_v = free
    b, h, kv, first, n = work
    mbarrier.expect(ready_q, GROUPS * q.block_type.nbytes)
    for g in gl.static_range(GROUPS):
        tma.async_copy_global_to_shared(q, [b, h, first + 64 * g, 0], ready_q, tiles_q.index(g))
    for step in range(n + 1):
        if step < n:
            at = step % STAGES
            mbarrier.wait(free_k.index(at), (step // STAGES & 1) ^ 1)
            mbarrier.expect(ready_k.index(at), k.block_type.nbytes)
            row = (n - 1 - step) * BLOCK_N
            tma.async_copy_global_to_shared(k, [b, kv, row, 0], ready_k.index(at), tiles_k.index(at))
        if step > 0:  # values are read one block later than keys
            at = (step - 1) % STAGES
            mbarrier.wait(free_v.index(at), ((step - 1) // STAGES & 1) ^ 1)
            mbarrier.expect(ready_v.index(at), v.block_type.nbytes)
            row = (n - step) * BLOCK_N
            tma.async_copy_global_to_shared(v, [b, kv, row, 0], ready_v.index(at), tiles_v.index(at))


@gluon.jit
def softmax(x, m, l, scale):
    """A block of products x [M, N], -inf where hidden, joins the running softmax; m is in their units."""
    top = gl.maximum(m, gl.max(x, 1))
    shift = gl.where(top == -float("inf"), 0.0, top * scale)
    p = gl.exp2(x * scale - shift[:, None])
    fade = gl.exp2(m * scale - shift)
    return p, top, l * fade + gl.sum(p, 1), fade


@gluon.jit
def packed(w, dtype: gl.constexpr):
    """Weights [M, N] as pairs of 16-bit numbers: int32 [M, N / 2]. As such they are carried around a loop in half the
    registers."""
    low, high = gl.split(gl.reshape(w, (w.shape[0], w.shape[1] // 2, 2)))
    CODE: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if dtype == gl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(CODE, "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def unpacked(x, dtype: gl.constexpr, layout: gl.constexpr):
    low = (x & 0xFFFF).to(gl.int16).to(dtype, bitcast=True)
    high = (x >> 16).to(gl.int16).to(dtype, bitcast=True)
    w = gl.reshape(gl.join(low, high), (x.shape[0], 2 * x.shape[1]))
    return gl.convert_layout(w, layout, assert_trivial=True)


@gluon.jit
def advance(
    acc, m, l, p, tile_q, tiles, ready, free, turn, step, limit, row, scale,
    BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, ORDERED: gl.constexpr, GROUP: gl.constexpr,
    GROUPS: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """Products of keys of block `step`, whose first is `row`, while the weights p of the block before meet its values."""
    tiles_k, tiles_v = tiles
    ready_k, ready_v = ready
    free_k, free_v = free
    at, before = step % STAGES, (step - 1) % STAGES
    zeros = gl.zeros((64, BLOCK_N), gl.float32, scores_layout(BLOCK_N))
    weights = unpacked(p, tiles_v.dtype, gl.DotOperandLayout(0, output_layout(D), 2))
    mbarrier.wait(ready_k.index(at), step // STAGES & 1)
    if ORDERED:
        mbarrier.wait(turn.index(GROUP), (step - 1) & 1)
    keys = tiles_k.index(at).reshape((BLOCK_N, D)).permute((1, 0))
    x = warpgroup_mma(tile_q, keys, zeros, use_acc=False, is_async=True)
    mbarrier.wait(ready_v.index(before), (step - 1) // STAGES & 1)
    acc = warpgroup_mma(weights, tiles_v.index(before).reshape((BLOCK_N, D)), acc, is_async=True)
    if ORDERED:
        gl.thread_barrier()
        mbarrier.arrive(turn.index((GROUP + 1) % GROUPS), count=1)
    x = warpgroup_mma_wait(1, deps=[x])
    gl.thread_barrier()
    mbarrier.arrive(free_k.index(at), count=1)
    if EDGE:
        j = row + gl.arange(0, BLOCK_N, gl.SliceLayout(0, scores_layout(BLOCK_N)))
        x = gl.where(j[None, :] < limit[:, None], x, -float("inf"))
    w, m, l, fade = softmax(x, m, l, scale)
    # A branch, which the assembler does not move the softmax behind: the products with values are under way.
    mbarrier.wait(ready_v.index(before), (step - 1) // STAGES & 1)
    acc = warpgroup_mma_wait(0, deps=[acc])
    gl.thread_barrier()
    mbarrier.arrive(free_v.index(before), count=1)
    fade = gl.convert_layout(fade, gl.SliceLayout(1, output_layout(D)), assert_trivial=True)
    acc = acc * fade[:, None]
    return acc, m, l, packed(w, tiles_v.dtype)


@gluon.constexpr_function
def scores_layout(BLOCK_N):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])


@gluon.constexpr_function
def output_layout(D):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])


@gluon.jit
def consume(
    o, lse, tiles, ready, free, turn, work,
    BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, ORDERED: gl.constexpr,
    GROUPS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """64 queries: the products of one block are under way while the softmax of another is computed."""
    tiles_q, tiles_k, tiles_v = tiles
    ready_q, ready_k, ready_v = ready
    free_k, free_v = free
    LAYOUT: gl.constexpr = scores_layout(BLOCK_N)
    OUT: gl.constexpr = output_layout(D)
    b, h, first, n, full, L, S, d, scale = work
    first += 64 * GROUP
    r = first + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    limit = gl.full((64,), S, gl.int32, gl.SliceLayout(1, LAYOUT))
    if CAUSAL:
        limit = gl.minimum(limit, r + d + 1)
    tile_q = tiles_q.index(GROUP).reshape((64, D))
    acc = gl.zeros((64, D), gl.float32, OUT)
    m = gl.full((64,), -float("inf"), gl.float32, gl.SliceLayout(1, LAYOUT))
    l = gl.zeros((64,), gl.float32, gl.SliceLayout(1, LAYOUT))
    if ORDERED:
        if GROUP == GROUPS - 1:  # the first turn is that of group 0
            mbarrier.arrive(turn.index(0), count=1)
    mbarrier.wait(ready_q, 0)
    mbarrier.wait(ready_k.index(0), 0)
    zeros = gl.zeros((64, BLOCK_N), gl.float32, LAYOUT)
    keys = tiles_k.index(0).reshape((BLOCK_N, D)).permute((1, 0))
    x = warpgroup_mma(tile_q, keys, zeros, use_acc=False, is_async=True)
    x = warpgroup_mma_wait(0, deps=[x])
    gl.thread_barrier()
    mbarrier.arrive(free_k.index(0), count=1)
    j = (n - 1) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
    x = gl.where(j[None, :] < limit[:, None], x, -float("inf"))
    w, m, l, fade = softmax(x, m, l, scale)
    p = packed(w, o.dtype)
    edge = gl.maximum(n - full, 1)  # blocks of which some keys are hidden, the first one among them
    for step in range(1, edge):
        acc, m, l, p = advance(
            acc, m, l, p, tile_q, (tiles_k, tiles_v), (ready_k, ready_v), free, turn, step, limit,
            (n - 1 - step) * BLOCK_N, scale, BLOCK_N, D, STAGES, ORDERED, GROUP, GROUPS, True,
        )  # fmt: skip
    for step in range(edge, n):
        acc, m, l, p = advance(
            acc, m, l, p, tile_q, (tiles_k, tiles_v), (ready_k, ready_v), free, turn, step, limit,
            (n - 1 - step) * BLOCK_N, scale, BLOCK_N, D, STAGES, ORDERED, GROUP, GROUPS, False,
        )  # fmt: skip
    last = (n - 1) % STAGES
    mbarrier.wait(ready_v.index(last), (n - 1) // STAGES & 1)
    weights = unpacked(p, tiles_v.dtype, gl.DotOperandLayout(0, OUT, 2))
    acc = warpgroup_mma(weights, tiles_v.index(last).reshape((BLOCK_N, D)), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    empty = l == 0.0
    l = gl.where(empty, 1.0, l)
    total = gl.where(empty, -float("inf"), (m * scale + gl.log2(l)) * LN2)
    gl.store(lse.p + b.to(gl.int64) * lse.batch + h.to(gl.int64) * lse.head + r, total, mask=r < L)
    inverse = gl.convert_layout(gl.where(empty, 0.0, 1.0 / l), gl.SliceLayout(1, OUT), assert_trivial=True)
    empty = gl.convert_layout(empty, gl.SliceLayout(1, OUT), assert_trivial=True)
    acc = gl.where(empty[:, None], 0.0, acc * inverse[:, None])
    gl.thread_barrier()
    tile_q.store(acc.to(o.dtype))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(o, [b, h, first, 0], tiles_q.index(GROUP))
    tma.store_wait(0)


@gluon.jit
def warpgroups_kernel(
    q, k, v, o, lse, sizes, group, scale,
    CAUSAL: gl.constexpr, BOTTOM_RIGHT: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """One warp loads, groups of four warps compute 64 queries each."""
    B, Hq, G, L, S = sizes
    GROUPS: gl.constexpr = BLOCK_M // 64
    blocks = (L + BLOCK_M - 1) // BLOCK_M
    # as `place`
    at = gl.program_id(0)
    section = at // (blocks * group)
    at -= section * (blocks * group)
    size = gl.minimum(group, B * Hq - section * group)
    first = (blocks - 1 - at // size) * BLOCK_M
    head = section * group + at % size
    b = head // Hq
    h = head % Hq
    d = 0
    if BOTTOM_RIGHT:
        d = S - L
    hi = S
    full = S // BLOCK_N
    if CAUSAL:
        hi = gl.minimum(S, gl.maximum(gl.minimum(first + BLOCK_M, L) + d, 0))
        full = gl.minimum(full, gl.maximum(first + d + 1, 0) // BLOCK_N)
    n = gl.maximum((hi + BLOCK_N - 1) // BLOCK_N, 1)  # where no key is seen, one block is, wholly hidden
    scale = scale * LOG2E

    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    tiles_q = gl.allocate_shared_memory(q.dtype, [GROUPS] + q.block_type.shape, q.layout)
    tiles_k = gl.allocate_shared_memory(k.dtype, [STAGES] + k.block_type.shape, k.layout)
    tiles_v = gl.allocate_shared_memory(v.dtype, [STAGES] + v.block_type.shape, v.layout)
    ready_q = gl.allocate_shared_memory(gl.int64, [1], BAR)
    ready_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    ready_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    free_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    free_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    mbarrier.init(ready_q, 1)
    for s in gl.static_range(STAGES):
        mbarrier.init(ready_k.index(s), 1)
        mbarrier.init(ready_v.index(s), 1)
        mbarrier.init(free_k.index(s), GROUPS)
        mbarrier.init(free_v.index(s), GROUPS)
    turn = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], BAR)
    for g in gl.static_range(GROUPS):
        mbarrier.init(turn.index(g), 1)
    fence_async_shared()
    tiles = (tiles_q, tiles_k, tiles_v)
    ready = (ready_q, ready_k, ready_v)
    free = (free_k, free_v)
    work = (b, h, first, n, full, L, S, d, scale)
    loads = (b, h, h // G, first, n)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (consume, (o, lse, tiles, ready, free, turn, work, BLOCK_N, D, STAGES, CAUSAL, ORDERED, GROUPS, 0)),
                (consume, (o, lse, tiles, ready, free, turn, work, BLOCK_N, D, STAGES, CAUSAL, ORDERED, GROUPS, 1)),
                (produce, (q, k, v, tiles, ready, free, loads, BLOCK_N, STAGES, GROUPS)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.static_assert(GROUPS == 3)
        gl.warp_specialize(
            [
                (consume, (o, lse, tiles, ready, free, turn, work, BLOCK_N, D, STAGES, CAUSAL, ORDERED, GROUPS, 0)),
                (consume, (o, lse, tiles, ready, free, turn, work, BLOCK_N, D, STAGES, CAUSAL, ORDERED, GROUPS, 1)),
                (consume, (o, lse, tiles, ready, free, turn, work, BLOCK_N, D, STAGES, CAUSAL, ORDERED, GROUPS, 2)),
                (produce, (q, k, v, tiles, ready, free, loads, BLOCK_N, STAGES, GROUPS)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


def readable(x: Tensor) -> bool:
    """Whether TMA can read and write x."""
    aligned = all(s > 0 and s * x.element_size() % 16 == 0 for n, s in zip(x.shape[:-1], x.stride()) if n > 1)
    return x.stride(-1) == 1 and aligned and x.data_ptr() % 16 == 0


def fits(t, o, output: Tensor) -> bool:
    """Whether the kernels here compute this call of the op."""
    q, k, v = t.query, t.key, t.value
    extra = (t.mask, t.bias, t.alibi_slopes, t.sinks, t.cu_seqlens_q)
    if any(x is not None for x in extra) or o.softcap or o.dropout_p > 0 or o.scale <= 0:
        return False
    if o.window_left >= 0 or o.window_right > 0 or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    if q.shape[-1] not in CONFIGS or not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        return False
    return 0 not in (*q.shape, *k.shape) and all(readable(x) for x in (q, k, v, output))


def descriptor(x: Tensor, rows: int, block: int, laid_out: bool) -> TensorDescriptor | LaidOutDescriptor:
    """Of the first rows of x, read in blocks of one head; rows past them read 0 and are not written."""
    shape = [x.shape[0], x.shape[1], rows, x.shape[3]]
    strides = [s if n > 1 else 8 for n, s in zip(x.shape[:-1], x.stride())] + [1]
    tile = [1, 1, block, x.shape[3]]
    if not laid_out:
        return TensorDescriptor(x, shape, strides, tile)
    return LaidOutDescriptor(x, shape, strides, tile, gl.NVMMASharedLayout(128, 16, rank=4))


def forward_launch(t, o, output: Tensor, lse: Tensor, config: Config) -> Launch:
    """What `forward` launches: t and o are the op's arguments, output and lse the memory for its results."""
    q, k, v = t.query, t.key, t.value
    (B, Hq, L, D), (_, Hkv, S, _) = q.shape, k.shape
    causal = o.window_right == 0
    # Keys that no query sees may be NaN: they are past the end of the descriptors.
    seen = min(L, S) if causal and not o.bottom_right else S
    together = max(1, SHARED_KEYS // (2 * S * D * q.element_size())) * (Hq // Hkv)
    gluon_made = config.variant in ("warpgroups", "turns")
    rows = 64 if gluon_made else config.block_m
    arguments = dict(
        q=descriptor(q, L, rows, gluon_made),
        k=descriptor(k, seen, config.block_n, gluon_made),
        v=descriptor(v, seen, config.block_n, gluon_made),
        o=descriptor(output, L, rows, gluon_made),
        lse=RowValues(lse, lse.stride(0), lse.stride(1)),
        sizes=(B, Hq, Hq // Hkv, L, S),
        group=min(together, B * Hq),
        scale=o.scale,
        CAUSAL=causal,
        BOTTOM_RIGHT=o.bottom_right,
        D=D,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
    )
    kernel = tma_kernel
    if gluon_made:
        kernel = warpgroups_kernel
        arguments |= dict(STAGES=config.num_stages, ORDERED=config.variant == "turns")
    else:
        arguments |= dict(SPECIALIZED=config.variant == "specialized")
    if config.maxnreg:
        arguments["maxnreg"] = config.maxnreg
    programs = triton.cdiv(L, config.block_m) * Hq * B
    return Launch(kernel, programs, arguments, config.num_warps, config.num_stages)


def forward(t, o, output: Tensor, lse: Tensor, config: Config) -> None:
    """Writes output and lse of a call that `fits`."""
    run(forward_launch(t, o, output, lse, config))
