// Backward scan, in chunks of time: the steps of a chunk leave the gradients of the pre-activations ("gates")
// behind, then the gradients of weights and input are matmuls over the whole chunk.
#pragma once

#include "scan_gradients.h"

namespace seqkern {
namespace SEQKERN_ISA {

// Depth of the weight gradients' matmul; 14 columns of it fit in L1.
constexpr long BACKWARD_CHUNK_ROWS = 512;

template <class CellT, class A, class S>
struct BackwardScan : Gradients<A, S> {
    using Base = Gradients<A, S>;
    using Base::bias_gradient, Base::block_gradient, Base::copy_out, Base::emit, Base::multiply,
        Base::multiply_row, Base::pack_block, Base::pack_panels, Base::pack_weights, Base::result,
        Base::rounded, Base::start_state, Base::weights_of;
    using Base::n, Base::PW, Base::NATIVE, Base::PAIRS;
    using typename Base::E, typename Base::F, typename Base::Weights;
    using Sh = Shape<CellT, A>;
    static constexpr int G = Sh::G;
    static constexpr int KEPT =
        G + CellT::APART;  // a cell that keeps x and r apart differs in its last gate only

    const BackwardCall& c;
    Sh s;
    long ld_gates, chunk,
        K;  // columns kept: APART [n_x, first gates.., n_r], so that both sides are G H in a row
    struct {
        Weights w_ih, w_hh, w_hr;
        A *carry, *dc;    // [B][ld]: gradients of the states between two steps
        E *gates, *dh;    // [chunk][ld]; dh only where projected
        E *x, *h, *full;  // [panel][chunk][PW]: inputs, previous states, unprojected outputs
        A *d_w_ih, *d_w_hh, *d_w_hr, *d_b_ih, *d_b_hh;  // the results, or float ones to be rounded at the end
    } d[2];
    A* d_input;
    bool projected, weights;
    bool at_once;  // the weights' gradients are of one chunk and rounded as they come, with no sums to keep

    struct Chunk {
        long begin, end, row, rows;  // time steps; first row and number of rows
    };

    BackwardScan(const BackwardCall& call, Arena& arena) : c(call), s(call) {
        ld_gates = KEPT * c.H + (n - KEPT * c.H % n) % n + 3 * n;  // pack_block reads past the last column
        chunk = whole_steps<E>(min_of(max_of(BACKWARD_CHUNK_ROWS, c.B), c.N));
        K = G * c.H;
        projected = c.weights[0].w_hr != nullptr;
        weights = c.d_weights[0].w_ih != nullptr;
        at_once = !NATIVE && c.N <= chunk;
        d_input = c.D == 1 ? nullptr : result(arena, c.d_input, c.N * c.I);
        for (int i = 0; i < c.D; ++i) {
            const auto& out = c.d_weights[i];
            if (c.d_input) d[i].w_ih = weights_of(arena, c.weights[i].w_ih, K, c.I, c.N);
            d[i].w_hh = weights_of(arena, c.weights[i].w_hh, K, c.P, c.N);
            if (projected) d[i].w_hr = weights_of(arena, c.weights[i].w_hr, c.P, c.H, c.N);
            d[i].carry = arena.take<A>(c.B * s.ld_p);
            d[i].dc = CellT::HAS_C ? arena.take<A>(c.B * s.ld_h) : nullptr;
            d[i].gates = arena.take<E>(chunk * ld_gates);
            d[i].dh = projected ? arena.take<E>(chunk * s.ld_p) : nullptr;
            d[i].x = weights ? arena.take<E>(s.blocks_i * chunk * PW) : nullptr;
            d[i].h = weights ? arena.take<E>(s.blocks_p * chunk * PW) : nullptr;
            d[i].full = weights && projected ? arena.take<E>(s.blocks_h * chunk * PW) : nullptr;
            d[i].d_w_ih = result(arena, at_once ? nullptr : out.w_ih, K * c.I);
            d[i].d_w_hh = result(arena, at_once ? nullptr : out.w_hh, K * c.P);
            d[i].d_w_hr = result(arena, at_once ? nullptr : out.w_hr, c.P * c.H);
            d[i].d_b_ih = result(arena, out.b_ih, K);
            d[i].d_b_hh = result(arena, out.b_hh, K);
        }
    }

    void run(const Team& team) {
        Barrier* all = &team.barriers[team.threads];
        Arena sizes{nullptr};
        lay_out(sizes, team);
        Scratch scratch(sizes.used);
        Arena arena{static_cast<char*>(scratch.p)};
        Buffers buf = lay_out(arena, team);
        prepare(team);
        if (!all_ready(team, scratch.p)) return;
        Chunk now[2] = {first(0), first(1)};
        for (bool start = true; now[0].rows || (c.D == 2 && now[1].rows); start = false) {
            Group g;
            for (long k = 0; group_of(c, team, k, g); ++k)
                if (now[g.direction].rows) scan(g, now[g.direction], buf, &team.barriers[g.index]);
            barrier(all, team.threads);
            if (weights) {
                for (int i = 0; i < c.D; ++i) pack_rows(i, now[i], team);
                barrier(all, team.threads);
                for (int i = 0; i < c.D; ++i) weight_gradients(i, now[i].rows, !start, team, buf);
            }
            if (c.d_input) {
                for (int i = 0; i < c.D; ++i) {
                    if (i) barrier(all, team.threads);  // both directions add to the same rows
                    input_gradient(i, now[i], team, buf);
                }
            }
            barrier(all, team.threads);
            for (int i = 0; i < c.D; ++i) now[i] = next(i, now[i]);
        }
        finish(team);
    }

    // Chunks in the order of the scan: forwards direction from the last step down, the reverse one from the
    // first up.
    Chunk first(int i) const { return i ? grow_up(0) : grow_down(c.T); }
    Chunk next(int i, const Chunk& at) const { return i ? grow_up(at.end) : grow_down(at.begin); }
    Chunk grow_down(long end) const {
        long begin = end;
        while (begin > 0 && (begin == end || c.row_start[end] - c.row_start[begin - 1] <= chunk)) --begin;
        return {begin, end, c.row_start[begin], c.row_start[end] - c.row_start[begin]};
    }
    Chunk grow_up(long begin) const {
        long end = begin;
        while (end < c.T && (end == begin || c.row_start[end + 1] - c.row_start[begin] <= chunk)) ++end;
        return {begin, end, c.row_start[begin], c.row_start[end] - c.row_start[begin]};
    }

    struct Buffers {
        E* block;
        A *tile, *rows, *pre;
    };
    Buffers lay_out(Arena& arena, const Team& team) const {
        constexpr int MR = max_rows<2>();
        return {arena.take<E>(blocks_kept(team.threads) * chunk * MR + 2 * n), arena.take<A>(MR * PW),
                c.d_input ? arena.take<A>(ceil_div(chunk, team.threads) * s.blocks_i * PW) : nullptr,
                projected ? arena.take<A>(c.B * s.blocks_h * PW) : nullptr};
    }

    // Row of the weights that belongs to column k of the x side; the r side's columns are in the weights'
    // order.
    long x_weight_row(long k) const { return !CellT::APART ? k : k < c.H ? (G - 1) * c.H + k : k - c.H; }
    const E* r_gates(int i) const { return d[i].gates + (CellT::APART ? c.H : 0); }

    void prepare(const Team& team) {
        for (int i = 0; i < c.D; ++i) {
            const auto& w = c.weights[i];
            Range k = steps_of(K, team);
            for (long r = k.begin; r < k.end; ++r) {
                if (c.d_input) pack_weights(d[i].w_ih, r, K, w.w_ih, c.I);
                pack_weights(d[i].w_hh, r, K, w.w_hh, c.P);
            }
            k = steps_of(projected ? c.P : 0, team);
            for (long r = k.begin; r < k.end; ++r) pack_weights(d[i].w_hr, r, c.P, w.w_hr, c.H);
            if (PAIRS) {  // behind an odd number of columns
                k = share(chunk, team.thread, team.threads);
                for (long r = k.begin; r < k.end; ++r) {
                    d[i].gates[r * ld_gates + KEPT * c.H] = E{};
                    if (projected) d[i].dh[r * s.ld_p + c.P] = E{};
                }
            }
            k = share(c.B, team.thread, team.threads);
            for (long b = k.begin; b < k.end; ++b) {
                start_state(d[i].carry + b * s.ld_p, c.grad_h_n, (i * c.B + b) * c.P, c.P);
                if (CellT::HAS_C) start_state(d[i].dc + b * s.ld_h, c.grad_c_n, (i * c.B + b) * c.H, c.H);
            }
        }
        Range all = share(d_input ? c.N * c.I : 0, team.thread, team.threads);
        for (long k = all.begin; k < all.end; ++k) d_input[k] = 0;
    }

    // A thread's share of the steps along K rows.
    static Range steps_of(long K, const Team& team) {
        return share(ceil_div(K, F::depth), team.thread, team.threads);
    }

    // The row that precedes (t, b) in the scan's own order, or -1 where that is the initial state.
    long previous(int i, long t, long b) const {
        if (i == 0) return t ? c.row_start[t - 1] + b : -1;
        return t + 1 < c.T && b < active(c, t + 1) ? c.row_start[t + 1] + b : -1;
    }
    const A* reserved(int i, long row) const {
        return static_cast<const A*>(c.reserve) + (i * c.N + row) * Sh::RESERVE * c.H;
    }
    const S* output_row(int i, long row) const {
        return static_cast<const S*>(c.output) + (row * c.D + i) * c.P;
    }
    const S* h_before(int i, long t, long b) const {
        long row = previous(i, t, b);
        return row < 0 ? static_cast<const S*>(c.hx) + (i * c.B + b) * c.P : output_row(i, row);
    }

    void scan(Group g, const Chunk& now, const Buffers& buf, Barrier* joint) {
        const int i = g.direction;
        const bool one_row = steps_of_one_row(c) && Base::are_packed(c.N);
        for (long step = now.begin; step < now.end; ++step) {
            if (!still_there(joint, g)) return;
            const Range units = share(s.blocks_h, g.member, g.members),
                        outs = share(s.blocks_p, g.member, g.members);
            const long first_out = outs.begin, panels = outs.end - outs.begin;
            const long t = i ? step : now.begin + now.end - 1 - step, m = active_in(c, t, g);
            if (m == 0) continue;
            const long row = c.row_start[t] + g.rows_begin, at = row - now.row;
            if (projected) {
                for (long b = 0; b < m; ++b)
                    for (long j = outs.begin * PW; j < min_of(c.P, outs.end * PW); j += n)
                        store_n<A>(d[i].dh + (at + b) * s.ld_p + j, incoming(i, g.rows_begin + b, row + b, j),
                                   c.P - j);
                meet(joint, g);
                if (one_row) {
                    multiply_row(d[i].dh + at * s.ld_p, d[i].w_hr, units.begin, units.end - units.begin, c.P,
                                 buf.pre, PW, false);
                } else {
                    multiply(m, d[i].dh + at * s.ld_p, s.ld_p, d[i].w_hr, units.begin,
                             units.end - units.begin, 0, c.P, buf.pre, PW, m * PW, false);
                }
            }
            cell_rows(i, g.rows_begin, t, m, units, at, buf.pre);
            meet(joint, g);
            const E* gates = r_gates(i) + at * ld_gates;
            A* carry = d[i].carry + g.rows_begin * s.ld_p + first_out * PW;
            if (one_row) {
                multiply_row(gates, d[i].w_hh, first_out, panels, K, carry, PW, CellT::APART);
            } else {
                multiply(m, gates, ld_gates, d[i].w_hh, first_out, panels, 0, K, carry, s.ld_p, PW,
                         CellT::APART);
            }
            end_step(joint, g);
        }
    }

    // The gradient that reaches h of (t, b): from the next step and from the output.
    Vec<A> incoming(int i, long b, long row, long j) const {
        Vec<A> dh = load<A>(d[i].carry + b * s.ld_p + j);
        if (!c.grad_output) return dh;
        return dh + load_n<A>(static_cast<const S*>(c.grad_output) + (row * c.D + i) * c.P + j, c.P - j);
    }

    // Where the values of a row lie.
    struct Row {
        const A *reserve, *carry, *dc, *c_prev;
        const S *output, *grad, *c_first, *h_prev;  // c_prev or, in the first step, c_first
        A *next_carry, *next_dc;
        E* gates;
    };

    // Some blocks of units of m rows, one row after the other as they lie in memory. pre: [block][row][PW],
    // the gradient of the unprojected output.
    void cell_rows(int i, long rows_begin, long t, long m, Range units, long at, const A* pre) {
        const long begin = units.begin * PW, end = min_of(c.H, units.end * PW),
                   whole = end - (end - begin) % n;
        for (long k = 0; k < m; ++k) {
            const long b = rows_begin + k, row = c.row_start[t] + b, before = previous(i, t, b);
            Row r{};
            r.reserve = reserved(i, row), r.output = output_row(i, row),
            r.gates = d[i].gates + (at + k) * ld_gates;
            r.carry = r.next_carry = d[i].carry + b * s.ld_p;
            if (c.grad_output) r.grad = static_cast<const S*>(c.grad_output) + (row * c.D + i) * c.P;
            if (CellT::APART) r.h_prev = h_before(i, t, b);
            if (CellT::HAS_C) {
                r.dc = r.next_dc = d[i].dc + b * s.ld_h;
                if (before < 0) {
                    r.c_first = static_cast<const S*>(c.cx) + (i * c.B + b) * c.H;
                } else {
                    r.c_prev = reserved(i, before) + (Sh::RESERVE - 1) * c.H;
                }
            }
            const auto unprojected = [&](long j) {
                return pre + ((j / PW - units.begin) * m + k) * PW + j % PW;
            };
            for (long j = begin; j < whole; j += n)
                cell_vector(r, j, n, projected ? unprojected(j) : nullptr);
            if (whole < end) cell_vector(r, whole, end - whole, projected ? unprojected(whole) : nullptr);
        }
    }

    // Units [j, j + left) of a row, at most a vector of them.
    SK_INLINE void cell_vector(const Row& r, long j, long left, const A* pre) {
        Vec<A> reserve[Sh::RESERVE + 1], dx[G], dr[G], h_prev{}, c_prev{}, dc{}, dh;
        for (int q = 0; q < Sh::RESERVE; ++q) reserve[q] = load_n<A>(r.reserve + q * c.H + j, left);
        if (Sh::RESERVE == 0) reserve[0] = load_n<A>(r.output + j, left);
        if (CellT::APART) h_prev = load_n<A>(r.h_prev + j, left);
        if (CellT::HAS_C) {
            c_prev = r.c_prev ? load_n<A>(r.c_prev + j, left) : load_n<A>(r.c_first + j, left);
            dc = load<A>(r.dc + j);
        }
        if (pre) {
            dh = load<A>(pre);
        } else {
            dh = load<A>(r.carry + j);
            if (r.grad) dh += load_n<A>(r.grad + j, left);
        }
        Vec<A> direct = CellT::template bwd<Math<A>>(reserve, h_prev, c_prev, dh, dc, dx, dr);
        if (CellT::HAS_C) store<A>(r.next_dc + j, dc);
        if (CellT::APART) store<A>(r.next_carry + j, direct);
        E* to = r.gates + j;
        if (CellT::APART) {
            store_n<A>(to, dx[G - 1], left);
            for (int q = 0; q < G; ++q) store_n<A>(to + (q + 1) * c.H, dr[q], left);
        } else {
            for (int q = 0; q < G; ++q) store_n<A>(to + q * c.H, dx[q], left);
        }
    }

    // What multiplies the gates in the weight gradients.
    void pack_rows(int i, const Chunk& now, const Team& team) {
        const long steps = ceil_div(now.rows, F::depth);
        long t_before = 0, b_before = 0;
        for (long t = now.begin; t < now.end; ++t)
            for (long b = 0; b < active(c, t); ++b) {
                const long k = c.row_start[t] - now.row + b, step = k / F::depth;
                const bool completes = k % F::depth == F::depth - 1;
                if (step * team.threads / steps == team.thread) {
                    if (F::depth == 1 || (!completes && k == now.rows - 1)) {
                        pack_step(i, k, t, b, false, 0, 0);
                    } else if (completes) {
                        pack_step(i, k - 1, t_before, b_before, true, t, b);
                    }
                }
                t_before = t, b_before = b;
            }
    }

    // Row k, that of (t, b), and if `both` the one behind it, that of (t2, b2).
    void pack_step(int i, long k, long t, long b, bool both, long t2, long b2) {
        pack_panels(d[i].x, k, chunk, input_row<S>(c, t, b), both ? input_row<S>(c, t2, b2) : nullptr, c.I);
        pack_panels(d[i].h, k, chunk, h_before(i, t, b), both ? h_before(i, t2, b2) : nullptr, c.P);
        if (!projected) return;
        for (long j = 0; j < s.blocks_h * PW; j += n) {
            E* to = d[i].full + (j / PW * chunk + k) * PW + j % PW * F::depth;
            const Vec<A> full = unprojected(i, c.row_start[t] + b, j);
            if constexpr (PAIRS) {
                auto pairs = rounded_bits<A>(full);
                if (both) pairs |= rounded_bits<A>(unprojected(i, c.row_start[t2] + b2, j)) << 16;
                F::store(to, pairs);
            } else {
                store<A>(to, full);
            }
        }
    }

    // Units [j, j + n) of a row's output before its projection.
    Vec<A> unprojected(int i, long row, long j) const {
        const A* from = reserved(i, row);
        if constexpr (CellT::HAS_C)
            if (j < c.H)
                return load_n<A>(from + 3 * c.H + j, c.H - j) *
                       tanh<A>(load_n<A>(from + 4 * c.H + j, c.H - j));
        return Vec<A>{};
    }

    // Panels of inputs and states that stay in a core's second-level cache while all columns of gates meet
    // them; all at once with AVX2, or where a batch so large leaves room for none.
    static constexpr unsigned long PANEL_BYTES = 512u << 10;
    long panels() const { return s.blocks_i + s.blocks_p; }
    long panels_together() const {
        const long fitting = static_cast<long>(PANEL_BYTES / (sizeof(E) * chunk * PW));
        return SEQKERN_VECTOR_BYTES == 64 && fitting ? min_of(panels(), fitting) : panels();
    }
    long gate_blocks() const { return KEPT * ceil_div(c.H, max_rows<2>()); }
    // Blocks of columns that a thread keeps packed.
    long blocks_kept(long threads) const {
        return panels_together() < panels() ? ceil_div(gate_blocks(), threads) : 1;
    }

    void weight_gradients(int i, long rows, bool add, const Team& team, const Buffers& buf) {
        if (rows == 0) return;
        const long blocks = ceil_div(c.H, max_rows<2>()), all = panels(), together = panels_together();
        for (long p = 0; p < all; p += together) {
            const Range x_panels = {min_of(p, s.blocks_i), min_of(p + together, s.blocks_i)},
                        h_panels = {max_of(p - s.blocks_i, 0), min_of(p + together, all) - s.blocks_i};
            E* block = buf.block;
            for (long item = team.thread; item < gate_blocks(); item += team.threads) {
                const long kept = item / blocks;
                Range units = share(c.H, item % blocks, blocks);
                const long width = units.end - units.begin;
                const bool x_side = !CellT::APART || kept < G, r_side = !CellT::APART || kept > 0;
                const long x_row = x_weight_row(kept * c.H) + units.begin, r_row = x_row;
                if (p == 0) {
                    const E* from = d[i].gates + kept * c.H + units.begin;
                    A sums[max_rows<2>() + n];
                    pack_block(block, from, ld_gates, width, rows, sums);
                    if (x_side) bias_gradient(d[i].d_b_ih, x_row, sums, width, add);
                    if (r_side) bias_gradient(d[i].d_b_hh, r_row, sums, width, add);
                }
                if (x_side)
                    block_gradient(block, buf.tile, width, rows, d[i].x, chunk, x_panels, c.I,
                                   {d[i].d_w_ih, c.d_weights[i].w_ih}, x_row, add);
                if (r_side)
                    block_gradient(block, buf.tile, width, rows, d[i].h, chunk, h_panels, c.P,
                                   {d[i].d_w_hh, c.d_weights[i].w_hh}, r_row, add);
                if (together < all) block += whole_steps<E>(rows) * width;
            }
        }
        const long out_blocks = projected ? ceil_div(c.P, max_rows<2>()) : 0;
        for (long item = team.thread; item < out_blocks; item += team.threads) {
            Range units = share(c.P, item, out_blocks);
            A sums[max_rows<2>() + n];
            pack_block(buf.block, d[i].dh + units.begin, s.ld_p, units.end - units.begin, rows, sums);
            block_gradient(buf.block, buf.tile, units.end - units.begin, rows, d[i].full, chunk,
                           {0, s.blocks_h}, c.H, {d[i].d_w_hr, c.d_weights[i].w_hr}, units.begin, add);
        }
    }

    void input_gradient(int i, const Chunk& now, const Team& team, const Buffers& buf) {
        Range rows = share(now.rows, team.thread, team.threads);
        const long m = rows.end - rows.begin;
        const E* gates = d[i].gates + rows.begin * ld_gates;
        const long first = CellT::APART ? c.H : 0;  // kept columns whose weights come last
        multiply(m, gates + first, ld_gates, d[i].w_ih, 0, s.blocks_i, 0, K - first, buf.rows, PW, m * PW,
                 false);
        if (first)
            multiply(m, gates, ld_gates, d[i].w_ih, 0, s.blocks_i, K - first, first, buf.rows, PW, m * PW,
                     true);
        for (long k = 0; k < m; ++k)
            for (long p = 0; p < s.blocks_i; ++p) {
                const long at = (now.row + rows.begin + k) * c.I + p * PW;
                const A* from = buf.rows + (p * m + k) * PW;
                if (d_input) {
                    emit(d_input + at, from, c.I - p * PW, true);
                } else {
                    emit(static_cast<S*>(c.d_input) + at, from, c.I - p * PW, false);
                }
            }
    }

    void finish(const Team& team) {
        for (int i = 0; i < c.D; ++i) {
            Range rows = share(c.B, team.thread, team.threads);
            for (long b = rows.begin; b < rows.end; ++b) {
                copy_out(static_cast<S*>(c.d_hx) + (i * c.B + b) * c.P, d[i].carry + b * s.ld_p, c.P);
                if (CellT::HAS_C)
                    copy_out(static_cast<S*>(c.d_cx) + (i * c.B + b) * c.H, d[i].dc + b * s.ld_h, c.H);
            }
            const auto& out = c.d_weights[i];
            rounded(out.w_ih, d[i].d_w_ih, K * c.I, team);
            rounded(out.w_hh, d[i].d_w_hh, K * c.P, team);
            rounded(out.w_hr, d[i].d_w_hr, c.P * c.H, team);
            rounded(out.b_ih, d[i].d_b_ih, K, team);
            rounded(out.b_hh, d[i].d_b_hh, K, team);
        }
        if (d_input) rounded(c.d_input, d_input, c.N * c.I, team);
    }
};

template <class CellT, class A, class S>
unsigned long backward_bytes(const BackwardCall& c) {
    Arena arena{nullptr};
    BackwardScan<CellT, A, S> scan(c, arena);
    return arena.used;
}

template <class CellT, class A, class S>
void backward_run(const BackwardCall& c, char* shared, const Team& team) {
    Arena arena{shared};
    BackwardScan<CellT, A, S>(c, arena).run(team);
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
