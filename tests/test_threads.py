"""How many threads compute beside other busy processes (kernels/threads.h), on a machine whose speeds are given."""
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
PROGRAM = """
#include <algorithm>
#include <cstdio>
#include "threads.h"

// From stdin: threads, then for each phase how many passes, the share of their time that all of them have a core, and
// the seconds that a pass takes with 1, 2 ... of them. To stdout: the threads that each pass was given.
int main() {
    int all, passes;
    double share;
    scanf("%d", &all);
    Team team;
    while (scanf("%d %lf", &passes, &share) == 2) {
        double seconds[64];
        for (int n = 1; n <= all; n++) scanf("%lf", seconds + n);
        for (; passes; passes--) {
            const auto n = team.begin(all);
            printf("%d ", (int)n);
            team.end(seconds[n], n * seconds[n] * (n == all ? share : 1));
        }
        printf("\\n");
    }
}
"""


@pytest.fixture(scope="module")
def simulate(tmp_path_factory):
    """Without PyTorch's headers, which take seconds to compile."""
    if not (compiler := shutil.which("c++") or shutil.which("g++")):
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("threads")
    (folder / "ATen").mkdir()
    (folder / "ATen" / "Parallel.h").write_text("namespace at { inline int get_num_threads() { return 2; } }")
    (folder / "main.cpp").write_text(PROGRAM)
    subprocess.run([compiler, "-std=c++20", f"-I{folder}", f"-I{KERNELS}", str(folder / "main.cpp"), "-o",
                    str(folder / "program")], check=True)

    def run(threads: int, *phases: tuple[int, float, list[float]]) -> list[list[int]]:
        lines = [f"{passes} {share} {' '.join(map(str, seconds))}" for passes, share, seconds in phases]
        done = subprocess.run([folder / "program"], input="\n".join([str(threads), *lines]), capture_output=True,
                              text=True, check=True, timeout=60)
        return [list(map(int, line.split())) for line in done.stdout.splitlines()]
    return run


QUIET, BESIDE_ONE = (0.97, [0.018, 0.010]), (0.7, [0.018, 0.030])    # share; seconds with one and two threads


def test_a_quiet_machine_uses_all_threads_always(simulate):
    assert simulate(2, (1000, *QUIET)) == [[2] * 1000]


def test_a_core_goes_and_comes_back(simulate):
    quiet, busy, again = simulate(2, (100, *QUIET), (400, *BESIDE_ONE), (400, *QUIET))
    assert set(quiet) == {2}
    assert busy.index(1) <= 16 and busy[16:].count(1) > 0.9 * len(busy[16:])      # 2 is tried now and then
    assert set(again[100:]) == {2}


def test_all_threads_stay_where_fewer_are_slower_though_disturbed(simulate):
    [given] = simulate(2, (1000, 0.7, [0.030, 0.018]))
    assert given.count(2) > 0.9 * len(given)


@pytest.mark.parametrize("best", [1, 3, 8, 11, 16])
def test_of_many_threads_the_fastest_number_is_found(simulate, best):
    seconds = [0.01 * (1 + 0.1 * abs(n - best)) for n in range(1, 17)]
    [given] = simulate(16, (2000, 0.7, seconds))
    spent = sum(seconds[n - 1] for n in given[500:]) / len(given[500:])
    assert spent < 1.2 * 0.01
