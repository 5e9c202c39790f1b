// The forward of one call by a team of threads.
#pragma once

#include "attention_short.h"
#include "attention_weights.h"

namespace seqkern {
namespace SEQKERN_ISA {

// A line for the tickets, and what the parts of split keys leave.
template <class A, class S>
unsigned long attention_forward_bytes(const AttentionForward& c) {
    const ForwardPlan<A> plan(c);
    const long parts = plan.splits > 1 ? plan.units(c) * plan.together * plan.panel_size() : 0;
    return 64 + sizeof(A) * static_cast<unsigned long>(parts);
}

template <class A, class S>
void attention_forward_run(const AttentionForward& c, char* shared, const Team& team) {
    if (ShortRows<A, S>::serves(c)) {
        Scratch scratch(sizeof(A) * ShortRows<A, S>::numbers(c));
        A* memory = static_cast<A*>(scratch.p);
        if (!all_ready(team, memory)) return;
        return ShortRows<A, S>{c, memory}.run(team);
    }
    const unsigned long own = ForwardUnit<A, S>::bytes(c);
    unsigned long bytes = own;
    const bool keeps = KeptWeights<A, S>::serves(c);
    if (keeps)
        bytes += sizeof(A) * KeptWeights<A, S>(c, nullptr).numbers();
    else if (c.weights.p && WeightsUnit<A, S>::bytes(c) > bytes)
        bytes = WeightsUnit<A, S>::bytes(c);
    Scratch scratch(bytes);
    char* memory = static_cast<char*>(scratch.p);
    long* next = reinterpret_cast<long*>(shared);
    if (team.thread == 0) next[0] = next[1] = next[2] = 0;
    if (!all_ready(team, memory)) return;
    Barrier* all = &team.barriers[team.threads];
    ForwardUnit<A, S> unit(c, memory);
    if (keeps) {
        const KeptWeights<A, S> weights(c, reinterpret_cast<A*>(memory + own));
        for (long u; (u = take_ticket(next)) < weights.units();) weights.run(u, unit);
        return;
    }
    const auto& plan = unit.plan;
    const long units = plan.units(c), of_panel = plan.splits * plan.panel_size();
    A* parts = reinterpret_cast<A*>(shared + 64);
    for (long u; (u = take_ticket(next)) < units;) {
        const long split = u % plan.splits, rest = u / plan.splits;
        // The last queries of a causal call see most keys: they come first.
        const long at = plan.blocks - 1 - rest % plan.blocks, group = rest / plan.blocks;
        A* here = parts + (group * plan.blocks + at) * plan.together * of_panel;
        unit.run(sequence(c, group / c.Hkv), group % c.Hkv, at, split, here, unit.first_of(u + team.threads));
    }
    if (plan.splits > 1) {
        barrier(all, team.threads);
        const long panels = plan.blocks * plan.together;
        for (long u; (u = take_ticket(next + 1)) < c.B * c.Hkv * panels;) {
            const Sequence s = sequence(c, u / panels / c.Hkv);
            const HeadGroup<A> group(c, s, u / panels % c.Hkv);
            if (u % panels < group.panels()) unit.combine(s, group.panel(u % panels), parts + u * of_panel);
        }
    }
    if (!c.weights.p) return;
    barrier(all, team.threads);
    WeightsUnit<A, S> weights(c, memory);
    const long blocks = ceil_div(c.L, Panel<A>::W), heads = c.mean ? 1 : c.Hq;
    for (long u; (u = take_ticket(next + 2)) < c.B * heads * blocks;) {
        const long h = u / blocks % heads;
        weights.run(u / blocks / heads, c.mean ? 0 : h, c.mean ? c.Hq : h + 1, u % blocks * Panel<A>::W);
    }
}

}  // namespace SEQKERN_ISA
}  // namespace seqkern
