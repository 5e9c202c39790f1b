"""All steps in one launch where the weights fit on chip only spread over many multiprocessors.

Each program keeps the rows of the recurrent weights that belong to its units. After a step it publishes its part of h
(in the backward, of the gradients of the pre-activations), counts itself in, and waits until all programs of its tile
of sequences have done so. The launch is cooperative: the driver refuses a grid that cannot run at once, where waiting
would never end.

Sizes, layout and what None means are those of `seqkern.kernels.scan`, without a projection. The grid is (programs of a
tile of B, tiles of B, D). Persistent RNNs: Diamos et al. 2016.
"""

import triton
import triton.language as tl

from seqkern.kernels.scan import all_rows, load_before, neighbour_rows, step_rows, tile


@triton.jit
def wait_for(p_count, target):
    """Until all programs that share a counter have published what leads to the target."""
    seen = tl.atomic_add(p_count, 0, sem="acquire", scope="gpu")
    while seen < target:
        seen = tl.atomic_add(p_count, 0, sem="acquire", scope="gpu")


@triton.jit
def publish(p_count):
    tl.debug_barrier()  # what every thread has stored comes before the count
    tl.atomic_add(p_count, 1, sem="release", scope="gpu")


@triton.jit
def gates_of(x, G: tl.constexpr, SLOTS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr):
    """[SLOTS * H, B], a row of units for each gate and zeros where there is none -> a tile [H, B] for each gate."""
    if SLOTS == 1:
        found = (x,)
    else:
        y = tl.permute(tl.reshape(x, (2, 2, BLOCK_H, BLOCK_B)), (2, 3, 1, 0))
        low, high = tl.split(y)
        a, b = tl.split(low)
        c, d = tl.split(high)
        found = (a, b, c) if G == 3 else (a, b, c, d)
    return found


@triton.jit(do_not_specialize=["T", "B"])
def persistent_forward(
    p_x,  # [N, D*G*H] pre-activations of the input
    p_w,  # [D, tiles of H, SLOTS * BLOCK_H, CHUNKS * BLOCK_K] recurrent weights, padded with zeros
    p_b,  # [D, G*H] their bias, or None
    p_ring,  # [2, D, B, H] h before and after a step, in turn; first h in the first half
    p_c,  # [D, B, H] float32: c, first to last; None where the cell has none
    p_out,  # [N, D*H]
    p_reserve,  # [D, N, R, H] float32, or None
    p_starts,
    p_count,  # [D, tiles of B, 1 + programs of a tile, 32] int32 zeros, of which the first line of each tile serves
    T,
    B,
    H,
    FWD: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    APART: tl.constexpr,
    HAS_C: tl.constexpr,
    PRECISION: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    d = tl.program_id(2)
    D = tl.num_programs(2)
    programs = tl.num_programs(0)
    first_b = tl.program_id(1) * BLOCK_B
    o_b = tl.arange(0, BLOCK_B)
    o_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_k = tl.arange(0, BLOCK_K)
    o_row = tl.arange(0, SLOTS * BLOCK_H)
    m_h = (o_h < H)[:, None]
    m_b = (first_b + o_b < B)[None, :]
    N = all_rows(p_starts, T, B)
    p_count += (d * tl.num_programs(1) + tl.program_id(1)) * (1 + programs) * 32
    wide: tl.constexpr = CHUNKS * BLOCK_K
    p_rows = p_w + (d * programs + tl.program_id(0)).to(tl.int64) * (SLOTS * BLOCK_H * wide)
    w = ()
    for i in tl.static_range(CHUNKS):
        w = w + (tl.load(p_rows + o_row[:, None] * wide + i * BLOCK_K + o_k[None, :]),)
    bias = ()
    for g in tl.static_range(G):
        if p_b is not None:
            bias = bias + (tl.load(p_b + (d * G + g) * H + o_h, mask=o_h < H, other=0.0).to(tl.float32),)
    first = (d * B + first_b).to(tl.int64)
    size = (D * B).to(tl.int64) * H
    own = first * H + tile(H, o_h, o_b)
    h = tl.load(p_ring + own, mask=m_h & m_b, other=0.0)
    if HAS_C:
        state = (h.to(tl.float32), tl.load(p_c + own, mask=m_h & m_b, other=0.0))
    else:
        state = (h.to(tl.float32),)
    for k in range(T):
        t = k + d * (T - 1 - 2 * k)
        row, live = step_rows(p_starts, t, B)
        row += first_b
        m_live = (first_b + o_b < live)[None, :]
        x = ()
        for g in tl.static_range(G):
            p = p_x + row * (D * G * H) + (d * G + g) * H
            x = x + (tl.load(p + tile(D * G * H, o_h, o_b), mask=m_h & m_live, other=0.0),)
        wait_for(p_count, programs * k)
        p_old = p_ring + (k % 2) * size + first * H
        old = ()
        for i in tl.static_range(CHUNKS):
            p = p_old + i * BLOCK_K + tile(H, o_k, o_b)
            m_k = (i * BLOCK_K + o_k < H)[:, None]
            old = old + (tl.load(p, mask=m_k & m_b, other=0.0, cache_modifier=".cg"),)
        sums = tl.zeros((SLOTS * BLOCK_H, BLOCK_B), tl.float32)
        for i in tl.static_range(CHUNKS):
            sums = tl.dot(w[i], old[i], sums, input_precision=PRECISION)
        parts = gates_of(sums, G, SLOTS, BLOCK_H, BLOCK_B)
        r = ()
        for g in tl.static_range(G):
            r = r + (parts[g] + bias[g][:, None] if p_b is not None else parts[g],)
        pre = ()
        for g in tl.static_range(G):
            pre = pre + (x[g].to(tl.float32) if APART else x[g].to(tl.float32) + r[g],)
        after, reserve = FWD(pre, r, state)
        h_new = after[0].to(h.dtype)
        if p_starts is None:
            h = h_new
            state = after
        else:  # a sequence that has ended, or has not begun, keeps its state
            h = tl.where(m_live, h_new, h)
            kept = (tl.where(m_live, after[0], state[0]),)
            if HAS_C:
                kept = kept + (tl.where(m_live, after[1], state[1]),)
            state = kept
        tl.store(p_ring + ((k + 1) % 2) * size + own, h, mask=m_h & m_b)
        publish(p_count)
        tl.store(p_out + row * (D * H) + d * H + tile(D * H, o_h, o_b), h_new, mask=m_h & m_live)
        if p_reserve is not None:
            for i in tl.static_range(R):
                p = p_reserve + (d * N + row) * (R * H) + i * H
                tl.store(p + tile(R * H, o_h, o_b), reserve[i], mask=m_h & m_live)
    if HAS_C:
        tl.store(p_c + own, state[1], mask=m_h & m_b)


@triton.jit(do_not_specialize=["T", "B"])
def persistent_backward(
    p_w,  # [D, tiles of H, SLOTS, ROWS, CHUNKS * BLOCK_K]: for each gate its weights transposed, padded with zeros
    p_g,  # [N, D*H] gradient of the output
    p_h,  # [D, B, H] first h, read where APART
    p_c,  # [D, B, H] first c, or None
    p_out,  # [N, D*H]
    p_reserve,  # [D, N, R, H] float32, or None where R is 0
    p_dh,  # [D, B, H] float32: gradient of the last h; where APART left as what of the first's passes by the matmul
    p_dc,  # [D, B, H] float32: gradient of the last c, to that of the first; or None
    p_dx,  # [N, D*G*H]
    p_dr,  # [N, D*G*H] gradient of the recurrent pre-activations, which may be p_dx
    p_part,  # [D, tiles of B, tiles of H, SLOTS, ROWS, BLOCK_B] float32, or None where SLOTS is 1
    p_starts,
    p_count,  # [D, tiles of B, 1 + programs of a tile, 32] int32 zeros
    T,
    B,
    H,
    BWD: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    APART: tl.constexpr,
    HAS_C: tl.constexpr,
    PRECISION: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The steps of `persistent_forward` in the opposite order.

    SLOTS programs share a tile of ROWS units: each multiplies the gradients of one gate, then sums what all have found
    for BLOCK_H of the units and runs the cell on them. Grid: (SLOTS * tiles of H, tiles of B, D).
    """
    ROWS: tl.constexpr = SLOTS * BLOCK_H
    d = tl.program_id(2)
    D = tl.num_programs(2)
    programs = tl.num_programs(0)
    slot = tl.program_id(0) % SLOTS
    at = tl.program_id(0) // SLOTS
    first_b = tl.program_id(1) * BLOCK_B
    o_b = tl.arange(0, BLOCK_B)
    o_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_k = tl.arange(0, BLOCK_K)
    o_row = tl.arange(0, ROWS)
    m_h = (o_h < H)[:, None]
    m_b = (first_b + o_b < B)[None, :]
    N = all_rows(p_starts, T, B)
    dtype: tl.constexpr = p_w.dtype.element_ty
    tiles = programs // SLOTS
    group = d * tl.num_programs(1) + tl.program_id(1)
    p_count += group * (1 + programs) * 32
    p_near = p_count + (1 + at) * 32  # of the programs that share a tile of units
    wide: tl.constexpr = CHUNKS * BLOCK_K
    p_rows = p_w + (d * programs + tl.program_id(0)).to(tl.int64) * (ROWS * wide)
    w = ()
    for i in tl.static_range(CHUNKS):
        w = w + (tl.load(p_rows + o_row[:, None] * wide + i * BLOCK_K + o_k[None, :]),)
    if SLOTS > 1:
        p_tile = p_part + (group * tiles + at).to(tl.int64) * (SLOTS * ROWS * BLOCK_B)
    first = (d * B + first_b).to(tl.int64)
    own = first * H + tile(H, o_h, o_b)
    last = tl.load(p_dh + own, mask=m_h & m_b, other=0.0)
    carried = last  # what passes by the matmul, where APART
    if HAS_C:
        dc = tl.load(p_dc + own, mask=m_h & m_b, other=0.0)
    for k in range(T):
        t = T - 1 - k - d * (T - 1 - 2 * k)
        row, live = step_rows(p_starts, t, B)
        row += first_b
        m_live = (first_b + o_b < live)[None, :]
        mask = m_h & m_live
        before, held = neighbour_rows(p_starts, t - 1 + 2 * d, T, B)
        before += first_b
        m_before = first_b + o_b < held
        after, reached = neighbour_rows(p_starts, t + 1 - 2 * d, T, B)
        after += first_b
        m_after = (first_b + o_b < tl.minimum(reached, live))[None, :]
        p = p_g + row * (D * H) + d * H
        dh = tl.load(p + tile(D * H, o_h, o_b), mask=mask, other=0.0).to(tl.float32)
        reserve = ()
        if R == 0:
            p = p_out + row * (D * H) + d * H
            reserve = (tl.load(p + tile(D * H, o_h, o_b), mask=mask, other=0.0).to(tl.float32),)
        else:
            for i in tl.static_range(R):
                p = p_reserve + (d * N + row) * (R * H) + i * H
                reserve = reserve + (tl.load(p + tile(R * H, o_h, o_b), mask=mask, other=0.0),)
        state = (dh,)
        if APART:
            p = p_out + before * (D * H) + d * H + tile(D * H, o_h, o_b)
            state = (load_before(p, p_h + own, mask, m_before),)
        if HAS_C:
            p = p_reserve + (d * N + before) * (R * H) + (R - 1) * H + tile(R * H, o_h, o_b)
            state = state + (load_before(p, p_c + own, mask, m_before),)
        wait_for(p_count, programs * k)
        p = p_dr + after * (D * G * H) + (d * G + slot) * H
        old = ()
        for i in tl.static_range(CHUNKS):
            m_k = ((i * BLOCK_K + o_k < H) & (slot < G))[:, None]
            p_k = p + i * BLOCK_K + tile(D * G * H, o_k, o_b)
            old = old + (tl.load(p_k, mask=m_k & m_after, other=0.0, cache_modifier=".cg"),)
        part = tl.zeros((ROWS, BLOCK_B), tl.float32)
        for i in tl.static_range(CHUNKS):
            part = tl.dot(w[i], old[i], part, input_precision=PRECISION)
        if SLOTS == 1:
            dh += part
        else:
            tl.store(p_tile + (slot * ROWS + o_row[:, None]) * BLOCK_B + o_b[None, :], part)
            publish(p_near)
            wait_for(p_near, SLOTS * (k + 1))
            o_own = slot * BLOCK_H + tl.arange(0, BLOCK_H)
            for g in tl.static_range(G):
                p = p_tile + (g * ROWS + o_own[:, None]) * BLOCK_B + o_b[None, :]
                dh += tl.load(p, cache_modifier=".cg")
        # A sequence's last step has nothing after it but the gradient of its last h.
        if APART:
            dh += carried
        else:
            dh += tl.where(m_after, 0.0, last)
        dstate = (dh,)
        if HAS_C:
            dstate = (dh, dc)
        dx, dr, rest = BWD(reserve, state, dstate)
        for g in tl.static_range(G):
            o_x = row * (D * G * H) + (d * G + g) * H + tile(D * G * H, o_h, o_b)
            tl.store(p_dr + o_x, dr[g].to(dtype), mask=mask)
        publish(p_count)
        if APART:
            for g in tl.static_range(G):
                o_x = row * (D * G * H) + (d * G + g) * H + tile(D * G * H, o_h, o_b)
                tl.store(p_dx + o_x, dx[g].to(dtype), mask=mask)
            carried = tl.where(m_live, rest[0], carried)
        if HAS_C:
            dc = tl.where(m_live, rest[1], dc)
    if APART:
        tl.store(p_dh + own, carried, mask=m_h & m_b)
    if HAS_C:
        tl.store(p_dc + own, dc, mask=m_h & m_b)
