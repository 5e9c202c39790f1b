// One position of each sequence through a layer of a transformer, in one call: weights are read once and as
// they lie. What lies between two products is little work and computed by every thread for itself, which
// saves a barrier and leaves the input of the next product in its own cache.
#pragma once

#include "attention_run.h"
#include "norm.h"

namespace seqkern {
namespace SEQKERN_ISA {

// What the threads share; with base null it only counts.
template <class A, class S>
struct StepShared {
    Arena arena;
    long ld, ld_wide;
    A *stream,
        *wide;     // what runs through the layer, [B][ld], and the inside of the feed-forward, [B][ld_wide]
    S *q, *heads;  // [B, E], of the attention at hand
    A* lse;
    char* attention;

    StepShared(const StepCall& c, char* base)
        : arena{base}, ld(buffer_ld<A>(c.E)), ld_wide(buffer_ld<A>(c.F)) {
        stream = arena.take<A>(c.B * ld), wide = arena.take<A>(c.B * ld_wide);
        q = arena.take<S>(c.B * c.E), heads = arena.take<S>(c.B * c.E);
        lse = arena.take<A>(c.B * c.own.Hq);
        const unsigned long own = attention_forward_bytes<A, S>(c.own),
                            memory = c.remembers ? attention_forward_bytes<A, S>(c.memory) : 0;
        attention = arena.take<char>(static_cast<long>(own > memory ? own : memory));
    }
};

template <class A, class S>
class Step : StepShared<A, S> {
    using Shared = StepShared<A, S>;
    using Shared::ld, Shared::ld_wide, Shared::stream, Shared::wide, Shared::q, Shared::heads, Shared::lse,
        Shared::attention;
    static constexpr long n = Simd<A>::n;
    const StepCall& c;
    const Team& team;
    A *base, *rows;  // a thread's own [B][ld]: what a part is added to, and what it is computed from

    SK_INLINE void meet() const { barrier(&team.barriers[team.threads], team.threads); }
    bool gave_up() const { return __atomic_load_n(team.failed, __ATOMIC_RELAXED); }

    // [B, E] of the storage's type -> rows [B][ld], with zeros up to a whole vector.
    void widen_rows(const S* from, A* to) const {
        for (long b = 0; b < c.B; ++b)
            for (long i = 0; i < c.E; i += n)
                store<A>(to + b * ld + i, load_n<A>(from + b * c.E + i, c.E - i));
    }

    // rows and base for the part whose norm is norms[part].
    void begin_part(int part) {
        if (part == 0) {
            widen_rows(static_cast<const S*>(c.x), base);
        } else {
            for (long b = 0; b < c.B; ++b) {
                A* to = base + b * ld;
                if (c.norm_first)
                    copy_row<A>(to, stream + b * ld, ld - n);
                else
                    normalize_row<A, S>(c.norms[part - 1], c.E, stream + b * ld, to);
            }
        }
        for (long b = 0; b < c.B; ++b) {
            if (c.norm_first)
                normalize_row<A, S>(c.norms[part], c.E, base + b * ld, rows + b * ld);
            else
                copy_row<A>(rows + b * ld, base + b * ld, ld - n);
        }
    }

    // put(row, j, count, v) for the products of x with a thread's share of the weights' rows first..first +
    // N.
    template <class Put>
    void multiply(const Weights& w, long first, long N, long K, const A* x, long ldx, const Put& put) const {
        const S* bias = static_cast<const S*>(w.b) + (w.b ? first : 0);
        few_rows<A>(static_cast<const S*>(w.w) + first * w.ld, w.ld, K, N, x, ldx, c.B, team.thread,
                    team.threads, [&](long row, long j, long count, Vec<A> v) {
                        if (w.b) v += load_n<A>(bias + j, count);
                        put(row, j, count, v);
                    });
    }

    // stream = base + what the weights make of x.
    void add_to_stream(const Weights& w, long K, const A* x, long ldx) {
        multiply(w, 0, c.E, K, x, ldx, [&](long row, long j, long count, Vec<A> v) {
            const auto there = lanes<A>([](int lane) { return lane; }) < static_cast<int>(count);
            store<A>(stream + row * ld + j, there ? load<A>(base + row * ld + j) + v : Vec<A>{});
        });
    }

    void ask(const Weights& w) {
        multiply(w, 0, c.E, c.E, rows, ld,
                 [&](long row, long j, long count, Vec<A> v) { store_n<A>(q + row * c.E + j, v, count); });
    }

    void keep(long part, const Result& to) {
        const long D = c.own.D;
        multiply(c.own_in, part * c.E, c.E, c.E, rows, ld, [&](long row, long j, long count, Vec<A> v) {
            S* at = static_cast<S*>(to.p) + row * to.b + j / D * to.h + j % D;
            if (j % D + count <= D) return store_n<A>(at, v, count);
            for (long lane = 0; lane < count; ++lane)  // over the end of a head
                narrow(static_cast<S*>(to.p) + row * to.b + (j + lane) / D * to.h + (j + lane) % D, v[lane]);
        });
    }

    // The attention of q, and its output's projection into the stream. False: no memory. It waits for q
    // itself.
    bool attend(const AttentionForward& call, const Weights& out) {
        AttentionForward a = call;
        a.q = {q, c.E, a.D, c.E};
        a.output = {heads, c.E, a.D, c.E};
        a.lse = {lse, a.Hq, 1, 1};
        attention_forward_run<A, S>(a, attention, team);
        meet();
        if (gave_up()) return false;
        widen_rows(heads, rows);
        add_to_stream(out, c.E, rows, ld);
        meet();
        return true;
    }

    void finish() {
        const Range mine = share(c.B, team.thread, team.threads);
        for (long b = mine.begin; b < mine.end; ++b) {
            normalize_row<A, S>(c.norms[c.remembers ? 2 : 1], c.E, stream + b * ld, rows);
            for (long i = 0; i < c.E; i += n)
                store_n<A>(static_cast<S*>(c.y) + b * c.E + i, load<A>(rows + i), c.E - i);
        }
    }

  public:
    Step(const StepCall& c, char* shared, const Team& team, A* own)
        : Shared(c, shared), c(c), team(team), base(own), rows(own + c.B * ld) {}

    void run() {
        meet();  // all have seen that all came with their memory, before one may lack some further on
        begin_part(0);
        ask(c.own_in);
        keep(1, c.new_k);
        keep(2, c.new_v);
        if (!attend(c.own, c.own_out)) return;
        int part = 1;
        if (c.remembers) {
            begin_part(part++);
            ask(c.memory_in);
            if (!attend(c.memory, c.memory_out)) return;
        }
        begin_part(part);
        multiply(c.up, 0, c.F, c.E, rows, ld, [&](long row, long j, long count, Vec<A> v) {
            store_n<A>(wide + row * ld_wide + j, activated<A>(c.activation, v), count);
        });
        meet();
        if (!c.norm_first) {
            add_to_stream(c.down, c.F, wide, ld_wide);
            meet();
            return finish();
        }
        multiply(c.down, 0, c.E, c.F, wide, ld_wide, [&](long row, long j, long count, Vec<A> v) {
            store_n<A>(static_cast<S*>(c.y) + row * c.E + j, load<A>(base + row * ld + j) + v, count);
        });
    }
};

template <class A, class S>
unsigned long step_bytes(const StepCall& c) {
    return StepShared<A, S>(c, nullptr).arena.used;
}

template <class A, class S>
void step_run(const StepCall& c, char* shared, const Team& team) {
    Scratch own(2 * sizeof(A) * static_cast<unsigned long>(c.B * buffer_ld<A>(c.E)));
    if (all_ready(team, own.p)) Step<A, S>(c, shared, team, static_cast<A*>(own.p)).run();
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
