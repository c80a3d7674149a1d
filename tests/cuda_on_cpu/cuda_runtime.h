// CUDA on the CPU, for tests: as much of the language and the runtime as csrc/cuda uses. Put this folder before CUDA's
// own headers and compile a .cu file as C++. Every thread of a block is a fiber; blocks run one after the other.
// What it proves: values, offsets, tails, masks, reductions, barriers that all threads reach, and with a sanitizer that
// nothing is read or written out of bounds. What it cannot: instructions, timing, races between blocks.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <cmath>
#include <functional>
#include <tuple>
#include <utility>

#define EMULATED  // for instructions that are more than their thread's own arithmetic
#define CUDA CPU  // the dispatch key that kernels are registered at; torch's headers, which name both, are above

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// Runs `body` once for each thread of the grid. Aborts where a barrier is not reached by all who must, and where a
// thread of a kernel that may start early does not wait for the one before.
void run(dim3 blocks, dim3 threads, size_t shared, bool early, const std::function<void()>& body);
void wait_for_previous();
void block_barrier();

using Given = std::array<uint64_t, 3>;
const Given* exchange(const Given& given);  // what each lane of the warp gave

unsigned char* dynamic_shared();  // as large as the launch says, so that a sanitizer sees what goes beyond

// A copy spoils its destination when it starts, and happens when it is waited for: neither a reader that is still there
// nor one that comes too early gets away.
void copy_async(void* to, const void* from, bool there);
void commit_copies();
void wait_copies(int pending);
int lane();

template <typename T>
T exchange_as(T value, int lane_mask) {
  Given given{};
  memcpy(&given, &value, sizeof value);
  memcpy(&value, &exchange(given)[lane() ^ lane_mask], sizeof value);
  return value;
}

// mma.m16n8k16 as the PTX manual lays its operands out; `value(word, k)` is element k % 2 of a word.
template <typename Value>
void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Value value) {
  unsigned words[6];
  memcpy(words, a, sizeof a);
  memcpy(words + 4, b, sizeof b);
  Given given;
  memcpy(&given, words, sizeof given);
  const Given* all = exchange(given);
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      memcpy(words, &all[row % 8 * 4 + k % 8 / 2], sizeof words);
      const float left = value(words[row / 8 + k / 8 * 2], k);
      memcpy(words, &all[column * 4 + k % 8 / 2], sizeof words);
      d[i] += left * value(words[4 + k / 8], k);
    }
  }
}

}  // namespace emulator

#define __syncthreads() emulator::block_barrier()
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return out;
}
inline int __ffs(int value) { return __builtin_ffs(value); }
#define __shfl_xor_sync(lanes, value, lane_mask) emulator::exchange_as(value, lane_mask)

using cudaError_t = int;
using cudaStream_t = struct CUstream_st*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerMultiprocessor };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const char* given = getenv("EMULATED_PROCESSORS");
  *value = given ? atoi(given) : 3;  // few and odd, so that loops over the grid loop
  if (attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor) *value = 100 << 10;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }

// Kernels run one after the other; of one that may start early it is only seen that all its threads wait.
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  const cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct cudaFuncAttributes {
  int ptxVersion;
};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> held(std::forward<Arguments>(arguments)...);
  emulator::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, config->numAttrs > 0,
                [&] { std::apply(kernel, held); });
  return cudaSuccess;
}
