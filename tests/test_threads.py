"""Parallel regions that do not wait for a thread which has no core (kernels/threads.h)."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
PROGRAM = r"""
#include <cassert>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <sys/wait.h>
#include "threads.h"

static int count = 4;
namespace at { int get_num_threads() { return count; } }
static void wait_ms(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }
static cpu_set_t cores(int thread) {
    cpu_set_t set;
    sched_getaffinity(thread, sizeof set, &set);
    return set;
}

// Threads are stopped by a signal, as the system stops those that it has no core for.
static std::atomic<int> stopped{0}, go_on{0};
static void stop(int) {
    stopped++;
    while (!go_on) wait_ms(1);
}
static void stop_thread(int thread) {
    go_on = stopped = 0;
    syscall(SYS_tgkill, getpid(), thread, SIGUSR1);
    while (!stopped) wait_ms(1);
}
static std::atomic<int> helper{0};  // a thread besides this one, as soon as it has come
static void find_helper() {
    for (helper = 0; !helper;)
        together(true, [](i64 thread) {
            if (thread) helper = qwen_fast::this_thread();
            else for (int i = 0; !helper && i < 100; i++) wait_ms(1);
        });
}

static void everything_is_done_once() {
    for (count = 1; count <= 9; count += 2)
        for (i64 n = 0; n < 300; n++) {
            std::vector<std::atomic<int>> done(n), parts(n), each(n);
            for_each(true, n, [&](i64 i) { done[i]++; });
            Parts in_parts(n), one_by_one(n);
            together(true, [&](i64) {
                one_by_one.each([&](i64 i) { each[i]++; });
                in_parts.shrinking(7, n / 10, [&](i64 begin, i64 end) {
                    assert(begin % 7 == 0 && (end % 7 == 0 || end == n));
                    for (i64 i = begin; i < end; i++) parts[i]++;
                });
            });
            for (i64 i = 0; i < n; i++) assert(done[i] == 1 && parts[i] == 1 && each[i] == 1);
        }
}
static void threads_have_numbers_of_their_own() {
    for (count = 2; count <= 6; count++)
        for (int round = 0; round < 300; round++) {
            std::atomic<int> here[6] = {};
            together(true, [&](i64 thread) {
                assert(0 <= thread && thread < count && !here[thread]++);
                if (round < 3) wait_ms(1);
            });
        }
    together(false, [](i64 thread) { assert(thread == 0); });
}
static void a_late_thread_is_not_waited_for() {
    count = 2;
    find_helper();
    stop_thread(helper);
    for (int i = 0; i < 1000; i++) together(true, [](i64 thread) { assert(thread == 0); });
    go_on = 1;
    find_helper();
}
static void one_that_has_begun_is_waited_for() {
    count = 2;
    for (int round = 0; round < 20; round++) {
        std::atomic<int> begun{0}, ended{0};
        together(true, [&](i64 thread) {
            for (int i = 0; !thread && !begun && i < 100; i++) wait_ms(1);
            if (!thread) return;
            begun = 1;
            wait_ms(5);  // longer than the caller waits before it sleeps
            ended = 1;
        });
        assert(begun == ended);
    }
}
static void callers_at_once_each_do_their_own() {
    count = 3;
    std::vector<std::thread> callers;
    for (int c = 0; c < 4; c++)
        callers.emplace_back([] {
            for (int i = 0; i < 500; i++) {
                std::atomic<i64> sum{0};
                for_each(true, 100, [&](i64 j) { sum += j; });
                assert(sum == 4950);
            }
        });
    for (auto& caller : callers) caller.join();
}
static void the_caller_keeps_its_cores() {
    count = 3;
    const cpu_set_t before = cores(0);
    for (int i = 0; i < 2000; i++) {
        for_each(true, 100, [](i64) {});
        if (i % 100 == 0) wait_ms(1);
    }
    wait_ms(20);
    const cpu_set_t after = cores(0);
    assert(CPU_EQUAL(&before, &after));
    find_helper();
    const cpu_set_t others = cores(helper);
    for (int core = 0; core < CPU_SETSIZE && !omp_get_num_places(); core++)
        assert(!CPU_ISSET(core, &others) || CPU_ISSET(core, &before));
}
static void a_fork_has_threads_of_its_own() {
    count = 3;
    for_each(true, 10, [](i64) {});
    const int child = fork();
    if (!child) {
        find_helper();
        everything_is_done_once();
        _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    assert(WIFEXITED(status) && !WEXITSTATUS(status));
}

int main(int, char** argv) {
    signal(SIGUSR1, stop);
#define TEST(name) if (!strcmp(argv[1], #name)) return name(), puts("done"), 0
    TEST(everything_is_done_once);
    TEST(threads_have_numbers_of_their_own);
    TEST(a_late_thread_is_not_waited_for);
    TEST(one_that_has_begun_is_waited_for);
    TEST(callers_at_once_each_do_their_own);
    TEST(the_caller_keeps_its_cores);
    TEST(a_fork_has_threads_of_its_own);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Without PyTorch's headers, which take seconds to compile."""
    if os.uname().sysname != "Linux":
        pytest.skip("elsewhere the system alone decides about cores")
    if not (compiler := shutil.which("c++") or shutil.which("g++")):
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("threads")
    (folder / "ATen").mkdir()
    (folder / "ATen" / "Parallel.h").write_text("namespace at { int get_num_threads(); }")
    (folder / "main.cpp").write_text(PROGRAM)
    subprocess.run([compiler, "-std=c++20", "-O2", "-fopenmp", "-pthread", f"-I{folder}", f"-I{KERNELS}",
                    str(folder / "main.cpp"), "-o", str(folder / "program")], check=True)
    return folder / "program"


@pytest.mark.parametrize("name", [
    "everything_is_done_once", "threads_have_numbers_of_their_own", "a_late_thread_is_not_waited_for",
    "one_that_has_begun_is_waited_for", "callers_at_once_each_do_their_own", "the_caller_keeps_its_cores",
    "a_fork_has_threads_of_its_own"])
@pytest.mark.parametrize("where", ["on all cores", "on one core", "bound by OpenMP"])
def test_regions(program, name, where):
    env = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"} if "OpenMP" in where else {}
    cores = sorted(os.sched_getaffinity(0))
    command = ["taskset", "-c", str(cores[0])] * ("one" in where) + [str(program), name]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
