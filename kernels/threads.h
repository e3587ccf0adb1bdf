// Parallel regions that do not wait for a thread which has no core. OpenMP's begin and end with all threads: beside
// other busy processes each region lasts until the system has given its last thread a turn, of milliseconds. Here the
// calling thread begins by itself, the others come when they can, and only those are waited for that have begun.
#pragma once
#include <ATen/Parallel.h>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#ifdef __linux__
#include <linux/futex.h>
#include <omp.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <climits>
#include <ctime>
#include <vector>
#endif
#include "tuning.h"

namespace qwen_fast {

// What is asked of the system; elsewhere than on Linux it alone decides which thread has which core. A thread is its
// number: that of one that has ended is refused.
#ifdef __linux__
// std::atomic::wait first calls sched_yield, and so gives up a share of the core that is not given back.
inline void sleep_while(std::atomic<int>& value, int is) { syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, is, NULL); }
inline void wake(std::atomic<int>& value) { syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, INT_MAX); }
inline int this_thread() { return syscall(SYS_gettid); }
inline int this_core() { return sched_getcpu(); }
// Seconds that a thread has had a core
inline double computed(int thread) {
    timespec t{};
    clock_gettime(~(clockid_t)thread << 3 | 6, &t);  // what pthread_getcpuclockid makes of a thread that still lives
    return t.tv_sec + 1e-9 * t.tv_nsec;
}
// A thread that waits for a core gets this one as soon as the present thread sleeps, and must stay or may leave it.
inline void hand_core_to(int thread, bool stays) {
    cpu_set_t before, here;
    CPU_ZERO(&here);
    CPU_SET(this_core(), &here);
    if (sched_getaffinity(thread, sizeof before, &before)) return;
    sched_setaffinity(thread, sizeof here, &here);
    if (!stays) sched_setaffinity(thread, sizeof before, &before);
}
// A thread may have every core that the caller may, and all to which OpenMP binds threads, but this one.
inline void keep_off(int thread, int caller, int core) {
    cpu_set_t cores;
    if (sched_getaffinity(caller, sizeof cores, &cores)) return;
    for (int place = 0; place < omp_get_num_places(); place++) {
        std::vector<int> ids(omp_get_place_num_procs(place));
        omp_get_place_proc_ids(place, ids.data());
        for (const int id : ids) CPU_SET(id, &cores);
    }
    CPU_CLR(core, &cores);
    if (CPU_COUNT(&cores)) sched_setaffinity(thread, sizeof cores, &cores);
}
#else
inline void sleep_while(std::atomic<int>& value, int is) { value.wait(is); }
inline void wake(std::atomic<int>& value) { value.notify_all(); }
inline int this_thread() { return 1; }
inline int this_core() { return 0; }
inline double computed(int) {
    static std::atomic<int> always;
    return always++;
}
inline void hand_core_to(int, bool) {}
inline void keep_off(int, int, int) {}
#endif

// Waits with its core for so many seconds at most; whether done() became true
template <typename F> bool spin(double seconds, F done) {
    const auto now = [] { return std::chrono::steady_clock::now(); };
    const auto end = now() + std::chrono::duration<double>(seconds);
    do {
        for (int i = 0; i < 8; i++) {
            if (done()) return true;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#elif defined(__aarch64__)
            asm volatile("isb");
#endif
        }
    } while (now() < end);
    return false;
}

class Crew {
    struct alignas(64) Helper {
        std::atomic<int> inside{0};  // 1: of a region; 2: and the caller sleeps until it is not
        std::atomic<int> thread{0};
    };
    std::mutex in_use;
    std::deque<Helper> helpers;
    alignas(64) std::atomic<int> region{0};  // counts their beginnings and ends: odd within one
    std::atomic<int64_t> most{0};            // threads of the region
    std::atomic<int> caller{0};              // whose the region is
    std::atomic<int> core{-1};               // the caller's, which helpers are kept off; -1: to be settled again
    std::atomic<bool> handing{false};        // its core to the caller: one helper at a time, which restores the mask
    std::atomic<int> sleeping{0};            // helpers
    void (*run)(const void*, int64_t) noexcept;
    const void* argument;

    // Whether a thread has a core
    static bool computes(int thread) {
        const double before = computed(thread);
        spin(LATE, [] { return false; });
        return computed(thread) > before;
    }
    // A helper's life. Where the caller has lost its core, it gets that of the first helper with nothing to do.
    void help(Helper& me, int64_t number) {
        me.thread = this_thread();
        wake(me.thread);
        int seen = 0, now;
        const auto open = [&] { return (now = region) % 2 && now != seen && number < most; };
        while (true) {
            if (!spin(SPIN, open)) {
                if (number < most && !computes(caller) && !handing.exchange(true)) {
                    hand_core_to(caller, false);
                    core = -1;
                    handing = false;
                }
                sleeping++;
                if (!open()) sleep_while(region, now);
                sleeping--;
                continue;
            }
            me.inside = 1;
            if (open()) run(argument, number), seen = now;
            if (me.inside.exchange(0) == 2) {
                wake(me.inside);
                keep_off(me.thread, caller, this_core());
                core = -1;  // the caller may be elsewhere by now, or have been handed a core: it looks again
            }
        }
    }
    // Helpers that wake on the caller's core, where the system likes to put them, would only take turns with it.
    void begin(int64_t threads) {
        while ((int64_t)helpers.size() < threads - 1) {
            Helper& helper = helpers.emplace_back();
            try {
                std::thread([&, number = (int64_t)helpers.size()] { help(helper, number); }).detach();
            } catch (const std::system_error&) {  // the system gives no more threads
                helpers.pop_back();
                break;
            }
            while (!helper.thread) sleep_while(helper.thread, 0);
            core = -1;
        }
        caller = this_thread();
        most = threads;
        if (const int here = this_core(); here != core) {
            core = here;
            for (Helper& helper : helpers) keep_off(helper.thread, caller, here);
        }
        region++;
        if (sleeping) wake(region);
    }
    // A helper that has lost its core within a part goes on with the caller's, and then makes room again.
    void end() {
        region++;
        for (Helper& helper : helpers) {
            const auto outside = [&] { return !helper.inside; };
            while (!spin(SPIN, outside) && computes(helper.thread)) {}
            if (outside()) continue;
            hand_core_to(helper.thread, true);
            int one = 1;
            if (helper.inside.compare_exchange_strong(one, 2))
                while (helper.inside == 2) sleep_while(helper.inside, 2);
            else core = -1;
        }
    }

public:
    // f(thread): 0 is this thread, 1 .. threads - 1 are those that come before it ends
    template <typename F> void run_together(int64_t threads, const F& f) {
        const std::unique_lock lock(in_use, std::try_to_lock);
        if (threads <= 1 || !lock) return f(0);
        run = [](const void* f, int64_t thread) noexcept { (*(const F*)f)(thread); };
        argument = &f;
        begin(threads);
        run(argument, 0);
        end();
    }
};

// One for all translation units. It is never destroyed, as its threads do not end; a forked process has none of them.
inline Crew* crew = [] {
#ifdef __linux__
    pthread_atfork(nullptr, nullptr, [] { crew = new Crew; });
#endif
    return new Crew;
}();

}  // namespace qwen_fast

namespace {

inline i64 threads() { return at::get_num_threads(); }

// f(thread) by as many threads as there are and come, if that is worth it. Whichever they are, they must do all of it.
template <typename F> void together(bool worth, const F& f) {
    qwen_fast::crew->run_together(worth ? threads() : 1, f);
}

// 0 .. n in parts, each for whichever thread asks for it
class Parts {
    const i64 n, team = threads();
    std::atomic<i64> next{0};

public:
    explicit Parts(i64 n) : n(n) {}
    // f(i)
    template <typename F> void each(F f) {
        for (i64 i; (i = next++) < n;) f(i);
    }
    // f(begin, end) for smaller and smaller parts of what is left, `least` at least, so that no thread waits long for
    // another at the end. Their borders are multiples of `unit`.
    template <typename F> void shrinking(i64 unit, i64 least, F f) {
        for (i64 begin = next; begin < n;) {
            const i64 size = std::max((n - begin) / (2 * team), least);
            const i64 end = std::min(n, begin + (size / unit + 1) * unit);
            if (next.compare_exchange_weak(begin, end)) {
                f(begin, end);
                begin = next;
            }
        }
    }
};

// f(i) for all i < n
template <typename F> void for_each(bool worth, i64 n, const F& f) {
    Parts parts(n);
    together(worth, [&](i64) {
        parts.shrinking(1, 0, [&](i64 begin, i64 end) {
            for (i64 i = begin; i < end; i++) f(i);
        });
    });
}

}  // namespace
