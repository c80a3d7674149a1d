// What all CUDA kernels share: merging values over threads, division by multiplication, arguments that are read on the
// device, and class Gpu, which launches every kernel. Kernels take raw pointers and 64-bit offsets.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <atomic>

#include "instructions.cuh"

namespace qkernels {

// Two values that are reduced together: sums of two gradients, or a minimum and a maximum.
template <typename T>
struct Pair {
  T a, b;
};

template <typename T>
__device__ __forceinline__ T from_lane(T value, int step) {
  return __shfl_xor_sync(kAllLanes, value, step);
}
template <typename T>
__device__ __forceinline__ Pair<T> from_lane(Pair<T> value, int step) {
  return {from_lane(value.a, step), from_lane(value.b, step)};
}

// Merges the values of `lanes` neighbouring threads (a power of two up to a warp, or a whole block) in a fixed order.
// Each of these threads gets the result.
template <typename V, typename Merge>
__device__ __forceinline__ V merge_lanes(V value, int lanes, Merge merge) {
  for (int step = lanes < kWarp ? lanes / 2 : kWarp / 2; step > 0; step /= 2)
    value = merge(value, from_lane(value, step));
  if (lanes > kWarp) {
    __shared__ V of_warp[32];
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    __syncthreads();  // before it, threads may still read what the previous call wrote
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = of_warp[0];
    for (int w = 1; w < warps; ++w) value = merge(value, of_warp[w]);
  }
  return value;
}

// Computes n / divisor for 0 <= n < 2^63 by multiplication. This takes a tenth of the instructions of a 64-bit
// division, and no function call.
struct Divider {
  int64_t divisor = 1;
  uint64_t magic = 1;
  int shift = 0;

  Divider() = default;
  explicit Divider(int64_t d) : divisor(d) {
    while ((uint64_t{1} << shift) < static_cast<uint64_t>(d)) ++shift;
    const unsigned __int128 excess = (uint64_t{1} << shift) - static_cast<uint64_t>(d);
    magic = static_cast<uint64_t>((excess << 64) / static_cast<uint64_t>(d)) + 1;
  }
  __device__ __forceinline__ int64_t divide(int64_t n) const {
    const uint64_t u = static_cast<uint64_t>(n);
#ifdef __CUDA_ARCH__
    const uint64_t high = __umul64hi(u, magic);
#else
    const uint64_t high = static_cast<uint64_t>(static_cast<unsigned __int128>(u) * magic >> 64);
#endif
    return static_cast<int64_t>((high + u) >> shift);
  }
};

// Reads a one-element tensor of any dtype on the device, and says whether its value is not zero.
struct Flag {
  const void* data = nullptr;
  int size = 0;           // bytes
  uint64_t counted = ~0;  // bits: all but a float's sign, since -0 is zero

  Flag() = default;
  explicit Flag(const Tensor& t) : data(t.const_data_ptr()), size(static_cast<int>(t.element_size())) {
    QK_CHECK(size <= 8, "flag: got ", dtype_name(t.scalar_type()), "; accepted: a dtype of up to 8 bytes");
    if (is_floating(t.scalar_type())) counted = ~(uint64_t{1} << (8 * size - 1));
  }
  __device__ __forceinline__ bool is_set() const {
    uint64_t bits = 0;
    if (size == 1) bits = *static_cast<const uint8_t*>(data);
    if (size == 2) bits = *static_cast<const uint16_t*>(data);
    if (size == 4) bits = *static_cast<const uint32_t*>(data);
    if (size == 8) bits = *static_cast<const uint64_t*>(data);
    return (bits & counted) != 0;
  }
};

// A number for each floating dtype, on which kernels branch.
inline int number_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return 0;
    case ScalarType::Double: return 1;
    case ScalarType::Half: return 2;
    default: return 3;
  }
}

// Writes one value to a tensor of any floating dtype.
struct RealOutput {
  void* data = nullptr;
  int dtype = 0;

  RealOutput() = default;
  explicit RealOutput(const Tensor& t) : data(t.mutable_data_ptr()), dtype(number_of(t.scalar_type())) {}
  template <typename T>
  __device__ void set(int64_t i, T value) const {
    const float pair[2] = {static_cast<float>(value), 0};
    if (dtype == 0) static_cast<float*>(data)[i] = pair[0];
    if (dtype == 1) static_cast<double*>(data)[i] = value;
    if (dtype == 2) static_cast<Half*>(data)[i] = narrow<Half>(pair).v[0];
    if (dtype == 3) static_cast<BFloat16*>(data)[i] = narrow<BFloat16>(pair).v[0];
  }
};

// Reads elements of a tensor of any floating dtype, as fp32.
struct RealInput {
  const void* data = nullptr;
  int dtype = 0;

  RealInput() = default;
  explicit RealInput(const Tensor& t) : data(t.const_data_ptr()), dtype(number_of(t.scalar_type())) {}
  // bits() loads element i of a dtype of up to four bytes, and value_of() converts it. The two are apart, so that a
  // kernel can work on something else until the load is done.
  __device__ __forceinline__ unsigned bits(int64_t i) const {
    return dtype == 0 ? static_cast<const unsigned*>(data)[i] : static_cast<const unsigned short*>(data)[i];
  }
  __device__ __forceinline__ float value_of(unsigned bits) const {
    if (dtype == 2) return widen(Half{static_cast<uint16_t>(bits)});
    if (dtype == 3) bits <<= 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
  __device__ __forceinline__ float get(int64_t i) const {
    return dtype == 1 ? static_cast<float>(static_cast<const double*>(data)[i]) : value_of(bits(i));
  }
};

inline bool is_aligned(std::initializer_list<const void*> pointers) {
  uintptr_t bits = 0;
  for (const void* p : pointers) bits |= reinterpret_cast<uintptr_t>(p);
  return bits % 16 == 0;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The GPU of `x`, for one call of an op: makes it the current device, and launches kernels on torch's current stream.
class Gpu {
 public:
  explicit Gpu(const Tensor& x) : Gpu(device_of(x)) {}
  explicit Gpu(Device device) : device_(device), index_(device.index) {
    namespace accelerator = torch::stable::accelerator;
    if (index_ >= 0 && accelerator::getCurrentDeviceIndex() != index_) guard_.emplace(index_);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  Device device() const { return device_; }
  int processors() const { return attribute<cudaDevAttrMultiProcessorCount>(); }
  int shared_of_processor() const { return attribute<cudaDevAttrMaxSharedMemoryPerMultiprocessor>(); }  // bytes

  // Passes the arguments by value. A grid has at most 2^31 - 1 blocks along x. Only a kernel that loops over its work
  // may be launched with a larger grid_x.
  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t grid_x, int64_t grid_y, int threads,
              Arguments&&... arguments) const {
    start(kernel, grid_x, grid_y, threads, 0, false, std::forward<Arguments>(arguments)...);
  }

  // Launches a kernel that uses `bytes` of dynamic_shared().
  template <typename... Parameters, typename... Arguments>
  void launch_shared(void (*kernel)(Parameters...), int64_t grid_x, int64_t grid_y, int threads, int bytes,
                     Arguments&&... arguments) const {
    if (bytes > 48 << 10)
      check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 bytes));
    start(kernel, grid_x, grid_y, threads, bytes, false, std::forward<Arguments>(arguments)...);
  }

  // Launches a kernel that begins with wait_for_previous(). It may start early if the kernel before it calls
  // let_next_start().
  template <typename... Parameters, typename... Arguments>
  void launch_early(void (*kernel)(Parameters...), int64_t grid_x, int64_t grid_y, int threads,
                    Arguments&&... arguments) const {
    start(kernel, grid_x, grid_y, threads, 0, waits(reinterpret_cast<const void*>(kernel)),
          std::forward<Arguments>(arguments)...);
  }

 private:
#ifdef EMULATED
  static constexpr bool kAskAgain = true;  // tests change the device's attributes
#else
  static constexpr bool kAskAgain = false;
#endif

  template <typename... Parameters, typename... Arguments>
  void start(void (*kernel)(Parameters...), int64_t grid_x, int64_t grid_y, int threads, int bytes, bool early,
             Arguments&&... arguments) const {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(grid_x, 0x7fffffff)), static_cast<unsigned>(grid_y));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(bytes);
    config.stream = stream_;
    config.attrs = &attribute;
    config.numAttrs = early ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
  }

  // Whether a kernel can start early. Only code that was compiled for 9.0 or later has the instructions for this: PTX
  // for 8.0 lacks them, even where it runs on a later GPU. The answer holds for all kernels of the library, so the
  // runtime is asked once.
  bool waits(const void* kernel) const {
    static std::atomic<int> known[64];
    std::atomic<int>& slot = known[std::max(index_, 0) % 64];
    int version = slot.load(std::memory_order_relaxed);
    if (version == 0) {
      cudaFuncAttributes attributes{};
      check(cudaFuncGetAttributes(&attributes, kernel));
      version = attributes.ptxVersion;
      slot.store(version, std::memory_order_relaxed);
    }
    return version >= 90;
  }

  // An attribute of the device. The runtime is asked for it once.
  template <cudaDeviceAttr kAttribute>
  int attribute() const {
    static std::atomic<int> known[64];
    const int slot = std::max(index_, 0) % 64;
    int value = known[slot].load(std::memory_order_relaxed);
    if (value == 0 || kAskAgain) {
      check(cudaDeviceGetAttribute(&value, kAttribute, std::max(index_, 0)));
      known[slot].store(value, std::memory_order_relaxed);
    }
    return value;
  }

  static void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // forgets the error, so that the next check does not report it again
    fail("CUDA: ", cudaGetErrorString(error));
  }

  Device device_;
  int32_t index_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace qkernels
