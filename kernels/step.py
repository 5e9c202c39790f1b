"""One time step in one launch, for every cell and any size: recurrent matmul, pre-activations and cell together.

Sizes, layout and what None means are those of `seqkern.kernels.scan`. The grid of both is (tiles of B, tiles of H, D).
"""

import triton
import triton.language as tl

from seqkern.kernels.scan import all_rows, load_before, neighbour_rows, step_rows, tile


@triton.jit
def add_matmul(
    sums,
    p_w,  # rows [G*H, K] of one direction
    p_v,  # [B, K] with rows so far apart
    stride,
    o_h,
    o_b,
    m_v,
    H,
    K,
    G: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Adds W_g v to the sum [H, B] of each gate."""
    o_k = tl.arange(0, BLOCK_K)
    for start in range(0, K, BLOCK_K):
        left = K - start
        v = tl.load(p_v + start + tile(stride, o_k, o_b), mask=(o_k < left)[:, None] & m_v, other=0.0)
        added = ()
        for g in tl.static_range(G):
            p = p_w + (g * H + o_h).to(tl.int64)[:, None] * K + (start + o_k)[None, :]
            w = tl.load(p, mask=(o_h < H)[:, None] & (o_k < left)[None, :], other=0.0)
            added = added + (tl.dot(w, v, sums[g], input_precision=PRECISION),)
        sums = added
    return sums


@triton.jit
def start_sums(p_b, o_h, H, G: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr):
    """A sum [H, B] for each gate: its bias, or zeros."""
    sums = ()
    for g in tl.static_range(G):
        start = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
        if p_b is not None:
            start += tl.load(p_b + g * H + o_h, mask=o_h < H, other=0.0).to(tl.float32)[:, None]
        sums = sums + (start,)
    return sums


@triton.jit(do_not_specialize=["k", "T", "B"])
def step_forward(
    p_x,  # [N, D*G*H] pre-activations of the input, or where p_wih is given the input itself [B, I]
    p_wih,  # [G*H, I], or None
    p_bih,  # [G*H], or None
    p_w,  # [D, G*H, P] recurrent weights
    p_b,  # [D, G*H], or None
    p_h,  # [D, B, P] h before the step
    p_c,  # [D, B, H] the state the cell reads: c, or where APART h; None where it reads none
    p_h_new,  # [D, B, H] h after the step, before a projection
    p_c_new,  # [D, B, H] the state after the step, which may be p_c, or None
    p_out,  # [N, D*H] h after the step once more, or None
    p_reserve,  # [D, N, R, H] float32, or None
    p_starts,
    k,  # the number of steps that went before
    T,
    B,
    I,
    H,
    P,
    FWD: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    APART: tl.constexpr,
    HAS_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    d = tl.program_id(2)
    D = tl.num_programs(2)
    first_b = tl.program_id(0) * BLOCK_B
    o_b = tl.arange(0, BLOCK_B)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    t = k + d * (T - 1 - 2 * k)
    row, live = step_rows(p_starts, t, B)
    row += first_b
    if first_b < live:
        m_b = (first_b + o_b < live)[None, :]
        mask = (o_h < H)[:, None] & m_b
        first = (d * B + first_b).to(tl.int64)
        p_gates = p_w + (d * G * H).to(tl.int64) * P
        start = p_b
        if p_b is not None:
            start = p_b + d * G * H
        r = start_sums(start, o_h, H, G, BLOCK_H, BLOCK_B)
        r = add_matmul(r, p_gates, p_h + first * P, P, o_h, o_b, m_b, H, P, G, PRECISION, BLOCK_K)
        x = ()
        if p_wih is not None:
            x = start_sums(p_bih, o_h, H, G, BLOCK_H, BLOCK_B)
            x = add_matmul(x, p_wih, p_x + first * I, I, o_h, o_b, m_b, H, I, G, PRECISION, BLOCK_K)
        else:
            for g in tl.static_range(G):
                p = p_x + row * (D * G * H) + (d * G + g) * H
                x = x + (tl.load(p + tile(D * G * H, o_h, o_b), mask=mask, other=0.0).to(tl.float32),)
        pre = ()
        for g in tl.static_range(G):
            pre = pre + (x[g] if APART else x[g] + r[g],)
        if p_c is not None:
            held = tl.load(p_c + first * H + tile(H, o_h, o_b), mask=mask, other=0.0).to(tl.float32)
            state = (held, held)  # the cell reads the one of the two that it has
        else:
            state = (r[0], r[0])
        after, reserve = FWD(pre, r, state)
        h = after[0].to(p_h_new.dtype.element_ty)
        tl.store(p_h_new + first * H + tile(H, o_h, o_b), h, mask=mask)
        if p_out is not None:
            tl.store(p_out + row * (D * H) + d * H + tile(D * H, o_h, o_b), h, mask=mask)
        if p_c_new is not None:
            tl.debug_barrier()  # several threads may hold one number of p_c: all must have read it before one writes
            kept = (after[1] if HAS_C else after[0]).to(p_c_new.dtype.element_ty)
            tl.store(p_c_new + first * H + tile(H, o_h, o_b), kept, mask=mask)
        if p_reserve is not None:
            N = all_rows(p_starts, T, B)
            for i in tl.static_range(R):
                p = p_reserve + (d * N + row) * (R * H) + i * H
                tl.store(p + tile(R * H, o_h, o_b), reserve[i], mask=mask)


@triton.jit(do_not_specialize=["k", "T", "B"])
def step_backward(
    p_m,  # [D, K, H]: the recurrent weights, K = G*H, or where p_g is None the projection, K = P
    p_v,  # [N, D*K]: gradients of the recurrent pre-activations, or of the projected h
    p_g,  # [N, D*H] gradient of the output, or None where projected
    p_h,  # [D, B, H] first h, read where APART
    p_c,  # [D, B, H] first c, or None
    p_out,  # [N, D*H], or None where projected
    p_reserve,  # [D, N, R, H] float32, or None where R is 0
    p_dh,  # [D, B, H] float32: gradient of the last h, and where APART what of dh passes by the matmul; or None
    p_dc,  # [D, B, H] float32, or None
    p_dx,  # [N, D*G*H]
    p_dr,  # [N, D*G*H], or None where it is p_dx
    p_starts,
    k,  # the number of steps that went before
    T,
    B,
    K,
    H,
    BWD: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    APART: tl.constexpr,
    HAS_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient that reaches h from the step that was taken after it, then the cell."""
    d = tl.program_id(2)
    D = tl.num_programs(2)
    first_b = tl.program_id(0) * BLOCK_B
    o_b = tl.arange(0, BLOCK_B)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_k = tl.arange(0, BLOCK_K)
    t = T - 1 - k - d * (T - 1 - 2 * k)
    row, live = step_rows(p_starts, t, B)
    row += first_b
    if first_b < live:
        m_h = (o_h < H)[:, None]
        mask = m_h & (first_b + o_b < live)[None, :]
        before, held = neighbour_rows(p_starts, t - 1 + 2 * d, T, B)
        before += first_b
        m_before = first_b + o_b < held
        after, reached = neighbour_rows(p_starts, t + 1 - 2 * d, T, B)
        after += first_b
        m_after = (first_b + o_b < tl.minimum(reached, live))[None, :]
        first = (d * B + first_b).to(tl.int64)
        N = all_rows(p_starts, T, B)
        if p_g is None:
            after = row
            m_after = (first_b + o_b < live)[None, :]
        dh = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
        for start in range(0, K, BLOCK_K):
            left = K - start
            p = p_v + after * (D * K) + d * K + start
            v = tl.load(p + tile(D * K, o_k, o_b), mask=(o_k < left)[:, None] & m_after, other=0.0)
            p = p_m + ((d * K + start).to(tl.int64) + o_k)[None, :] * H + o_h[:, None]
            m = tl.load(p, mask=(o_k < left)[None, :] & m_h, other=0.0)
            dh = tl.dot(m, v, dh, input_precision=PRECISION)
        if p_g is not None:
            p = p_g + row * (D * H) + d * H
            dh += tl.load(p + tile(D * H, o_h, o_b), mask=mask, other=0.0).to(tl.float32)
        if p_dh is not None:
            p = p_dh + first * H + tile(H, o_h, o_b)
            dh += tl.load(p, mask=mask if APART else mask & ~m_after, other=0.0)
        reserve = ()
        if R == 0:
            p = p_out + row * (D * H) + d * H
            reserve = (tl.load(p + tile(D * H, o_h, o_b), mask=mask, other=0.0).to(tl.float32),)
        else:
            for i in tl.static_range(R):
                p = p_reserve + (d * N + row) * (R * H) + i * H
                reserve = reserve + (tl.load(p + tile(R * H, o_h, o_b), mask=mask, other=0.0),)
        state = (dh, dh)  # read where neither branch below is taken: not at all
        dstate = (dh, dh)
        if APART:
            h = load_before(
                p_out + before * (D * H) + d * H + tile(D * H, o_h, o_b),
                p_h + first * H + tile(H, o_h, o_b),
                mask,
                m_before,
            )
            state = (h, h)
        if HAS_C:
            p = p_reserve + (d * N + before) * (R * H) + (R - 1) * H
            c = load_before(p + tile(R * H, o_h, o_b), p_c + first * H + tile(H, o_h, o_b), mask, m_before)
            state = (c, c)
            p = p_dc + first * H + tile(H, o_h, o_b)
            dstate = (dh, tl.load(p, mask=mask, other=0.0))
        dx, dr, passed = BWD(reserve, state, dstate)
        for g in tl.static_range(G):
            o_x = row * (D * G * H) + (d * G + g) * H + tile(D * G * H, o_h, o_b)
            tl.store(p_dx + o_x, dx[g].to(p_dx.dtype.element_ty), mask=mask)
            if APART:
                tl.store(p_dr + o_x, dr[g].to(p_dr.dtype.element_ty), mask=mask)
        if APART or HAS_C:
            tl.debug_barrier()  # as in step_forward, for p_dh and p_dc
        if APART:
            tl.store(p_dh + first * H + tile(H, o_h, o_b), passed[0], mask=mask)
        if HAS_C:
            tl.store(p_dc + first * H + tile(H, o_h, o_b), passed[1], mask=mask)
