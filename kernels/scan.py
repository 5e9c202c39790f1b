"""A whole sequence in one launch, for every cell: forward and backward.

Tiles are [units, sequences]: weights are the left side of each matmul, so that their rows fill the 64 that a Hopper
warp group takes at once, however small the batch is. Sizes: T steps, B sequences, N rows, D directions, G gates, R
tiles in reserve, H hidden units, P outputs (H, or LSTM's projection). Every pointer is to a contiguous tensor of the
shape in its comment; what a launcher leaves out is None, and the kernel is compiled without it. The second direction
runs from the last step to the first.

Offsets are a scalar in int64, which reaches any row, and within a tile int32, which saves registers.
"""

import triton
import triton.language as tl


@triton.jit
def step_rows(p_starts, t, B):
    """The first row of step t, and how many sequences it holds."""
    if p_starts is None:
        row = t.to(tl.int64) * B
        held = B
    else:
        row = tl.load(p_starts + t)
        held = (tl.load(p_starts + t + 1) - row).to(tl.int32)
    return row, held


@triton.jit
def neighbour_rows(p_starts, t, T, B):
    """`step_rows` of a step that may lie outside the sequence, where none is held."""
    row, held = step_rows(p_starts, tl.minimum(tl.maximum(t, 0), T - 1), B)
    return row, tl.where((t >= 0) & (t < T), held, 0)


@triton.jit
def all_rows(p_starts, T, B):
    if p_starts is None:
        rows = T.to(tl.int64) * B
    else:
        rows = tl.load(p_starts + T)
    return rows


@triton.jit
def tile(width, o_f, o_b):
    """Offsets [F, B] of features in rows of so many numbers."""
    return o_b[None, :] * width + o_f[:, None]


@triton.jit
def load_weight(p_w, index, o_row, o_col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """One of the matrices [ROWS, COLS] that lie in a row, read in either order of its axes."""
    return tl.load(p_w + index.to(tl.int64) * (ROWS * COLS) + o_row * COLS + o_col)


@triton.jit
def load_before(p_rows, p_first, mask, m_there):
    """A state before a step, in float32: from the rows of its neighbour, or the first state where there is none."""
    there = tl.load(p_rows, mask=mask & m_there[None, :], other=0.0).to(tl.float32)
    first = tl.load(p_first, mask=mask & ~m_there[None, :], other=0.0).to(tl.float32)
    return tl.where(m_there[None, :], there, first)


@triton.jit(do_not_specialize=["T", "B"])
def sequence_forward(
    p_x,  # [N, D*G*H] pre-activations of the input
    p_w,  # [D, G, BLOCK_H, BLOCK_P] recurrent weights, padded with zeros
    p_b,  # [D, G*H] their bias, or None
    p_whr,  # [D, BLOCK_P, BLOCK_H] the projection, padded, or None
    p_h,  # [D, B, P] first h
    p_c,  # [D, B, H] float32: c, first to last; None where the cell has none
    p_out,  # [N, D*P]
    p_reserve,  # [D, N, R, H] float32, or None where nothing is kept
    p_starts,  # [T + 1] int64: first row of each step of a packed input, or None
    T,
    B,
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
    BLOCK_P: tl.constexpr,
):
    """All steps of BLOCK_B sequences in one direction, the weights staying on chip. Grid: (tiles of B, D)."""
    d = tl.program_id(1)
    D = tl.num_programs(1)
    first_b = tl.program_id(0) * BLOCK_B
    o_b = tl.arange(0, BLOCK_B)
    o_h = tl.arange(0, BLOCK_H)
    o_p = tl.arange(0, BLOCK_P)
    m_h = (o_h < H)[:, None]
    m_p = (o_p < P)[:, None]
    m_b = (first_b + o_b < B)[None, :]
    N = all_rows(p_starts, T, B)
    dtype: tl.constexpr = p_w.dtype.element_ty
    w = ()
    bias = ()
    for g in tl.static_range(G):
        w = w + (load_weight(p_w, d * G + g, o_h[:, None], o_p[None, :], BLOCK_H, BLOCK_P),)  # [H, P]
        if p_b is not None:
            bias = bias + (tl.load(p_b + (d * G + g) * H + o_h, mask=o_h < H, other=0.0).to(tl.float32),)
    if p_whr is not None:
        w_hr = load_weight(p_whr, d, o_p[:, None], o_h[None, :], BLOCK_P, BLOCK_H)  # [P, H]
    first = (d * B + first_b).to(tl.int64)
    h = tl.load(p_h + first * P + tile(P, o_p, o_b), mask=m_p & m_b, other=0.0)  # [P, B]
    if HAS_C:
        c = tl.load(p_c + first * H + tile(H, o_h, o_b), mask=m_h & m_b, other=0.0)
        state = (tl.zeros((BLOCK_H, BLOCK_B), tl.float32), c)  # lstm does not read h beside its matmul
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
        r = ()
        for g in tl.static_range(G):
            start = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
            if p_b is not None:
                start += bias[g][:, None]
            r = r + (tl.dot(w[g], h, start, input_precision=PRECISION),)
        pre = ()
        for g in tl.static_range(G):
            if APART:
                pre = pre + (x[g].to(tl.float32),)
            else:
                pre = pre + (x[g].to(tl.float32) + r[g],)
        after, reserve = FWD(pre, r, state)
        h_new = after[0].to(dtype)
        if p_whr is not None:
            h_new = tl.dot(w_hr, h_new, input_precision=PRECISION).to(dtype)
        tl.store(p_out + row * (D * P) + d * P + tile(D * P, o_p, o_b), h_new, mask=m_p & m_live)
        if p_reserve is not None:
            for i in tl.static_range(R):
                p = p_reserve + (d * N + row) * (R * H) + i * H
                tl.store(p + tile(R * H, o_h, o_b), reserve[i], mask=m_h & m_live)
        if p_starts is None:
            h = h_new
            state = after
        else:  # a sequence that has ended, or has not begun, keeps its state
            h = tl.where(m_live, h_new, h)
            kept = (tl.where(m_live, after[0], state[0]),)
            if HAS_C:
                kept = kept + (tl.where(m_live, after[1], state[1]),)
            state = kept
    if HAS_C:
        tl.store(p_c + first * H + tile(H, o_h, o_b), state[1], mask=m_h & m_b)


@triton.jit(do_not_specialize=["T", "B"])
def sequence_backward(
    p_g,  # [N, D*P] gradient of the output; where projected, left as the whole gradient of h
    p_w,  # [D, G, BLOCK_H, BLOCK_P], padded
    p_whr,  # [D, BLOCK_P, BLOCK_H], padded, or None
    p_h,  # [D, B, P] first h
    p_c,  # [D, B, H] first c, or None
    p_out,  # [N, D*P]
    p_reserve,  # [D, N, R, H], or None where R is 0
    p_dh,  # [D, B, P] float32: gradient of the last h, to that of the first
    p_dc,  # [D, B, H] float32: the same of c, or None
    p_dx,  # [N, D*G*H] gradient of the pre-activations of the input
    p_dr,  # [N, D*G*H] and of the recurrence, or None where they are one
    p_starts,
    T,
    B,
    H,
    P,
    BWD: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    APART: tl.constexpr,
    HAS_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The steps of `sequence_forward` in the opposite order. Grid: (tiles of B, D)."""
    d = tl.program_id(1)
    D = tl.num_programs(1)
    first_b = tl.program_id(0) * BLOCK_B
    o_b = tl.arange(0, BLOCK_B)
    o_h = tl.arange(0, BLOCK_H)
    o_p = tl.arange(0, BLOCK_P)
    m_h = (o_h < H)[:, None]
    m_p = (o_p < P)[:, None]
    m_b = (first_b + o_b < B)[None, :]
    N = all_rows(p_starts, T, B)
    dtype: tl.constexpr = p_w.dtype.element_ty
    w = ()
    for g in tl.static_range(G):
        w = w + (load_weight(p_w, d * G + g, o_h[None, :], o_p[:, None], BLOCK_H, BLOCK_P),)  # [P, H]
    if p_whr is not None:
        w_hr = load_weight(p_whr, d, o_p[None, :], o_h[:, None], BLOCK_P, BLOCK_H)  # [H, P]
    first = (d * B + first_b).to(tl.int64)
    dh = tl.load(p_dh + first * P + tile(P, o_p, o_b), mask=m_p & m_b, other=0.0)  # [P, B]
    if HAS_C:
        dc = tl.load(p_dc + first * H + tile(H, o_h, o_b), mask=m_h & m_b, other=0.0)
    for k in range(T):
        t = T - 1 - k - d * (T - 1 - 2 * k)
        row, live = step_rows(p_starts, t, B)
        row += first_b
        m_live = (first_b + o_b < live)[None, :]
        before, held = neighbour_rows(p_starts, t - 1 + 2 * d, T, B)
        before += first_b
        m_there = first_b + o_b < held
        p = p_g + row * (D * P) + d * P + tile(D * P, o_p, o_b)
        total = dh + tl.load(p, mask=m_p & m_live, other=0.0).to(tl.float32)
        reserve = ()
        if R == 0:
            p_r = p_out + row * (D * P) + d * P
            reserve = (tl.load(p_r + tile(D * P, o_h, o_b), mask=m_h & m_live, other=0.0).to(tl.float32),)
        else:
            for i in tl.static_range(R):
                p_r = p_reserve + (d * N + row) * (R * H) + i * H
                reserve = reserve + (tl.load(p_r + tile(R * H, o_h, o_b), mask=m_h & m_live, other=0.0),)
        state = (tl.zeros((BLOCK_H, BLOCK_B), tl.float32),)
        if APART:
            state = (
                load_before(
                    p_out + before * (D * P) + d * P + tile(D * P, o_h, o_b),
                    p_h + first * P + tile(P, o_h, o_b),
                    m_h & m_live,
                    m_there,
                ),
            )
        if HAS_C:
            state = state + (
                load_before(
                    p_reserve + (d * N + before) * (R * H) + (R - 1) * H + tile(R * H, o_h, o_b),
                    p_c + first * H + tile(H, o_h, o_b),
                    m_h & m_live,
                    m_there,
                ),
            )
        if p_whr is None:
            dstate = (total,)
        else:
            narrow = total.to(dtype)
            tl.debug_barrier()  # several threads may hold one number: all must have read it before one writes
            tl.store(p, narrow, mask=m_p & m_live)
            dstate = (tl.dot(w_hr, narrow, input_precision=PRECISION),)
        if HAS_C:
            dstate = dstate + (dc,)
        dx, dr, dstate = BWD(reserve, state, dstate)
        if p_whr is None:
            passed = dstate[0]
        else:
            passed = tl.zeros((BLOCK_P, BLOCK_B), tl.float32)
        for g in tl.static_range(G):
            narrow = dr[g].to(dtype)
            o_x = row * (D * G * H) + (d * G + g) * H
            tl.store(p_dx + o_x + tile(D * G * H, o_h, o_b), dx[g].to(dtype), mask=m_h & m_live)
            if APART:
                tl.store(p_dr + o_x + tile(D * G * H, o_h, o_b), narrow, mask=m_h & m_live)
            passed = tl.dot(w[g], narrow, passed, input_precision=PRECISION)
        # A sequence that has not been reached keeps the gradient of its last state.
        dh = passed if p_starts is None else tl.where(m_live, passed, dh)
        if HAS_C:
            dc = dstate[1] if p_starts is None else tl.where(m_live, dstate[1], dc)
    tl.store(p_dh + first * P + tile(P, o_p, o_b), dh, mask=m_p & m_b)
    if HAS_C:
        tl.store(p_dc + first * H + tile(H, o_h, o_b), dc, mask=m_h & m_b)
