// Which ISA runs, and on how many threads.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "attention_call.h"
#include "linear_call.h"
#include "scan_call.h"

namespace seqkern {

std::vector<std::string> isas();                         // compiled in and run by this machine, the best last
std::string cpu_vendor();                                // "amd", "intel" or another: ""
void force_isa(const std::optional<std::string>& name);  // std::invalid_argument where it is not among them
void force_order(std::optional<bool> in_order);  // whether few queries read in order; none: by the processor
const KernelTable& kernels();                    // in use

// Memory of this size is walked through more often than the processor remembers addresses of small pages, and
// where it is fresh the system clears it page by page.
constexpr unsigned long HUGE_PAGE = 2u << 20, WORTH_HUGE_PAGES = 2 * HUGE_PAGE;
void prefer_huge_pages(void* p, unsigned long bytes);  // a wish: without it pages are small

int max_threads();  // of a call from this thread

[[noreturn]] void no_memory(
    const std::string& wanted);  // std::runtime_error in torch's words, which callers look for

// Runs fn(context, team) on up to `threads` threads; fewer where the system gives fewer.
void run_team(int threads, void (*fn)(void* context, const Team& team), void* context);

void scan_forward(const ForwardCall& call);
void scan_backward(const BackwardCall& call);
void attention_forward(AttentionForward call);
void attention_backward(const AttentionBackward& call);
void transformer_step(StepCall call);
void linear(const LinearCall& call);
void product(const Product& call);
void ending(const Ending& call);

double fma_peak(double seconds);                             // GFLOP/s, all threads, float32
double read_bandwidth(unsigned long bytes, double seconds);  // GB/s, all threads, each its own share

}  // namespace seqkern
