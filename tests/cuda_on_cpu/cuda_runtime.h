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

#include <cmath>
#include <functional>
#include <tuple>
#include <utility>

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

// Runs `body` once for each thread of the grid. Aborts where a barrier is not reached by all who must.
void run(dim3 blocks, dim3 threads, const std::function<void()>& body);
void block_barrier();
uint64_t exchange(uint64_t value, int lane_mask);  // the value that lane ^ lane_mask of the warp gave

template <typename T>
T exchange_as(T value, int lane_mask) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = exchange(bits, lane_mask);
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulator

#define __syncthreads() emulator::block_barrier()
#define __shfl_xor_sync(lanes, value, lane_mask) emulator::exchange_as(value, lane_mask)

using cudaError_t = int;
using cudaStream_t = struct CUstream_st*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  const char* given = getenv("EMULATED_PROCESSORS");
  *value = given ? atoi(given) : 3;  // few and odd, so that loops over the grid loop
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> held(std::forward<Arguments>(arguments)...);
  emulator::run(config->gridDim, config->blockDim, [&] { std::apply(kernel, held); });
  return cudaSuccess;
}
