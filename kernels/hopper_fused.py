"""The kernels of `hopper_backward` in Gluon: which products are in flight at each point is said here.

Triton waits for each product whose result the same iteration uses before it begins the next. Here dw runs beside the
exponentials, dv beside ds, dk beside the additions to the sums of queries.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from seqkern.kernels.hopper_backward import AWAIT, TELL


@gluon.jit
def ask(p, seen, needed, least):
    return gl.inline_asm_elementwise(
        AWAIT, "=&r,l,r,r,r", [p, seen, needed, least], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def tell(p, done):
    gl.inline_asm_elementwise(TELL, "=r,l,r", [p, done], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def fetch(x, to, bars, at, stage, ok):
    """Begins to read blocks into a stage that no thread uses any more.

    All barriers first, or each read would wait for all threads.
    """
    gl.thread_barrier()
    for i in gl.static_range(len(x)):
        mbarrier.expect(bars[i].index(stage), x[i].block_type.nbytes, pred=ok)
    b, h, head, first = at
    for i in gl.static_range(len(x)):
        if i < 2:
            tma.async_copy_global_to_shared(
                x[i], [b, h, first, 0], bars[i].index(stage), to[i].index(stage), pred=ok
            )
        else:
            tma.async_copy_global_to_shared(
                x[i], [head, first], bars[i].index(stage), to[i].index(stage), pred=ok
            )


@gluon.constexpr_function
def shuffled(D, M, warps):
    """The layout of `add`: that of a product [D, M], a thread's registers in the order of the columns."""
    high = min(D // 16, warps)
    across = warps // high
    rows = [[16 << i, 0] for i in range(high.bit_length() - 1)]
    columns = [[0, M // across << i] for i in range(across.bit_length() - 1)]
    later = [[0, 16 << i] for i in range((M // across // 16).bit_length() - 1)]
    below = [[16 * high << i, 0] for i in range((D // 16 // high).bit_length() - 1)]
    registers = [[0, 1], [0, 2], [8, 0], *later, *below]
    return gl.DistributedLinearLayout(
        registers, [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], [*rows, *columns], [], [D, M]
    )


@gluon.jit
def add(p_sums, part, D: gl.constexpr, M: gl.constexpr):
    """Adds a tile [D, M] to sums whose columns lie so that a thread's four of sixteen are beside each other."""
    x = gl.reshape(part, (D, M // 16, 2, 4, 2))
    x = gl.reshape(gl.permute(x, (0, 1, 3, 2, 4)), (D, M))
    layout: gl.constexpr = shuffled(D, M, gl.num_warps())
    x = gl.convert_layout(x, layout)
    row = gl.arange(0, D, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, M, layout=gl.SliceLayout(0, layout))
    gl.atomic_add(p_sums + (row[:, None] * M + column[None, :]), x, sem="relaxed")


@gluon.jit
def last_key(column, first, S, CAUSAL: gl.constexpr):
    """The first key that queries do not see."""
    if CAUSAL:
        return gl.minimum(column + (first + 1), S)
    else:  # noqa: RET505 (both returns would be compiled)
        return S


@gluon.jit
def fused_kernel(
    q, k, v, g, dk, dv, sums, progress, lse, delta, sizes, padded, d, scale, scale_2, heads,
    CAUSAL: gl.constexpr, GPU: gl.constexpr, SLACK: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SUMS: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys and, with SUMS, its part of dq: the kernel of this name in `hopper_backward`.

    AHEAD: the next block's scores are begun before this one's products are awaited.
    """
    L, S, Hq, G = sizes
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = q.dtype
    TILE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    HIGH: gl.constexpr = D // 16 if D // 16 < WARPS else WARPS
    PART: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [HIGH, WARPS // HIGH], [16, BLOCK_M * HIGH // WARPS, 16]
    )
    WIDE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    ROW: gl.constexpr = gl.NVMMASharedLayout(0, 32, 1)

    blocks = gl.cdiv(S, BLOCK_N)
    Hkv = Hq // G
    at = gl.program_id(0)
    together = at // (heads * blocks) * heads
    some = gl.minimum(heads, gl.num_programs(0) // blocks - together)
    within = at - together * blocks
    block = within // some
    head_kv = together + within % some
    h_kv = head_kv % Hkv
    b = head_kv // Hkv
    start = block * BLOCK_N

    s_k = gl.allocate_shared_memory(dtype, [BLOCK_N, D], WIDE)
    s_v = gl.allocate_shared_memory(dtype, [BLOCK_N, D], WIDE)
    s_q = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D], WIDE)
    s_g = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D], WIDE)
    if SUMS:
        s_ds = gl.allocate_shared_memory(dtype, [BLOCK_N, BLOCK_M], WIDE)
    s_lse = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], ROW)
    s_delta = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], ROW)
    once = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    bars_q = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bars_g = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bars_lse = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bars_delta = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    passing = (q, g, lse, delta)
    into = (s_q, s_g, s_lse, s_delta)
    bars = (bars_q, bars_g, bars_lse, bars_delta)
    mbarrier.init(once, count=1)
    for i in gl.static_range(STAGES):
        for each in gl.static_range(4):
            mbarrier.init(bars[each].index(i), count=1)
    fence_async_shared()

    top = gl.cdiv(L, BLOCK_M) - 1
    count = top + 1  # blocks of queries of a head that see some of the keys, and those that see all of them
    full = count
    if CAUSAL:
        count -= gl.minimum(gl.maximum(start - d, 0) // BLOCK_M, count)
        full -= gl.minimum(gl.cdiv(gl.maximum(start + BLOCK_N - 1 - d, 0), BLOCK_M), full)
    if start + BLOCK_N > S:
        full = 0  # weights of keys past the end, zeros, may be infinite
    gl.static_assert(STAGES > 1)

    mbarrier.expect(once, k.block_type.nbytes + v.block_type.nbytes)
    tma.async_copy_global_to_shared(k, [b, h_kv, start, 0], once, s_k)
    tma.async_copy_global_to_shared(v, [b, h_kv, start, 0], once, s_v)
    last = h_kv * G + G  # heads of queries to come, and blocks of the one that is read
    h_next = h_kv * G
    n_next = 0
    if count == 0:
        h_next = last
    for i in gl.static_range(STAGES):
        fetch(passing, into, bars, (b, h_next, b * Hq + h_next, (top - n_next) * BLOCK_M), i, h_next < last)
        n_next += 1
        if n_next >= count:
            n_next = 0
            h_next += 1
    mbarrier.wait(once, 0)

    dkk = gl.zeros([BLOCK_N, D], gl.float32, OUT)
    dvv = gl.zeros([BLOCK_N, D], gl.float32, OUT)
    nothing = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, TILE)
    none = gl.zeros([D, BLOCK_M], gl.float32, PART)
    j = start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, TILE))[:, None]
    column = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, TILE))[None, :]
    if SUMS:
        p_own = progress + head_kv * blocks + block
    seen = gl.where(block > 0, 0, 2**30)  # the first never asks
    stage = 0
    phase = 0
    each = 0
    n = 0
    if AHEAD:
        mbarrier.wait(bars_q.index(0), 0, pred=count > 0)
        scores = warpgroup_mma(s_k, s_q.index(0).permute((1, 0)), nothing, use_acc=False)
    for t in tl.range(0, G * count, disable_licm=True):
        first = (top - n) * BLOCK_M
        head = b * Hq + h_kv * G + each
        done = each * (top + 1) + n
        qq = s_q.index(stage)
        gg = s_g.index(stage)
        if not AHEAD:
            mbarrier.wait(bars_q.index(stage), phase)
            x = warpgroup_mma(s_k, qq.permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(bars_g.index(stage), phase)
        dw = warpgroup_mma(s_v, gg.permute((1, 0)), nothing, use_acc=False, is_async=True)
        if SUMS:
            tell(p_own, done)
        if not AHEAD:
            scores = warpgroup_mma_wait(1, deps=[x])
        mbarrier.wait(bars_lse.index(stage), phase)
        p = gl.exp2(scores * scale_2 - s_lse.index(stage).load(gl.SliceLayout(0, TILE))[None, :])
        if n >= full:
            p = gl.where(j < last_key(column, first + d, S, CAUSAL), p, 0.0)
        w = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, OUT, 2))
        dvv = warpgroup_mma(w, gg, dvv, is_async=True)
        dw = warpgroup_mma_wait(1, deps=[dw])
        mbarrier.wait(bars_delta.index(stage), phase)
        ds = p * (dw - s_delta.index(stage).load(gl.SliceLayout(0, TILE))[None, :])
        if n >= full:
            ds = gl.where(j < last_key(column, first + d, S, CAUSAL), ds, 0.0)
        ds = ds.to(dtype)
        if SUMS:
            s_ds.store(ds)
            fence_async_shared()
            part = warpgroup_mma(s_k.permute((1, 0)), s_ds, none, use_acc=False, is_async=True)
        a = gl.convert_layout(ds, gl.DotOperandLayout(0, OUT, 2))
        dkk = warpgroup_mma(a, qq, dkk, is_async=True)
        read = stage
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
        if AHEAD:
            mbarrier.wait(bars_q.index(stage), phase, pred=t + 1 < G * count)
            x = warpgroup_mma(s_k, s_q.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        if SUMS:
            part, dvv = warpgroup_mma_wait(1 + AHEAD, deps=[part, dvv])
            seen = ask(p_own - 1, seen, done + 1, gl.minimum(done + 1 + SLACK, each * (top + 1) + count))
            add(sums + (head.to(gl.int64) * padded + first) * D, part, D, BLOCK_M)
        if AHEAD:
            dkk, dvv, scores = warpgroup_mma_wait(0, deps=[dkk, dvv, x])
        else:
            dkk, dvv = warpgroup_mma_wait(0, deps=[dkk, dvv])
        at_next = (b, h_next, b * Hq + h_next, (top - n_next) * BLOCK_M)
        fetch(passing, into, bars, at_next, read, h_next < last)
        n_next += 1
        if n_next == count:
            n_next = 0
            h_next += 1
        n += 1
        if n == count:
            n = 0
            each += 1
    if SUMS:
        tell(p_own, G * (top + 1))
    mbarrier.invalidate(once)
    for i in gl.static_range(STAGES):
        for each in gl.static_range(4):
            mbarrier.invalidate(bars[each].index(i))
    WRITE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    r = start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, WRITE))
    c = gl.arange(0, D, layout=gl.SliceLayout(0, WRITE))
    ok = (r < S)[:, None]
    at_dk = dk.p + b.to(gl.int64) * dk.batch + h_kv.to(gl.int64) * dk.head
    at_dv = dv.p + b.to(gl.int64) * dv.batch + h_kv.to(gl.int64) * dv.head
    at_dk += r.to(gl.int64)[:, None] * dk.row + c[None, :]
    at_dv += r.to(gl.int64)[:, None] * dv.row + c[None, :]
    gl.store(at_dv, gl.convert_layout(dvv.to(dtype), WRITE), mask=ok)
    gl.store(at_dk, gl.convert_layout((dkk * scale).to(dtype), WRITE), mask=ok)


@gluon.jit
def queries_kernel(
    q, k, v, g, dq, lse, delta, sizes, padded, d, scale, scale_2,
    CAUSAL: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq of a block of queries of one head. The next scores run beside the exponentials, dq into the next block."""
    L, S, Hq, G = sizes
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = q.dtype
    TILE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    WIDE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    blocks = gl.cdiv(L, BLOCK_M)
    at = gl.program_id(0)
    start = (blocks - 1 - at % blocks) * BLOCK_M  # those that see most keys begin first
    h = at // blocks % Hq
    b = at // blocks // Hq
    h_kv = h // G
    hi = S
    full = S // BLOCK_N
    if CAUSAL:
        hi = gl.minimum(S, gl.maximum(start + BLOCK_M + d, 0))
        full = gl.minimum(full, gl.maximum(start + d + 1, 0) // BLOCK_N)
    steps = gl.cdiv(hi, BLOCK_N)

    s_q = gl.allocate_shared_memory(dtype, [BLOCK_M, D], WIDE)
    s_g = gl.allocate_shared_memory(dtype, [BLOCK_M, D], WIDE)
    s_k = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], WIDE)
    s_v = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], WIDE)
    once = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    bars_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bars_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    passing = (k, v)
    into = (s_k, s_v)
    bars = (bars_k, bars_v)
    mbarrier.init(once, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(bars_k.index(i), count=1)
        mbarrier.init(bars_v.index(i), count=1)
    fence_async_shared()
    mbarrier.expect(once, q.block_type.nbytes + g.block_type.nbytes)
    tma.async_copy_global_to_shared(q, [b, h, start, 0], once, s_q)
    tma.async_copy_global_to_shared(g, [b, h, start, 0], once, s_g)
    for i in gl.static_range(STAGES - 1):
        fetch(passing, into, bars, (b, h_kv, 0, i * BLOCK_N), i, i < steps)
    r = start + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, TILE))
    column = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, TILE))[None, :]
    base = (b * Hq + h).to(gl.int64) * padded
    row_lse = gl.load(lse + (base + r))[:, None]
    row_delta = gl.load(delta + (base + r))[:, None]
    acc = warpgroup_mma_init(gl.zeros([BLOCK_M, D], gl.float32, OUT))
    nothing = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, TILE)
    mbarrier.wait(once, 0)
    mbarrier.wait(bars_k.index(0), 0, pred=steps > 0)
    scores = warpgroup_mma(s_q, s_k.index(0).permute((1, 0)), nothing, use_acc=False)
    stage = 0
    phase = 0
    for n in tl.range(0, steps, disable_licm=True):
        kk = s_k.index(stage)
        mbarrier.wait(bars_v.index(stage), phase)
        dw = warpgroup_mma(s_g, s_v.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        free = stage - 1
        if stage == 0:
            free = STAGES - 1
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
        mbarrier.wait(bars_k.index(stage), phase, pred=n + 1 < steps)
        x = warpgroup_mma(s_q, s_k.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        p = gl.exp2(scores * scale_2 - row_lse)
        dw, acc = warpgroup_mma_wait(1, deps=[dw, acc])
        ds = p * (dw - row_delta)
        if n >= full:
            j = column + n * BLOCK_N
            ds = gl.where(j < last_key(r[:, None], d, S, CAUSAL), ds, 0.0)
        a = gl.convert_layout(ds.to(dtype), gl.DotOperandLayout(0, OUT, 2))
        acc = warpgroup_mma(a, kk, acc, is_async=True)
        ahead = n + STAGES - 1
        fetch(passing, into, bars, (b, h_kv, 0, ahead * BLOCK_N), free, ahead < steps)
        scores = warpgroup_mma_wait(1, deps=[x])
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.invalidate(once)
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(bars_k.index(i))
        mbarrier.invalidate(bars_v.index(i))
    WRITE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    row = start + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, WRITE))
    c = gl.arange(0, D, layout=gl.SliceLayout(0, WRITE))
    at_dq = dq.p + b.to(gl.int64) * dq.batch + h.to(gl.int64) * dq.head
    at_dq += row.to(gl.int64)[:, None] * dq.row + c[None, :]
    gl.store(at_dq, gl.convert_layout((acc * scale).to(dtype), WRITE), mask=(row < L)[:, None])
