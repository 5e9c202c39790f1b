#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <omp.h>
#include <pthread.h>
#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <utility>

#include "team.h"

extern "C" int omp_pause_resource_all(omp_pause_resource_t) noexcept __attribute__((weak));

namespace seqkern {
namespace {

bool runs(const std::string& name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (name == "avx2")
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("f16c");
    if (name == "avx512")
        return runs("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (name == "avx512bf16") return runs("avx512") && __builtin_cpu_supports("avx512bf16");
#endif
    return name == "baseline";
}

struct Isa {
    const KernelTable* kernels;
    const AttentionTable* attention;
    const LinearTable* linear;
};

const std::vector<Isa>& tables() {
    static const auto found = [] {
        struct Known {
            const char* name;
            decltype(&isa_baseline_table) kernels;
            decltype(&attention_baseline_table) attention;
            decltype(&linear_baseline_table) linear;
        };
        const Known known[] = {
            {"baseline", isa_baseline_table, attention_baseline_table, linear_baseline_table},
            {"avx2", isa_avx2_table, attention_avx2_table, linear_avx2_table},
            {"avx512", isa_avx512_table, attention_avx512_table, linear_avx512_table},
            {"avx512bf16", isa_avx512bf16_table, attention_avx512bf16_table, linear_avx512bf16_table},
        };
        // A table is asked for only where it runs: making it may take instructions of its own.
        std::vector<Isa> list;
        for (const Known& isa : known)
            if (runs(isa.name) && isa.kernels())
                list.push_back({isa.kernels(), isa.attention(), isa.linear()});
        return list;
    }();
    return found;
}

std::atomic<const Isa*> forced_isa{nullptr};

// AMD's since "Zen 5": a core takes twice as much in the order of addresses as from several places by turns,
// where those before it run ahead farther of several (docs/decisions.md).
bool is_zen5() {
#if defined(__x86_64__)
    unsigned int version = 0, ebx, ecx, edx;
    __builtin_cpu_init();
    if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &version, &ebx, &ecx, &edx)) return false;
    const unsigned int family = (version >> 8 & 0xf) + (version >> 20 & 0xff);
    return family >= 26;
#else
    return false;
#endif
}
std::atomic<int> forced_order{-1};

bool reads_in_order() {
    static const bool best = is_zen5();
    const int forced = forced_order.load(std::memory_order_relaxed);
    return forced < 0 ? best : forced;
}

const Isa& in_use() {
    const Isa* forced = forced_isa.load(std::memory_order_relaxed);
    return forced ? *forced : tables().back();
}

// libgomp's pool does not survive a fork: in the child, a parallel region, torch's too, would wait for
// threads that are not there. So the thread that forks gives its pool up before, and the next region of
// either process makes a new one. Where that cannot be done the child works alone.
std::atomic<bool> forked{false};
thread_local bool pool_is_gone = false;
const int registered =
    pthread_atfork([] { pool_is_gone = omp_pause_resource_all && !omp_pause_resource_all(omp_pause_soft); },
                   nullptr, [] { forked = forked || !pool_is_gone; });

// A thread more is worth its start and its barriers from about this much work on.
constexpr double FLOP_WORTH_A_THREAD = 150e3;
// What a number that stands behind a product takes, in the time of that: it waits for memory.
constexpr double FLOP_OF_AN_ENDING = 30;

using Clock = std::chrono::steady_clock;

// `Barrier::lost` of this process, and until when no call may need a barrier in every step. Both in
// nanoseconds.
std::atomic<long> lost_waiting{0}, crowded_until{0};
constexpr long CROWDED_FOR = 200'000'000;

// What the team of a call, and its groups that met in every step, lost. After a time alone half of a crowd is
// enough.
void settle(Barrier* barriers, int threads) {
    const long now = nanoseconds();
    long most = 0;
    bool met = false;
    for (int i = 0; i <= threads; ++i) {
        Barrier& b = barriers[i];
        if (!b.phase || (i == threads && !b.waited)) continue;
        met = true;
        b.settle(b.waited, now);
        const bool crowd = b.alone_from || b.lost > Barrier::CROWD;
        if (crowd) crowded_until = now + CROWDED_FOR;
        most = std::max(most, crowd ? Barrier::CROWD / 2 : b.lost);
    }
    if (met) lost_waiting = most;
}

int threads_worth(double flop) {
    return static_cast<int>(std::clamp(flop / FLOP_WORTH_A_THREAD, 1.0, static_cast<double>(max_threads())));
}

double flop(const AttentionCall& c) {
    return 2.0 * static_cast<double>(c.total_q * c.Hq) * static_cast<double>(c.S) *
           static_cast<double>(c.D + c.Dv);
}

int threads_for(const AttentionForward& c) { return threads_worth(flop(c)); }
int threads_for(const AttentionBackward& c) { return threads_worth(2.5 * flop(c)); }

int threads_for(const LinearCall& c) {
    return threads_worth(2.0 * static_cast<double>(c.rows) * static_cast<double>(c.K * c.N));
}

int threads_for(const StepCall& c) {
    const double weights = static_cast<double>(c.E) * ((c.remembers ? 6.0 : 4.0) * c.E + 2.0 * c.F);
    const double attention = flop(c.own) + (c.remembers ? flop(c.memory) : 0);
    return threads_worth(2.0 * static_cast<double>(c.B) * weights + attention);
}

int threads_for(const Product& c) {
    return threads_worth(2.0 * static_cast<double>(c.rows) * static_cast<double>(c.columns * c.depth));
}

int threads_for(const Ending& c) {
    return threads_worth(FLOP_OF_AN_ENDING * static_cast<double>(c.rows * c.columns));
}

int threads_for(const Layer& c) {
    const double gates = c.cell == Cell::lstm ? 4 : c.cell == Cell::gru ? 3 : 1;
    const double flop = 2.0 * gates * c.H * (c.I + c.P) * c.N * c.D;
    double most = max_threads();
    if (nanoseconds() < crowded_until.load(std::memory_order_relaxed))
        most = std::min(most, static_cast<double>(c.D * std::max(1L, c.B / ROWS_WORTH_A_THREAD)));
    return static_cast<int>(std::clamp(flop / FLOP_WORTH_A_THREAD, 1.0, most));
}

}  // namespace

void prefer_huge_pages([[maybe_unused]] void* p, [[maybe_unused]] unsigned long bytes) {
#ifdef MADV_HUGEPAGE
    constexpr unsigned long PAGE = 4096;
    const auto from = (reinterpret_cast<unsigned long>(p) + PAGE - 1) / PAGE * PAGE;
    const auto to = (reinterpret_cast<unsigned long>(p) + bytes) / PAGE * PAGE;
    madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

namespace {

// New memory costs a fault and a cleared page for every 4 KB of it, as much time as a small call's
// arithmetic. A thread keeps a few blocks of its own, and one that is larger, as the packed weights of a wide
// layer, where all threads together have not kept too much.
class KeptMemory {
  public:
    ~KeptMemory() {
        while (count_) std::free(remove(0));
        drop_large();
    }

    void* take(unsigned long bytes) {
        const bool huge = bytes >= WORTH_HUGE_PAGES;
        if (huge) bytes = (bytes + sizeof(Block) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE - sizeof(Block);
        if (bytes > MOST_KEPT) {
            if (!large_ || large_->bytes < bytes) return drop_large(), fresh(bytes, huge);
            large_kept -= large_->bytes;
            return std::exchange(large_, nullptr) + 1;
        }
        int i = 0;
        while (i < count_ && blocks_[i]->bytes < bytes) ++i;  // to the smallest that fits
        return i < count_ ? remove(i) + 1 : fresh(bytes, huge);
    }

    void give(void* p) {
        if (!p) return;
        Block* block = static_cast<Block*>(p) - 1;
        if (block->bytes > MOST_KEPT) return give_large(block);
        while (count_ == MOST_BLOCKS || kept_ + block->bytes > MOST_KEPT) std::free(remove(0));
        int i = count_++;
        for (; i > 0 && blocks_[i - 1]->bytes > block->bytes; --i) blocks_[i] = blocks_[i - 1];
        blocks_[i] = block;
        kept_ += block->bytes;
    }

    // In the child of a fork the other threads' blocks are nobody's.
    void forget_others() { large_kept = large_ ? large_->bytes : 0; }

  private:
    struct alignas(64) Block {
        unsigned long bytes;
    };
    static constexpr unsigned long MOST_KEPT = 8u << 20;    // of a thread, in blocks of up to this size
    static constexpr unsigned long MOST_LARGE = 64u << 20;  // of all threads, in larger ones
    static constexpr int MOST_BLOCKS = 8;

    static void* fresh(unsigned long bytes, [[maybe_unused]] bool huge) {
        void* p = nullptr;
        if (posix_memalign(&p, huge ? HUGE_PAGE : alignof(Block), sizeof(Block) + bytes)) return nullptr;
        if (huge) prefer_huge_pages(p, sizeof(Block) + bytes);
        return new (p) Block{bytes} + 1;
    }

    Block* remove(int i) {
        Block* block = blocks_[i];
        std::copy(blocks_ + i + 1, blocks_ + count_, blocks_ + i);
        --count_;
        kept_ -= block->bytes;
        return block;
    }

    void give_large(Block* block) {
        if (large_ && large_->bytes >= block->bytes) return std::free(block);
        drop_large();
        if ((large_kept += block->bytes) <= MOST_LARGE) {
            large_ = block;
        } else {
            large_kept -= block->bytes;
            std::free(block);
        }
    }

    void drop_large() {
        if (large_) large_kept -= large_->bytes;
        std::free(std::exchange(large_, nullptr));
    }

    static inline std::atomic<unsigned long> large_kept{0};
    Block* blocks_[MOST_BLOCKS];  // by size
    int count_ = 0;
    unsigned long kept_ = 0;
    Block* large_ = nullptr;
};

thread_local KeptMemory kept_memory;
const int forgetting = pthread_atfork(nullptr, nullptr, [] { kept_memory.forget_others(); });

template <class Call>
void run(const Call& call, unsigned long bytes, void (*kernel)(const Call&, char*, const Team&)) {
    struct Context {
        const Call& call;
        char* shared;
        void (*kernel)(const Call&, char*, const Team&);
    };
    Scratch shared(bytes);
    if (!shared.p) no_memory(std::to_string(bytes) + " bytes for a kernel");
    Context context{call, static_cast<char*>(shared.p), kernel};
    run_team(
        threads_for(call),
        [](void* p, const Team& team) {
            auto& c = *static_cast<Context*>(p);
            c.kernel(c.call, c.shared, team);
        },
        &context);
}

struct Probe {
    const KernelTable& table;
    double seconds;
    const float* data;
    long count;
    std::atomic<double> rate{0};
};

double elapsed(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

// Repeats `piece` (which does `amount` of work) on every thread; the sum of the threads' rates.
template <class F>
void measure(Probe& probe, double amount, F piece) {
    double kept = 0, done = 0;
    const auto start = Clock::now();
    double past = 0;
    for (; past < probe.seconds; past = elapsed(start)) kept += piece(), done += amount;
    volatile double keep = kept;
    static_cast<void>(keep);
    double rate = probe.rate.load();
    while (!probe.rate.compare_exchange_weak(rate, rate + done / past / 1e9)) {
    }
}

}  // namespace

void* take_scratch(unsigned long bytes) {
#ifdef __SANITIZE_ADDRESS__  // memory of exactly this size, and not a number
    void* p = nullptr;
    return posix_memalign(&p, 64, bytes + 64) ? nullptr : std::memset(p, 0xff, bytes + 64);
#else
    return kept_memory.take(bytes + 64);
#endif
}

void give_scratch(void* p) {
#ifdef __SANITIZE_ADDRESS__
    std::free(p);
#else
    kept_memory.give(p);
#endif
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Isa& isa : tables()) names.emplace_back(isa.kernels->name);
    return names;
}

std::string cpu_vendor() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_is("amd")) return "amd";
    if (__builtin_cpu_is("intel")) return "intel";
#endif
    return "";
}

void force_order(std::optional<bool> in_order) { forced_order = in_order ? *in_order : -1; }

void force_isa(const std::optional<std::string>& name) {
    if (!name) {
        forced_isa = nullptr;
        return;
    }
    std::string known;
    for (const Isa& isa : tables()) {
        if (*name == isa.kernels->name) {
            forced_isa = &isa;
            return;
        }
        known += (known.empty() ? "" : ", ") + std::string(isa.kernels->name);
    }
    throw std::invalid_argument("isa is '" + *name + "', this machine runs " + known);
}

const KernelTable& kernels() { return *in_use().kernels; }

int max_threads() {
    if (forked || omp_in_parallel()) return 1;
    return std::max<int>(1, torch::stable::get_num_threads());
}

void no_memory(const std::string& wanted) {
    throw std::runtime_error("seqkern: DefaultCPUAllocator: can't allocate memory: you tried to allocate " +
                             wanted);
}

void run_team(int threads, void (*fn)(void*, const Team&), void* context) {
    int failed = 0;
    if (threads == 1) {
        Barrier barriers[2];
        fn(context, Team{0, 1, barriers, &failed});
    } else {
        auto barriers = std::make_unique<Barrier[]>(threads + 1);
        const long now = nanoseconds(), lost = lost_waiting;
        for (int i = 0; i <= threads; ++i) barriers[i].since = now, barriers[i].lost = lost;
#pragma omp parallel num_threads(threads)
        fn(context, Team{omp_get_thread_num(), omp_get_num_threads(), barriers.get(), &failed});
        settle(&barriers[0], threads);
    }
    if (failed) no_memory("memory for a kernel's threads");
}

void scan_forward(const ForwardCall& call) {
    const KernelTable& table = kernels();
    run(call, table.forward_shared_bytes(call), table.forward);
}

void scan_backward(const BackwardCall& call) {
    const KernelTable& table = kernels();
    run(call, table.backward_shared_bytes(call), table.backward);
}

void attention_forward(AttentionForward call) {
    const AttentionTable& table = *in_use().attention;
    call.threads = threads_for(call);
    call.in_order = reads_in_order();
    run(call, table.forward_shared_bytes(call), table.forward);
}

void attention_backward(const AttentionBackward& call) {
    const AttentionTable& table = *in_use().attention;
    run(call, table.backward_shared_bytes(call), table.backward);
}

void transformer_step(StepCall call) {
    const AttentionTable& table = *in_use().attention;
    call.own.threads = call.memory.threads = threads_for(call);
    call.own.in_order = call.memory.in_order = reads_in_order();
    run(call, table.step_shared_bytes(call), table.step);
}

void linear(const LinearCall& call) {
    const LinearTable& table = *in_use().linear;
    run(call, table.shared_bytes(call), table.run);
}

void product(const Product& call) { run(call, 0, in_use().linear->product); }

void ending(const Ending& call) { run(call, 0, in_use().linear->ending); }

double fma_peak(double seconds) {
    Probe probe{kernels(), seconds, nullptr, 0};
    run_team(
        max_threads(),
        [](void* p, const Team&) {
            auto& probe = *static_cast<Probe*>(p);
            constexpr long ROUNDS = 20000;
            measure(probe, static_cast<double>(ROUNDS * probe.table.flops_per_round),
                    [&] { return probe.table.fma_chain(ROUNDS); });
        },
        &probe);
    return probe.rate;
}

double read_bandwidth(unsigned long bytes, double seconds) {
    Scratch memory(bytes);
    if (!memory.p) no_memory(std::to_string(bytes) + " bytes");
    auto data = static_cast<float*>(memory.p);
    const long count = static_cast<long>(bytes / sizeof(float));
    std::fill(data, data + count, 1.0f);
    Probe probe{kernels(), seconds, data, count};
    run_team(
        max_threads(),
        [](void* p, const Team& team) {
            auto& probe = *static_cast<Probe*>(p);
            const long share = probe.count / team.threads;
            const float* from = probe.data + share * team.thread;
            const long passes = std::max(1L, 4000000 / std::max(1L, share));  // the clock must not weigh in
            measure(probe, static_cast<double>(passes * share) * sizeof(float), [&] {
                double sum = 0;
                for (long i = 0; i < passes; ++i) sum += probe.table.read_sum(from, share);
                return sum;
            });
        },
        &probe);
    return probe.rate;
}

}  // namespace seqkern
