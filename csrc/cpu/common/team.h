// The threads that share out the loops of a call: a parallel region for each loop, or one for all loops.
//
// A network has some 60 layers of 10 to 100 us. A parallel region for each costs 1 to 2 us, and where other processes
// want the cores, each waits until the system has run all its threads: with 12 processes on 2 cores MobileNetV2 took
// 1.8 s, and 0.04 s in one region (virtual Xeon, 2026-12). In a region for all loops one thread leads: it runs the
// call, and offers pieces of its loops to the others, which look out for them. torch does not promise that a region
// gets more than one thread. So no thread waits for one that has not come: whoever is there claims pieces, of its own
// part first, so that a thread finds in its caches what it has written, and then what is left of the others'.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <utility>
#include <vector>

namespace qkernels {

class Team {
 public:
  // Each loop is a parallel region of its own, on all of torch's threads.
  Team() : Team(torch::stable::get_num_threads(), false) {}
  // The calling thread alone.
  static Team alone() { return Team(1, false); }

  // Calls f(team) once, in a region that lasts until it returns.
  template <typename F>
  static void run(const F& f) {
    const int64_t threads = torch::stable::get_num_threads();
    Team team(threads, true);
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
      if (team.led_.exchange(true)) return team.help(static_cast<size_t>(begin));
      const Closing closing(team);
      team.leader_ = static_cast<size_t>(begin);
      f(team);
    });
  }

  int64_t threads() const { return static_cast<int64_t>(parts_.size()); }

  // Calls f(begin, end) for parts of 0 … count, of at least `grain` as far as there are so many; for none not at all.
  // Whatever one loop has written is visible to the next. What f throws is thrown here once all threads have left f.
  // Only the thread that f of run() is called on may call this.
  template <typename F>
  void parallel_for(int64_t count, int64_t grain, const F& f) {
    if (count == 0) return;
    const int64_t most = (count + grain - 1) / grain, threads = this->threads();
    if (most == 1 || threads == 1) return f(int64_t{0}, count);
    if (!shared_) return torch::stable::parallel_for(0, count, grain, f);
    const int64_t pieces = most < threads ? most : std::min(most / threads, kPieces) * threads;
    Loop loop;
    loop.f = &f;
    loop.count = count;
    loop.pieces = pieces;
    loop.call = [](const Loop& l, int64_t piece) {
      (*static_cast<const F*>(l.f))(piece* l.count / l.pieces, (piece + 1) * l.count / l.pieces);
    };
    loop_.store(&loop, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    for (int64_t part = 0; part < threads; ++part)
      parts_[static_cast<size_t>(part)].unclaimed.store(packed(part * pieces / threads, (part + 1) * pieces / threads),
                                                        std::memory_order_release);
    offers_.fetch_add(1, std::memory_order_release);
    work(leader_);
    for (int spins = 0; done_.load(std::memory_order_acquire) < pieces; ++spins) pause(spins);
    if (!error_) return;
    failed_.store(false, std::memory_order_relaxed);
    std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  static constexpr int64_t kPieces = 2;  // of a thread: the last ones go to whoever is ready first
  static constexpr int kSpins = 2000;    // about 50 us; then the core may be wanted by the thread that is waited for

  struct Loop {
    void (*call)(const Loop& loop, int64_t piece);
    const void* f;
    int64_t count, pieces;
  };
  // The pieces of a part that nobody has claimed: from the one in the upper half to that in the lower half. Whoever
  // claims one finds the loop that it belongs to in loop_, since a loop does not end before all its pieces are done.
  struct alignas(64) Part {
    std::atomic<uint64_t> unclaimed{0};
  };
  // Lets the helpers go, whatever happens.
  struct Closing {
    Team& team;
    explicit Closing(Team& t) : team(t) {}
    Closing(const Closing&) = delete;
    Closing& operator=(const Closing&) = delete;
    ~Closing() { team.offers_.store(kClosed, std::memory_order_release); }
  };
  static constexpr int64_t kClosed = -1;

  Team(int64_t threads, bool shared) : shared_(shared && threads > 1), parts_(static_cast<size_t>(threads)) {}

  static uint64_t packed(int64_t first, int64_t last) {
    return static_cast<uint64_t>(first) << 32 | static_cast<uint64_t>(last);
  }

  // Does what is left of the present loop.
  void work(size_t own) {
    for (size_t i = 0; i < parts_.size(); ++i) {
      std::atomic<uint64_t>& unclaimed = parts_[(own + i) % parts_.size()].unclaimed;
      for (uint64_t pieces = unclaimed.load(std::memory_order_acquire); pieces >> 32 < (pieces & 0xffffffff);) {
        if (!unclaimed.compare_exchange_weak(pieces, pieces + (uint64_t{1} << 32), std::memory_order_acq_rel)) continue;
        const Loop& loop = *loop_.load(std::memory_order_relaxed);
        try {
          loop.call(loop, static_cast<int64_t>(pieces >> 32));
        } catch (...) {
          if (!failed_.exchange(true, std::memory_order_relaxed)) error_ = std::current_exception();
        }
        done_.fetch_add(1, std::memory_order_release);
        pieces += uint64_t{1} << 32;
      }
    }
  }

  void help(size_t own) {
    for (int64_t seen = 0, offers; (offers = offers_.load(std::memory_order_acquire)) != kClosed;) {
      for (int spins = 0; offers == seen; offers = offers_.load(std::memory_order_acquire)) pause(spins++);
      if (offers == kClosed) return;
      seen = offers;
      work(own);
    }
  }

  static void pause(int spins) {
    if (spins >= kSpins) return std::this_thread::yield();
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  const bool shared_;
  size_t leader_ = 0;  // its part
  std::vector<Part> parts_;
  std::atomic<bool> led_{false};
  alignas(64) std::atomic<int64_t> offers_{0};
  std::atomic<const Loop*> loop_{nullptr};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;  // the first one of a loop
  alignas(64) std::atomic<int64_t> done_{0};
};

}  // namespace qkernels
