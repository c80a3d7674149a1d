// team.h and phases.h alone, on threads of this file's own instead of torch's: a sanitizer knows nothing of OpenMP's.
// Returns 0 if all holds, and says else what does not.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "cpu/common/phases.h"
#include "cpu/common/team.h"

namespace {

// What torch's thread pool might do: how many threads it says it has, and how many of them come.
int threads_said = 4, threads_that_come = 4;

void check(bool good, const char* what) {
  if (good) return;
  std::printf("%s, of %d threads %d come\n", what, threads_said, threads_that_come);
  std::exit(1);
}

}  // namespace

extern "C" {
AOTITorchError torch_get_num_threads(uint32_t* out) {
  *out = static_cast<uint32_t>(threads_said);
  return 0;
}

// As torch does it: an exception of any thread is an error of the region.
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc f, void* context) {
  const int64_t count = std::min<int64_t>(threads_that_come, end - begin);
  std::atomic<bool> failed{false};
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < count; ++i)
    threads.emplace_back([&, i] {
      try {
        f(begin + i * (end - begin) / count, begin + (i + 1) * (end - begin) / count, context);
      } catch (...) {
        failed = true;
      }
    });
  for (std::thread& thread : threads) thread.join();
  return failed ? 1 : 0;
}
}

namespace {

using qkernels::Phases;
using qkernels::Team;

// Loops of many lengths, each of which reads what the one before has written elsewhere.
void run_loops() {
  std::vector<int64_t> values(257, 0), next(257, 0);
  Team::run([&](Team& team) {
    for (int64_t loop = 0; loop < 300; ++loop) {
      const int64_t count = loop % 7 == 0 ? 257 : loop % 11, size = static_cast<int64_t>(values.size());
      team.parallel_for(count, 1 + loop % 3, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          next[static_cast<size_t>(i)] = values[static_cast<size_t>((i + 100) % size)] + 1;
      });
      for (int64_t i = 0; i < count; ++i)
        check(next[static_cast<size_t>(i)] == values[static_cast<size_t>((i + 100) % size)] + 1, "a piece was lost");
      values = next;
    }
  });
}

// Every piece runs, and has ended when the exception of one of them arrives.
void run_exceptions() {
  for (int64_t thrower = 0; thrower < 8; ++thrower) {
    bool caught = false;
    std::atomic<int64_t> after{0};
    Team::run([&](Team& team) {
      std::vector<int64_t> done(8, 0);
      try {
        team.parallel_for(8, 1, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            if (i == thrower) throw std::runtime_error("of a piece");
            std::this_thread::sleep_for(std::chrono::microseconds(200));
            done[static_cast<size_t>(i)] = 1;
          }
        });
      } catch (const std::runtime_error&) {
        caught = true;
      }
      for (int64_t i = 0; i < 8; ++i) done[static_cast<size_t>(i)] += 2;
      team.parallel_for(8, 1, [&](int64_t begin, int64_t end) { after += end - begin; });
    });
    check(caught, "an exception was lost");
    check(after == 8, "the next loop lost a piece");
  }
}

// Of a task that throws: the others do not wait for it in vain, and the call fails.
void run_phases() {
  for (const bool throws : {false, true}) {
    std::vector<int64_t> values(17, 0), next(17, 0);
    bool caught = false;
    try {
      Phases(40, 17, threads_said).run([&] {
        return [&](int64_t phase, int64_t task) {
          if (throws && phase == 20 && task == 3) throw std::runtime_error("of a task");
          const std::vector<int64_t>& from = phase % 2 ? next : values;
          (phase % 2 ? values : next)[static_cast<size_t>(task)] = from[static_cast<size_t>((task + 8) % 17)] + 1;
        };
      });
    } catch (const std::runtime_error&) {
      caught = true;
    }
    check(caught == throws, "an exception was lost");
    for (const int64_t value : values) check(throws || value == 40, "a task was lost");
  }
}

}  // namespace

int main() {
  for (threads_said = 1; threads_said <= 5; ++threads_said)
    for (threads_that_come = 1; threads_that_come <= threads_said; ++threads_that_come) {
      run_loops();
      run_exceptions();
      run_phases();
    }
  return 0;
}
