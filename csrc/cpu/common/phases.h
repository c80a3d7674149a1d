// Phases that run one after the other, each cut into the same number of tasks, by one parallel region for all of them.
//
// A recurrent layer has hundreds of steps of a few microseconds; a parallel region for each would cost as much as the
// steps themselves. torch does not promise that a region gets more than one thread: it may run its parts one after the
// other. So no thread waits for one that has not come. Threads claim tasks, their own part first and then what is left
// of the others', and wait at the end of a phase only for tasks that somebody has claimed.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace qkernels {

class Phases {
 public:
  Phases(int64_t phases, int64_t tasks, int64_t threads)
      : phases_(phases), tasks_(tasks), parts_(static_cast<size_t>(std::min(threads, tasks))) {}

  // Calls make() once in each thread, and then worker(phase, task) for every task of every phase. Whatever a phase has
  // written is visible to the next one.
  template <typename Make>
  void run(Make make) {
    const int64_t threads = static_cast<int64_t>(parts_.size());
    if (phases_ == 0 || tasks_ == 0) return;
    if (threads == 1) {
      auto worker = make();
      for (int64_t phase = 0; phase < phases_; ++phase)
        for (int64_t i = 0; i < tasks_; ++i) worker(phase, in_turns(phase, i, tasks_));
      return;
    }
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
      if (finished() == phases_) return;
      auto worker = make();
      work(static_cast<size_t>(begin), worker);
    });
  }

 private:
  // Claims of one part of the tasks: phase * length + how many of this phase.
  struct alignas(64) Part {
    std::atomic<int64_t> claimed{0};
  };

  // The tasks of a phase that one thread has claimed.
  struct Claims {
    std::atomic<int64_t>& done;
    int64_t count = 0;
    ~Claims() {
      if (count) done.fetch_add(count, std::memory_order_acq_rel);
    }
  };

  // Every second phase runs backwards: it begins with the data that the caches still hold of the phase before.
  static int64_t in_turns(int64_t phase, int64_t i, int64_t count) { return phase % 2 ? count - 1 - i : i; }

  int64_t first_of(size_t part) const {
    return tasks_ * static_cast<int64_t>(part) / static_cast<int64_t>(parts_.size());
  }
  int64_t finished() const { return done_.load(std::memory_order_acquire) / tasks_; }

  template <typename Worker>
  void work(size_t own, Worker& worker) {
    for (int64_t phase = finished(); phase < phases_; ++phase) {
      work(phase, own, worker);
      for (int spins = 0; finished() <= phase; ++spins) pause(spins);
    }
  }

  // Does what is left of one phase. A task that throws counts as done: others wait for it.
  template <typename Worker>
  void work(int64_t phase, size_t own, Worker& worker) {
    Claims claims{done_};
    for (size_t i = 0; i < parts_.size(); ++i) {
      const size_t part = (own + i) % parts_.size();
      const int64_t first = first_of(part), length = first_of(part + 1) - first, end = (phase + 1) * length;
      std::atomic<int64_t>& claimed = parts_[part].claimed;
      for (int64_t at = claimed.load(std::memory_order_relaxed); at < end;)
        if (claimed.compare_exchange_weak(at, at + 1, std::memory_order_relaxed)) {
          ++claims.count;
          worker(phase, first + in_turns(phase, at - phase * length, length));
          at = claimed.load(std::memory_order_relaxed);
        }
    }
  }

  static void pause(int spins) {
    if (spins >= kSpins) return std::this_thread::yield();
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  static constexpr int kSpins = 2000;  // about 50 us; then the core may be wanted by the thread that is waited for
  const int64_t phases_, tasks_;
  std::vector<Part> parts_;
  alignas(64) std::atomic<int64_t> done_{0};  // tasks of all phases
};

}  // namespace qkernels
