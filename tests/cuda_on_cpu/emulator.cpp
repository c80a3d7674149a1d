// The scheduler of cuda_runtime.h: fibers in turn, from barrier to barrier.
#include "cuda_runtime.h"

#include <setjmp.h>
#include <stdio.h>
#include <ucontext.h>

#include <array>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

// For tests that count.
extern "C" __attribute__((visibility("default"))) unsigned long emulated_launches = 0, emulated_early = 0,
                                                                emulated_blocks = 0;

namespace emulator {

namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;

struct Barrier {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
};

struct Copy {
  void* to;
  const void* from;
  bool there;
};

struct Fiber {
  jmp_buf here;
  std::unique_ptr<char[]> stack;
  bool done = true, waited = false;
  std::deque<std::vector<Copy>> copies;  // by group; the last one is open
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Barrier> warp_barriers;
std::vector<std::array<std::array<Given, kWarp>, 2>> warp_values;
std::unique_ptr<unsigned char[]> dynamic;
Barrier of_block;
jmp_buf scheduler;
ucontext_t home;
int current = 0;
bool progress = false;
const std::function<void()>* work = nullptr;

void to_scheduler() {
  if (!_setjmp(fibers[current]->here)) _longjmp(scheduler, 1);
}

void fiber_main() {
  for (;;) {
    (*work)();
    fibers[current]->done = true;
    progress = true;
    to_scheduler();
  }
}

void place(int thread) {
  current = thread;
  threadIdx = dim3(thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y);
}

void resume(int thread) {
  place(thread);
  if (_setjmp(scheduler)) return;
  Fiber& fiber = *fibers[thread];
  if (fiber.stack) _longjmp(fiber.here, 1);
  fiber.stack.reset(new char[kStack]);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  swapcontext(&home, &context);  // comes back through the scheduler's jump
}

void wait(Barrier& barrier) {
  const unsigned mine = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    progress = true;
    return;
  }
  while (barrier.generation == mine) to_scheduler();
}

}  // namespace

void block_barrier() { wait(of_block); }

int lane() { return current % kWarp; }

void wait_for_previous() { fibers[current]->waited = true; }

const Given* exchange(const Given& given) {
  const int warp = current / kWarp;
  auto& values = warp_values[warp][warp_barriers[warp].generation & 1];
  values[lane()] = given;
  wait(warp_barriers[warp]);
  return values.data();
}

unsigned char* dynamic_shared() { return dynamic.get(); }

void copy_async(void* to, const void* from, bool there) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || (there && reinterpret_cast<uintptr_t>(from) % 16)) {
    fprintf(stderr, "emulator: a copy of 16 bytes at an address that is no multiple of 16\n");
    abort();
  }
  memset(to, 0xff, 16);
  fibers[current]->copies.back().push_back({to, from, there});
}

void commit_copies() { fibers[current]->copies.emplace_back(); }

void wait_copies(int pending) {
  auto& copies = fibers[current]->copies;
  for (; static_cast<int>(copies.size()) - 1 > pending; copies.pop_front())
    for (const Copy& copy : copies.front()) {
      if (copy.there) {
        memcpy(copy.to, copy.from, 16);
      } else {
        memset(copy.to, 0, 16);
      }
    }
}

void run(dim3 blocks, dim3 threads, size_t shared, bool early, const std::function<void()>& body) {
  ++emulated_launches;
  emulated_early += early;
  emulated_blocks += blocks.x * blocks.y;
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const int count = static_cast<int>(threads.x * threads.y * threads.z);
  if (count % kWarp || count > 1024 || blocks.y > 65535 || blocks.x == 0 || blocks.y == 0) {
    fprintf(stderr, "emulator: a launch that CUDA would refuse: %u x %u blocks of %d threads\n", blocks.x, blocks.y,
            count);
    abort();
  }
  while (static_cast<int>(fibers.size()) < count) fibers.push_back(std::make_unique<Fiber>());
  warp_values.resize(32);
  blockDim = threads;
  gridDim = blocks;
  work = &body;
  for (unsigned y = 0; y < blocks.y; ++y)
    for (unsigned x = 0; x < blocks.x; ++x) {
      blockIdx = dim3(x, y, 0);
      of_block = Barrier{count};
      warp_barriers.assign(count / kWarp, Barrier{kWarp});
      dynamic.reset(new unsigned char[shared]);  // aligned to 16 bytes
      memset(dynamic.get(), 0xff, shared);
      for (int t = 0; t < count; ++t) {
        fibers[t]->done = fibers[t]->waited = false;
        fibers[t]->copies.assign(1, {});
      }
      for (bool left = true; left;) {
        left = progress = false;
        for (int t = 0; t < count; ++t) {
          if (fibers[t]->done) continue;
          resume(t);
          left |= !fibers[t]->done;
        }
        if (left && !progress) {
          fprintf(stderr, "emulator: threads wait at a barrier that others never reach\n");
          abort();
        }
      }
      for (int t = 0; early && t < count; ++t) {
        if (fibers[t]->waited) continue;
        fprintf(stderr, "emulator: a thread of a kernel that may start early did not wait for the one before\n");
        abort();
      }
      if (of_block.arrived) {
        fprintf(stderr, "emulator: a thread left while others waited for it\n");
        abort();
      }
    }
}

}  // namespace emulator
