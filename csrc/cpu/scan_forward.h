// Forward scan: input projection in cache-sized time chunks, then per step the recurrent matmul and the cell,
// panel by panel while the pre-activations are in L1.
#pragma once

#include "gemv.h"
#include "scan_forward_rules.h"

namespace seqkern {
namespace SEQKERN_ISA {

template <class CellT, class A, class S>
struct ForwardScan {
    using Sh = Shape<CellT, A>;
    using E = typename FactorsOf<A, S>::E;
    static constexpr int n = Sh::n, G = Sh::G, U = Sh::U, NV = Sh::NV, PART = Sh::PART, W = Sh::W;
    static constexpr bool ROUNDED = !__is_same(A, E);
    static constexpr bool CAN_BE_AT_ONCE = SEQKERN_VECTOR_BYTES == 32 && !CellT::APART && !ROUNDED;

    const ForwardCall& c;
    Sh s;
    const bool lying_x, lying_h;  // whether weights are read as they lie
    const bool at_once;           // whether one matmul in each step takes inputs and states
    const bool passing;           // whether each panel is packed for one use, of the only step
    const bool past_caches;       // whether what is saved is stored so
    struct {
        E *w_ih, *w_hh, *w_hr;  // packed; null where they are read as they lie
        A *bias_x, *bias_r;     // [panel][W]; bias_r only where the cell keeps r apart
        E *h[2], *h_full;       // [B][ld]; h doubles so that a step reads one and writes the other
        A *cell, *h_exact;      // [B][ld]; h_exact: what the cell itself reads of h, where h is rounded
    } d[2];

    ForwardScan(const ForwardCall& call, Arena& arena)
        : c(call),
          s(call),
          lying_x(c.N < (c.T == 1 && !ROUNDED ? ROWS_OF_A_STEP_WORTH_PACKING : ROWS_WORTH_PACKING)),
          lying_h(lying_x || (c.B == 1 && !worth_packing<CellT, E>(c))),
          at_once(CAN_BE_AT_ONCE && !lying_x && !c.packed && c.B >= ROWS_AT_ONCE &&
                  c.I + c.P <= DEPTH_AT_ONCE),
          passing(c.T == 1 && !lying_x && !at_once),
          past_caches(goes_past_caches<CellT, A>(c)) {
        long panels = s.blocks_h * Sh::PANELS;
        for (int i = 0; i < c.D; ++i) {
            const bool projected = c.weights[i].w_hr;
            d[i].w_ih = lying_x || passing ? nullptr : arena.take<E>(panels * whole_steps<E>(c.I) * W);
            d[i].w_hh = lying_h || passing ? nullptr : arena.take<E>(panels * whole_steps<E>(c.P) * W);
            d[i].w_hr =
                projected && !lying_h ? arena.take<E>(s.blocks_p * whole_steps<E>(c.H) * 2 * n) : nullptr;
            d[i].bias_x = arena.take<A>(panels * W);
            d[i].bias_r = arena.take<A>(panels * W);
            for (auto& h : d[i].h) h = arena.take<E>(c.B * max_of(s.ld_p, s.ld_h));
            d[i].cell = CellT::HAS_C ? arena.take<A>(c.B * s.ld_h) : nullptr;
            d[i].h_exact = CellT::APART && ROUNDED ? arena.take<A>(c.B * s.ld_h) : nullptr;
            d[i].h_full = projected ? arena.take<E>(c.B * s.ld_h) : nullptr;
        }
    }

    static E* panel_of(E* packed, long K, long p) { return packed + p * whole_steps<E>(K) * W; }

    // o[row][W] (+)= a[row][K] times panel p of w, packed here and now.
    void gates_in_passing(const void* w, long K, long p, E* room, long rows, const E* a, long lda, A* o,
                          bool accumulate) const {
        pack_gates<CellT>(room, static_cast<const S*>(w), K, s, p);
        gates_times<CellT, E, A>(rows, a, lda, room, 0, 1, K, o, 0, accumulate);
    }

    // Each thread packs what it is likely to read: whole directions, then neighbouring panels.
    void prepare(const Team& team) {
        Range own = share(c.D * s.blocks_h, team.thread, team.threads);
        for (long item = own.begin * Sh::PANELS; item < own.end * Sh::PANELS; ++item) {
            const long i = item / (s.blocks_h * Sh::PANELS), p = item % (s.blocks_h * Sh::PANELS);
            const auto& w = c.weights[i];
            if (d[i].w_ih)
                pack_gates<CellT>(panel_of(d[i].w_ih, c.I, p), static_cast<const S*>(w.w_ih), c.I, s, p);
            if (d[i].w_hh)
                pack_gates<CellT>(panel_of(d[i].w_hh, c.P, p), static_cast<const S*>(w.w_hh), c.P, s, p);
            pack_bias(i, p);
        }
        own = share(d[0].w_hr ? c.D * s.blocks_p : 0, team.thread, team.threads);
        for (long item = own.begin; item < own.end; ++item) {
            const long i = item / s.blocks_p;
            pack_plain(d[i].w_hr, static_cast<const S*>(c.weights[i].w_hr), c.P, c.H, item % s.blocks_p);
        }
        own = share(c.D * c.B, team.thread, team.threads);
        for (long item = own.begin; item < own.end; ++item) {
            const long i = item / c.B, b = item % c.B;
            const S* h0 = static_cast<const S*>(c.hx) + item * c.P;
            for (auto h : d[i].h) factor_row(h + b * s.ld_p, h0, c.P);
            if (CellT::APART && ROUNDED) copy_row<A>(d[i].h_exact + b * s.ld_h, h0, c.P);
            if (d[i].h_full) d[i].h_full[b * s.ld_h + whole_steps<E>(c.H) - 1] = E{};  // behind an odd H
            if (CellT::HAS_C)
                copy_row<A>(d[i].cell + b * s.ld_h, static_cast<const S*>(c.cx) + item * c.H, c.H);
        }
    }

    void pack_bias(int i, long p) {
        const S* b_ih = static_cast<const S*>(c.weights[i].b_ih);
        const S* b_hh = static_cast<const S*>(c.weights[i].b_hh);
        for (int g = 0; g < G; ++g)
            for (int u = 0; u < U; ++u) {
                long unit = (p * U + u) * n, left = c.H - unit;
                Vec<A> x{}, r{};
                if (left > 0 && b_ih)
                    x = load_n<A>(b_ih + g * c.H + unit, left), r = load_n<A>(b_hh + g * c.H + unit, left);
                store<A>(d[i].bias_x + p * W + (g * U + u) * n, CellT::APART ? x : x + r);
                store<A>(d[i].bias_r + p * W + (g * U + u) * n, r);
            }
    }

    // o[row][W] (+)= a[row][K] times the rows of w [G H][K] that make the panel.
    void gates_as_they_lie(const void* w, long K, long panel, bool backwards, long rows, const E* a, long lda,
                           A* o, bool accumulate) const {
        for (long at = 0; at < NV; ++at) {
            const long v = backwards ? NV - 1 - at : at, unit = (panel * U + v % U) * n;
            if (unit >= c.H) continue;
            const S* from = static_cast<const S*>(w) + (v / U * c.H + unit) * K;
            rows_as_they_lie(from, K, K, c.H - unit, rows, a, lda, o + v * n, W, accumulate);
        }
    }

    // Columns [first, first + 2n) of the projection.
    void project_as_it_lies(long dir, long first, long rows, const E* full, A* to, long ldo) const {
        const S* w = static_cast<const S*>(c.weights[dir].w_hr) + first * c.H;
        for (long j = 0; j < min_of(c.P - first, 2 * n); j += n)
            rows_as_they_lie(w + j * c.H, c.H, c.H, c.P - first - j, rows, full, s.ld_h, to + j, ldo, false);
    }

    // Where the values of a step's first row lie, and how far apart those of two rows. As values of their
    // own: what is stored might be part of this object for all that the compiler knows.
    struct Rows {
        const E* previous;
        E* hidden;
        S* output;
        A *exact, *cell, *reserve;  // null where there is none
        long ld_previous, ld_hidden, ld_output, ld_state, ld_reserve;
        long ahead;  // numbers from a row of reserve to that of the next step, which is asked for
    };
    Rows rows_of(const Group& g, const E* h_prev, E* h_next, long step) const {
        const long dir = g.direction, b = g.rows_begin, t = time_of(dir, step), row0 = c.row_start[t] + b;
        const auto& at = d[dir];
        const bool projected = c.weights[dir].w_hr != nullptr;
        Rows to{};
        to.ld_previous = s.ld_p, to.ld_hidden = projected ? s.ld_h : s.ld_p, to.ld_output = c.D * c.P;
        to.ld_state = s.ld_h, to.ld_reserve = Sh::RESERVE * c.H;
        to.previous = h_prev + b * to.ld_previous;
        to.hidden = (projected ? at.h_full : h_next) + b * to.ld_hidden;
        if (!projected) to.output = static_cast<S*>(c.output) + (row0 * c.D + dir) * c.P;
        if (CellT::APART && ROUNDED) to.exact = at.h_exact + b * to.ld_state;
        if (CellT::HAS_C) to.cell = at.cell + b * to.ld_state;
        if (Sh::RESERVE && c.reserve)
            to.reserve = static_cast<A*>(c.reserve) + (dir * c.N + row0) * to.ld_reserve;
        if (step + 1 < c.T) to.ahead = (c.row_start[time_of(dir, step + 1)] - c.row_start[t]) * to.ld_reserve;
        return to;
    }

    // How far the cells of one call lie apart.
    struct Steps {
        long x, r, bias;
    };

    // The cell on `rows` rows of one panel. x, r: [row][W] pre-activations without bias.
    void cell_rows(long dir, long p, long rows, const A* x, const A* r, const Rows& to) const {
        for (int u = 0; u < U; ++u) {
            const long unit = (p * U + u) * n, left = c.H - unit;
            if (left > 0) cells(dir, p, u, min_of(left, n), rows, x, r, to, {W, W, 0});
        }
    }

    // The cell on one row of `count` panels, x_stride apart in x and W in r.
    void cell_panels(long dir, long p, long count, const A* x, long x_stride, const A* r, Rows to) const {
        to.ld_previous = to.ld_hidden = to.ld_output = to.ld_state = to.ld_reserve = U * n;
        for (int u = 0; u < U; ++u) {
            const long left = c.H - (p * U + u) * n,
                       whole = min_of(count, left < 0 ? 0 : (left + (U - 1) * n) / (U * n));
            cells(dir, p, u, n, whole, x, r, to, {x_stride, W, W});
            const long rest = left - whole * U * n;
            if (whole == count || rest <= 0) continue;
            cells(dir, p + whole, u, rest, 1, x + whole * x_stride, r + whole * W, to, {0, 0, 0});
        }
    }

    // Units [unit, unit + left), at most a vector of them, which is vector u of panel p, in the first of
    // `count` cells.
    void cells(long dir, long p, int u, long left, long count, const A* x, const A* r, const Rows& to,
               const Steps& steps) const {
        if (count == 0) return;
        const A *bx = d[dir].bias_x + p * W, *br = d[dir].bias_r + p * W;
        const long unit = (p * U + u) * n;
        x += u * n, r += u * n, bx += u * n, br += u * n;
        if (left == n && !to.reserve) {
            cell_column<false>(unit, n, count, x, r, bx, br, to, steps);
        } else if (left == n) {
            cell_column<true>(unit, n, count, x, r, bx, br, to, steps);
        } else {
            cell_column<true>(unit, left, count, x, r, bx, br, to, steps);
        }
    }

    template <bool SAVE>
    SK_INLINE void cell_column(long unit, long left, long count, const A* x, const A* r, const A* bx,
                               const A* br, Rows to, const Steps& steps) const {
        long m = 0;
        for (; m + TOGETHER <= count; m += TOGETHER)
            some_cells<SAVE, TOGETHER>(unit, left, x, r, bx, br, to, steps);
        for (; m < count; ++m) some_cells<SAVE, 1>(unit, left, x, r, bx, br, to, steps);
    }

    static constexpr int TOGETHER = 2;  // the gates of more would not fit sixteen registers
    template <bool SAVE, int N>
    SK_INLINE void some_cells(long unit, long left, const A*& x, const A*& r, const A*& bx, const A*& br,
                              Rows& to, const Steps& steps) const {
        const long H = c.H;
        Several<A, N> px[G], pr[G], reserve[Sh::RESERVE + 1], cell{}, h, hp{};
        SK_UNROLL
        for (int i = 0; i < N; ++i) {
            SK_UNROLL
            for (int k = 0; k < G; ++k) {
                px[k].v[i] = load<A>(x + k * U * n) + load<A>(bx + k * U * n);
                if (CellT::APART) pr[k].v[i] = load<A>(r + k * U * n) + load<A>(br + k * U * n);
            }
            x += steps.x, bx += steps.bias;
            if (CellT::APART) r += steps.r, br += steps.bias;
            if constexpr (CellT::APART && ROUNDED) {
                hp.v[i] = load<A>(to.exact + unit + i * to.ld_state);
            } else if constexpr (CellT::APART) {
                hp.v[i] = load<A>(to.previous + unit + i * to.ld_previous);
            }
            if (CellT::HAS_C) cell.v[i] = load<A>(to.cell + unit + i * to.ld_state);
        }
        CellT::template fwd<Math<A>>(px, pr, hp, cell, h, reserve);
        SK_UNROLL
        for (int i = 0; i < N; ++i) {
            if (CellT::HAS_C) store<A>(to.cell + unit, cell.v[i]), to.cell += to.ld_state;
            if constexpr (ROUNDED) {
                if (CellT::APART) store<A>(to.exact + unit, h.v[i]), to.exact += to.ld_state;
                store_n<A>(to.hidden + unit, h.v[i], left);  // a zero may stand behind an odd H
            } else {
                store<A>(to.hidden + unit, h.v[i]);
            }
            to.hidden += to.ld_hidden, to.previous += to.ld_previous;
            if (to.output) store_n<A>(to.output + unit, h.v[i], left), to.output += to.ld_output;
            if (SAVE && to.reserve) {
                for (int k = 0; k < Sh::RESERVE; ++k) {
                    A* p = to.reserve + k * H + unit;
                    if (past_caches) {
                        store_past_caches(p, reserve[k].v[i]);
                        continue;
                    }
                    store_n<A>(p, reserve[k].v[i], left);
                    __builtin_prefetch(p + to.ahead, 0, 2);
                }
                to.reserve += to.ld_reserve;
            }
        }
    }

    void run(const Team& team) {
        Group g;
        unsigned long bytes = 0;
        for (long k = 0; group_of(c, team, k, g); ++k) {
            Arena sizes{nullptr};
            lay_out(sizes, g);
            bytes = bytes < sizes.used ? sizes.used : bytes;
        }
        Scratch scratch(bytes);
        prepare(team);
        if (!all_ready(team, scratch.p)) return;
        for (long k = 0; group_of(c, team, k, g); ++k) {
            Arena arena{static_cast<char*>(scratch.p)};
            run_group(g, lay_out(arena, g), &team.barriers[g.index]);
        }
        if (past_caches) stores_are_seen();
    }

    struct Buffers {
        long rows, room;  // rows of a chunk; of x, in rows of one panel
        E* input;
        A *x, *r;
        E* panel;  // of weights that are packed in passing
    };
    Buffers lay_out(Arena& arena, const Group& g) const {
        Range blocks = share(s.blocks_h, g.member, g.members);
        const long width = max_of(1, g.rows_end - g.rows_begin);
        const long panels = max_of(1, (blocks.end - blocks.begin) * Sh::PANELS);
        const bool far = s.H * G * c.I * static_cast<long>(sizeof(E)) >= FAR_WEIGHTS;
        const ForwardChunk chunk = far ? FORWARD_CHUNK_OF_FAR_WEIGHTS : FORWARD_CHUNK;
        const long fitting = chunk.bytes / (static_cast<long>(sizeof(A)) * panels * W);
        const long rows = min_of(width * c.T, max_of(width, min_of(fitting, chunk.rows)));
        const long room =
            max_of(panels * rows, s.blocks_h * Sh::PANELS * width);  // of one step, if left alone
        return {rows,
                room,
                arena.take<E>(rows * s.ld_i),
                arena.take<A>(room * W),
                arena.take<A>(max_of(width * 4, PANELS_OF_A_ROW) * W),
                passing ? arena.take<E>(whole_steps<E>(max_of(c.I, c.P)) * W) : nullptr};
    }

    void run_group(Group g, const Buffers& buf, Barrier* joint) {
        const long dir = g.direction;
        const bool projected = c.weights[dir].w_hr != nullptr;
        for (long step = 0; step < c.T;) {
            if (!still_there(joint, g)) return sleep_until_done(joint);
            const Range blocks = share(s.blocks_h, g.member, g.members),
                        out_blocks = share(s.blocks_p, g.member, g.members);
            const long p0 = blocks.begin * Sh::PANELS, panels = (blocks.end - blocks.begin) * Sh::PANELS;
            const long chunk_rows = min_of(buf.rows, buf.room / max_of(1, panels));
            long rows = 0, end = step;
            for (; end < c.T; ++end) {
                long more = active_in(c, time_of(dir, end), g);
                if (end > step && rows + more > chunk_rows) break;
                rows += more;
            }
            long at = 0;
            for (long i = step; i < end; ++i) {
                long t = time_of(dir, i), m = active_in(c, t, g);
                for (long b = 0; b < m; ++b)
                    factor_row(buf.input + (at + b) * s.ld_i, input_row<S>(c, t, g.rows_begin + b), c.I);
                at += m;
            }
            if (lying_x) {
                for (long p = 0; p < panels; ++p)
                    gates_as_they_lie(c.weights[dir].w_ih, c.I, p0 + p, false, rows, buf.input, s.ld_i,
                                      buf.x + p * chunk_rows * W, false);
            } else if (passing) {
                for (long p = 0; p < panels; ++p)
                    gates_in_passing(c.weights[dir].w_ih, c.I, p0 + p, buf.panel, rows, buf.input, s.ld_i,
                                     buf.x + p * chunk_rows * W, false);
            } else if (!at_once) {
                gates_times<CellT, E, A>(rows, buf.input, s.ld_i, d[dir].w_ih, p0, panels, c.I, buf.x,
                                         chunk_rows * W, false);
            }
            at = 0;
            const long first = step;
            for (bool together = true; together && step < end; ++step) {
                long t = time_of(dir, step), m = active_in(c, t, g);
                together = one_step(g, step, t, m, p0, panels, buf, buf.input + at * s.ld_i, buf.x + at * W,
                                    chunk_rows * W, out_blocks, projected, joint, step > first);
                long next = step + 1 < c.T ? active_in(c, time_of(dir, step + 1), g) : 0;
                finish_rows(g, step, next, m, blocks, out_blocks);
                at += m;
            }
        }
        if (g.member == 0) __atomic_store_n(&joint->done, 1, __ATOMIC_RELEASE);
    }

    // Panels between whose matmul and cell nothing else is done: for a single row as many as a little of L1
    // holds, since one cell after the other is quicker than each behind a matmul that keeps it waiting.
    static long panels_together(long m) {
        if (m <= 1) return PANELS_OF_A_ROW;
        return max_panels<PART>(ceil_div(m, ceil_div(m, max_rows<PART>())));
    }

    long time_of(long dir, long step) const { return dir ? c.T - 1 - step : step; }

    // False: the members part after this step. counted: nothing uneven, as the inputs' matmul, came before
    // it.
    bool one_step(const Group& g, long step, long t, long m, long p0, long panels, const Buffers& buf,
                  const E* x_rows, A* x, long x_stride, Range out_blocks, bool projected, Barrier* joint,
                  bool counted) {
        const long dir = g.direction, row0 = c.row_start[t] + g.rows_begin;
        const E* h_prev = d[dir].h[step & 1];
        E* h_next = d[dir].h[(step + 1) & 1];
        const E* a = h_prev + g.rows_begin * s.ld_p;
        const Rows to = rows_of(g, h_prev, h_next, step);
        const long group = panels_together(m);
        // Every other step runs backwards through the weights, and meets in a cache what the one before read
        // last.
        const bool backwards = step % 2;
        for (long at = 0; m > 0 && at < panels; at += group) {
            const long count = min_of(group, panels - at), p = backwards ? panels - at - count : at;
            A* out = CellT::APART ? buf.r : x + p * x_stride;
            if (lying_h) {
                for (long i = 0; i < count; ++i) {
                    const long j = backwards ? count - 1 - i : i;
                    gates_as_they_lie(c.weights[dir].w_hh, c.P, p0 + p + j, backwards, m, a, s.ld_p,
                                      out + j * (CellT::APART ? m * W : x_stride), !CellT::APART);
                }
            } else if (passing) {
                for (long i = 0; i < count; ++i)
                    gates_in_passing(c.weights[dir].w_hh, c.P, p0 + p + i, buf.panel, m, a, s.ld_p,
                                     out + i * (CellT::APART ? m * W : x_stride), !CellT::APART);
            } else if (CAN_BE_AT_ONCE && at_once) {
                if constexpr (CAN_BE_AT_ONCE)
                    for (long i = 0; i < count; ++i)
                        gates_of_both<CellT>(m, x_rows, s.ld_i, d[dir].w_ih, c.I, a, s.ld_p, d[dir].w_hh, c.P,
                                             p0 + p + i, x + (p + i) * x_stride);
            } else if (steps_of_one_row(c)) {
                gates_of_row<CellT, E, A>(a, d[dir].w_hh, p0 + p, count, c.P, out,
                                          CellT::APART ? W : x_stride, !CellT::APART);
            } else {
                const long next = !backwards ? p + count : p ? max_of(0, p - group) : -1;
                gates_times<CellT, E, A>(m, a, s.ld_p, d[dir].w_hh, p0 + p, count, c.P, out,
                                         CellT::APART ? m * W : x_stride, !CellT::APART,
                                         next < panels && next >= 0 ? p0 + next : -1);
            }
            if (m == 1) {
                cell_panels(dir, p0 + p, count, x + p * x_stride, x_stride, buf.r, to);
            } else {
                for (long i = 0; i < count; ++i)
                    cell_rows(dir, p0 + p + i, m, x + (p + i) * x_stride, buf.r + i * m * W, to);
            }
        }
        if (projected) {
            meet(joint, g, counted);
            const E* full = d[dir].h_full + g.rows_begin * s.ld_h;
            for (long p = out_blocks.begin; m > 0 && p < out_blocks.end; ++p) {
                E* h = h_next + g.rows_begin * s.ld_p + p * 2 * n;
                A* to;  // of the sums: h itself, unless it is rounded
                long ldo = s.ld_p;
                if constexpr (ROUNDED) {
                    to = buf.r, ldo = 2 * n;
                } else {
                    to = h;
                }
                if (lying_h) {
                    project_as_it_lies(dir, p * 2 * n, m, full, to, ldo);
                } else if (steps_of_one_row(c)) {
                    row_times<E, 2>(full, packed_panels(d[dir].w_hr, c.H, 2 * n, p), 1, c.H, to, 0, false);
                } else {
                    gemm<E, 2>(m, full, s.ld_h, packed_panels(d[dir].w_hr, c.H, 2 * n, p), 1, c.H, to, ldo, 0,
                               false);
                }
                for (long b = 0; b < m; ++b)
                    for (long j = 0; j < min_of(c.P - p * 2 * n, 2 * n); j += n) {
                        const Vec<A> sums = load<A>(to + b * ldo + j);
                        const long unit = p * 2 * n + j;
                        store_n<A>(static_cast<S*>(c.output) + ((row0 + b) * c.D + dir) * c.P + unit, sums,
                                   c.P - unit);
                        if (ROUNDED) store_n<A>(h + b * s.ld_p + j, sums, c.P - unit);
                    }
            }
        }
        return end_step(joint, g, counted);
    }

    // Rows [next, m) of the group end with this step: their state is final.
    void finish_rows(const Group& g, long step, long next, long m, Range blocks, Range out_blocks) {
        const long dir = g.direction;
        const bool projected = c.weights[dir].w_hr != nullptr;
        Range h_units = projected ? out_blocks : blocks;
        for (long b = g.rows_begin + next; b < g.rows_begin + m; ++b) {
            long j = h_units.begin * Sh::BLOCK, end = min_of(c.P, h_units.end * Sh::BLOCK);
            if (c.h_n && j < end)
                write_row(static_cast<S*>(c.h_n) + (dir * c.B + b) * c.P,
                          d[dir].h[(step + 1) & 1] + b * s.ld_p, j, end);
            if (!CellT::HAS_C) continue;
            j = blocks.begin * Sh::BLOCK, end = min_of(c.H, blocks.end * Sh::BLOCK);
            if (j < end)
                write_row(static_cast<S*>(c.c_n) + (dir * c.B + b) * c.H, d[dir].cell + b * s.ld_h, j, end);
        }
    }

    template <class From>
    static void write_row(S* to, const From* from, long begin, long end) {
        for (long j = begin; j < end; j += n) store_n<A>(to + j, load_whole<A>(from + j), end - j);
    }
};

template <class CellT, class A, class S>
unsigned long forward_bytes(const ForwardCall& c) {
    Arena arena{nullptr};
    ForwardScan<CellT, A, S> scan(c, arena);
    return arena.used;
}

template <class CellT, class A, class S>
void forward_run(const ForwardCall& c, char* shared, const Team& team) {
    Arena arena{shared};
    ForwardScan<CellT, A, S>(c, arena).run(team);
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
