// How many threads compute. A parallel region ends when its last thread does, and beside other busy processes that one
// may be waiting for a core: then fewer threads can be faster.
#pragma once
#include <ATen/Parallel.h>
#include <ctime>
#include "tuning.h"

namespace qwen_fast {
inline int64_t most_threads = INT64_MAX;  // in the present pass; one for all translation units
}

namespace {

using qwen_fast::most_threads;

// Of a parallel region.
inline i64 threads() { return std::min<i64>(at::get_num_threads(), most_threads); }

// CLOCK_MONOTONIC, or CLOCK_PROCESS_CPUTIME_ID: of all threads together
inline double seconds(clockid_t clock) {
    timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

// Passes of one kind, and the number of threads that is fastest for them: all, as long as the system leaves them their
// cores, so that they compute, or wait spinning, all the time. When it does not, and as long as fewer are used, a few
// passes now and then try one less or one more (of many threads a quarter).
class Team {
    i64 all = 0, size = 0, trial = 0;  // threads: that there are, that are used, that are being tried (0: none)
    i64 passes = 0;                    // since the last decision
    double wall = 0, cpu = 0;          // seconds that they took
    double per_pass = 0;               // the same with `size` threads, before the trial
    i64 windows = 1;                   // before the next trial
    bool up = false;                   // what was tried last

    void judge() {
        const bool faster = wall / passes < TRIAL_FASTER * per_pass;
        windows = faster ? 1 : std::min(2 * windows, MOST_WINDOWS);
        if (faster) size = trial;
        trial = 0;
    }
    void choose_trial() {
        per_pass = wall / passes;
        if (size == all && cpu >= CPU_SHARE * all * wall) {
            windows = 1;
            return;
        }
        up = size < all && (size == 1 || !up);
        const i64 step = (size + 3) / 4;
        trial = up ? std::min(all, size + step) : size - std::min(step, size - 1);
    }

public:
    // How many threads, of those that there are, the next pass shall use
    i64 begin(i64 there_are) {
        if (there_are != all) *this = Team(), all = size = there_are;
        return trial ? trial : size;
    }
    void end(double wall_seconds, double cpu_seconds) {
        wall += wall_seconds, cpu += cpu_seconds, passes++;
        if (passes < (trial ? TRIAL_PASSES : WINDOW_PASSES * windows)) return;
        if (trial) judge();
        else choose_trial();
        wall = cpu = passes = 0;
    }
    template <typename F> void run(F pass) {
        const i64 there_are = at::get_num_threads();
        if (there_are == 1) return pass();
        const double start = seconds(CLOCK_MONOTONIC), start_cpu = seconds(CLOCK_PROCESS_CPUTIME_ID);
        most_threads = begin(there_are);
        pass();
        most_threads = INT64_MAX;
        end(seconds(CLOCK_MONOTONIC) - start, seconds(CLOCK_PROCESS_CPUTIME_ID) - start_cpu);
    }
};

}  // namespace
