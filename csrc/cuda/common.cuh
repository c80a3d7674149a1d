// The one place that knows the GPU: instructions, launches, streams. Kernels take raw pointers and 64-bit offsets.
// Without __CUDA_ARCH__ (the host pass, and the tests' emulator) each instruction is its meaning in plain C++.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <atomic>

#include "view.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "these kernels need compute capability 8.0 or later"
#endif

namespace qkernels {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kUnroll = 4;  // vectors that each thread loads before it uses the first: 64 bytes in flight
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename S>
constexpr int kVector = 16 / static_cast<int>(sizeof(S));  // elements of a 16-byte access

template <typename T, int N>
struct Vec {
  T v[N];
};

template <int kBytes>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<2> {
  using type = unsigned short;
};

// The compiler splits a plain 16-byte store in two where it is not sure that nothing is read in between.
__device__ __forceinline__ void store_word(uint4* p, uint4 word) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
               : "memory");
#else
  *p = word;
#endif
}

template <typename W>
__device__ __forceinline__ void store_word(W* p, W word) {
  *p = word;
}

// The compiler unpacks halves where they are loaded, into twice the registers, unless a look at them comes between.
template <typename T>
__device__ __forceinline__ void keep_packed(T& loaded) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) % 4 == 0) {
    unsigned words[sizeof(T) / 4];
    memcpy(words, &loaded, sizeof loaded);
#pragma unroll
    for (unsigned i = 0; i < sizeof(T) / 4; ++i) asm volatile("" : "+r"(words[i]));
    memcpy(&loaded, words, sizeof loaded);
  }
#endif
}

// Whole vectors, from and to addresses that are multiples of their size (of 16 bytes where they are larger).
template <int N, typename T>
__device__ __forceinline__ Vec<T, N> load_vector(const T* p, bool there = true) {
  constexpr int kBytes = sizeof(Vec<T, N>), kWord = kBytes < 16 ? kBytes : 16;
  using W = typename Word<kWord>::type;
  W words[kBytes / kWord] = {};
#pragma unroll
  for (int i = 0; i < kBytes / kWord; ++i)
    if (there) words[i] = reinterpret_cast<const W*>(p)[i];
  keep_packed(words);
  Vec<T, N> out;
  memcpy(&out, words, sizeof out);
  return out;
}

template <typename T, int N>
__device__ __forceinline__ void store_vector(T* p, const Vec<T, N>& value) {
  constexpr int kBytes = sizeof(Vec<T, N>), kWord = kBytes < 16 ? kBytes : 16;
  using W = typename Word<kWord>::type;
  W words[kBytes / kWord];
  memcpy(words, &value, sizeof value);
#pragma unroll
  for (int i = 0; i < kBytes / kWord; ++i) store_word(reinterpret_cast<W*>(p) + i, words[i]);
}

// Elements [first, last) of a vector, one by one: at ragged ends and misaligned addresses. The others read as 0.
template <int N, typename T>
__device__ __forceinline__ Vec<T, N> load_some(const T* p, int first, int last) {
  Vec<T, N> out;
#pragma unroll
  for (int k = 0; k < N; ++k) out.v[k] = k >= first && k < last ? p[k] : T{};
  return out;
}

template <typename T, int N>
__device__ __forceinline__ void store_some(T* p, const Vec<T, N>& value, int first, int last) {
#pragma unroll
  for (int k = 0; k < N; ++k)
    if (k >= first && k < last) p[k] = value.v[k];
}

template <typename T, int N>
__device__ __forceinline__ bool is_vector(const T* p, int first, int last) {
  constexpr int kBytes = sizeof(Vec<T, N>), kWord = kBytes < 16 ? kBytes : 16;
  return first == 0 && last == N && reinterpret_cast<uintptr_t>(p) % kWord == 0;
}

// Elements [first, last) of a vector; kWhole: known to be all of them, at an aligned address, or none (last is 0).
template <bool kWhole, int N, typename T>
__device__ __forceinline__ Vec<T, N> load(const T* p, int first, int last) {
  if (kWhole) return load_vector<N>(p, last > 0);
  if (is_vector<T, N>(p, first, last)) return load_vector<N>(p);
  return load_some<N>(p, first, last);
}

template <bool kWhole, typename T, int N>
__device__ __forceinline__ void store(T* p, const Vec<T, N>& value, int first, int last) {
  if (kWhole) {
    if (last > 0) store_vector(p, value);
  } else if (is_vector<T, N>(p, first, last)) {
    store_vector(p, value);
  } else {
    store_some(p, value, first, last);
  }
}

template <typename S>
__device__ __forceinline__ Arithmetic<S> widen(S value) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    const unsigned bits = static_cast<unsigned>(value.bits) << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
  } else if constexpr (std::is_same_v<S, Half>) {
#ifdef __CUDA_ARCH__
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
#else
    return to_float(value);
#endif
  } else {
    return static_cast<Arithmetic<S>>(value);
  }
}

// Element k; of bf16 from the word that holds two, by one instruction and not by two.
template <typename S, int N>
__device__ __forceinline__ Arithmetic<S> widen(const Vec<S, N>& in, int k) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    unsigned word;
    memcpy(&word, &in.v[k / 2 * 2], sizeof word);
    word = k % 2 ? word & 0xffff0000 : word << 16;
    float wide;
    memcpy(&wide, &word, sizeof wide);
    return wide;
  } else {
    return widen(in.v[k]);
  }
}

// One rounding, half to even; two values at a time where there is an instruction for it.
template <typename S, typename T, int N>
__device__ __forceinline__ Vec<S, N> narrow(const T (&values)[N]) {
  Vec<S, N> out;
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(S) == 2) {
    unsigned pairs[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      if constexpr (std::is_same_v<S, Half>) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pairs[i]) : "f"(values[2 * i + 1]), "f"(values[2 * i]));
      } else {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pairs[i]) : "f"(values[2 * i + 1]), "f"(values[2 * i]));
      }
    }
    memcpy(&out, pairs, sizeof out);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) out.v[k] = values[k];
  }
#else
  for (int k = 0; k < N; ++k) out.v[k] = from_float<S>(values[k]);
#endif
  return out;
}

// Minimum and maximum that keep NaN.
template <typename T>
__device__ __forceinline__ T nan_min(T a, T b) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, float>) {
    float out;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
    return out;
  }
#endif
  return a < b || a != a ? a : b;
}

template <typename T>
__device__ __forceinline__ T nan_max(T a, T b) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, float>) {
    float out;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
    return out;
  }
#endif
  return a > b || a != a ? a : b;
}

// f of each half of two words, rounded once: what instructions on pairs of halves mean.
template <typename S, typename F>
unsigned by_halves(unsigned a, unsigned b, F f) {
  unsigned out = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const auto part = [&](unsigned word) { return to_float(S{static_cast<uint16_t>(word >> shift)}); };
    out |= static_cast<unsigned>(from_float<S>(f(part(a), part(b))).bits) << shift;
  }
  return out;
}

// The same of two numbers of a half type at once.
template <typename S>
__device__ __forceinline__ unsigned min_pair(unsigned a, unsigned b) {
#ifdef __CUDA_ARCH__
  unsigned out;
  if constexpr (std::is_same_v<S, Half>) {
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  } else {
    asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  }
  return out;
#else
  return by_halves<S>(a, b, [](float p, float q) { return nan_min(p, q); });
#endif
}

template <typename S>
__device__ __forceinline__ unsigned max_pair(unsigned a, unsigned b) {
#ifdef __CUDA_ARCH__
  unsigned out;
  if constexpr (std::is_same_v<S, Half>) {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  }
  return out;
#else
  return by_halves<S>(a, b, [](float p, float q) { return nan_max(p, q); });
#endif
}

template <typename T>
__device__ __forceinline__ T clamp(T value, T low, T high) {
  return nan_min(nan_max(value, low), high);
}

__device__ __forceinline__ float round_even(float value) { return rintf(value); }
__device__ __forceinline__ double round_even(double value) { return rint(value); }

// 1 / scale as IEEE has it, for a scale that is NaN or no less than the smallest normal number. The compiler's division
// takes the same three instructions, but calls a function for what lies outside their range, and spills around it.
__device__ __forceinline__ double reciprocal(double scale) { return 1 / scale; }
__device__ __forceinline__ float reciprocal(float scale) {
#ifdef __CUDA_ARCH__
  float y;
  if (scale < 0x1p126f) {
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(scale));
    return __fmaf_rn(y, __fmaf_rn(-scale, y, 1), y);
  }
  if (scale > FLT_MAX) return 0;
  // Subnormal: rounded once, from more digits than any of these reciprocals is near to a tie. NaN stays.
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(scale * 0x1p-64f));
  double wide = y * 0x1p-64;
#pragma unroll
  for (int i = 0; i < 2; ++i) wide = __fma_rn(wide, __fma_rn(-scale, wide, 1), wide);
  return static_cast<float>(wide);
#else
  return 1 / scale;
#endif
}

// Shared memory of the size that the launch asks for.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#ifdef EMULATED
  return emulator::dynamic_shared();
#else
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
#endif
}

// For copy_async: what is read once leaves the L2 cache first.
__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy = 0;
#ifdef __CUDA_ARCH__
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
  return policy;
}

// Starts a copy of 16 bytes to shared memory, past the L1 cache; of zeros where `there` is false: nothing is read then.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
#ifdef __CUDA_ARCH__
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(there ? 16 : 0)
      : "memory");
#elif defined(EMULATED)
  emulator::copy_async(to, from, there);
#endif
}

__device__ __forceinline__ void copy_async(void* to, const void* from, bool there, uint64_t policy) {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(there ? 16 : 0), "l"(policy)
               : "memory");
#else
  copy_async(to, from, there);
#endif
}

// Ends a group of this thread's copies.
__device__ __forceinline__ void commit_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif defined(EMULATED)
  emulator::commit_copies();
#endif
}

// Waits for this thread's groups of copies but for the last kPending; other threads see them after a barrier.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#elif defined(EMULATED)
  emulator::wait_copies(kPending);
#endif
}

// d = a·b + d on the tensor cores: a [16, 16] and b [16, 8] of a half type, two to a word, d in fp32. With g = lane / 4
// and t = lane % 4 a thread holds of a: rows g, g + 8, g, g + 8 at k = 2t, 2t, 2t + 8, 2t + 8 and the k after; of b:
// column g at k = 2t, 2t + 8 and the k after; of d: rows g, g, g + 8, g + 8 in columns 2t, 2t + 1, 2t, 2t + 1.
template <typename S>
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<S, Half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#elif defined(EMULATED)
  const auto value = [](unsigned word, int k) { return to_float(S{static_cast<uint16_t>(word >> (k % 2 * 16))}); };
  emulator::mma(d, a, b, value);
#endif
}

// (a & b) ^ c in one instruction; with two constants among them the compiler makes two.
__device__ __forceinline__ unsigned and_xor(unsigned a, unsigned b, unsigned c) {
#ifdef __CUDA_ARCH__
  unsigned out;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
#else
  return (a & b) ^ c;
#endif
}

// a·b + c of two numbers of a half type, each rounded once.
template <typename S>
__device__ __forceinline__ unsigned fma_pair(unsigned a, unsigned b, unsigned c) {
  unsigned out = 0;
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<S, Half>) {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  }
#else
  for (int shift = 0; shift < 32; shift += 16) {
    const auto part = [&](unsigned word) { return to_float(S{static_cast<uint16_t>(word >> shift)}); };
    out |= static_cast<unsigned>(from_float<S>(part(a) * part(b) + part(c)).bits) << shift;
  }
#endif
  return out;
}

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

// The merged values of `lanes` neighbouring threads (a power of two up to a warp, or a whole block), in a fixed order;
// every one of them gets the result.
template <typename V, typename Merge>
__device__ __forceinline__ V merge_lanes(V value, int lanes, Merge merge) {
  for (int step = lanes < kWarp ? lanes / 2 : kWarp / 2; step > 0; step /= 2)
    value = merge(value, from_lane(value, step));
  if (lanes > kWarp) {
    __shared__ V of_warp[32];
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    __syncthreads();  // the values of the call before have been read
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = of_warp[0];
    for (int w = 1; w < warps; ++w) value = merge(value, of_warp[w]);
  }
  return value;
}

// n / divisor for 0 <= n < 2^63 by multiplication: a tenth of the instructions of a 64-bit division, and no call.
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

// A one-element tensor of any dtype, read on the device: whether it is not zero.
struct Flag {
  const void* data = nullptr;
  int size = 0;           // bytes
  uint64_t counted = ~0;  // bits: not the sign of a floating zero

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

// The floating dtypes, as numbers that kernels branch on.
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

// Reads from a tensor of any floating dtype, as fp32.
struct RealInput {
  const void* data = nullptr;
  int dtype = 0;

  RealInput() = default;
  explicit RealInput(const Tensor& t) : data(t.const_data_ptr()), dtype(number_of(t.scalar_type())) {}
  // The bits of element i of a dtype of up to four bytes, and what they mean: a load and, later, its use.
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

// One call of an op on the GPU of `x`: its device is current, launches go to torch's current stream.
class Gpu {
 public:
  explicit Gpu(const Tensor& x) : index_(device_of(x).index) {
    namespace accelerator = torch::stable::accelerator;
    if (index_ >= 0 && accelerator::getCurrentDeviceIndex() != index_) guard_.emplace(index_);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  int processors() const { return attribute<cudaDevAttrMultiProcessorCount>(); }
  int shared_of_processor() const { return attribute<cudaDevAttrMaxSharedMemoryPerMultiprocessor>(); }  // bytes

  // Passes the arguments by value; grid.x is at most 2^31 - 1, so callers' kernels loop.
  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t grid_x, int64_t grid_y, int threads,
              Arguments&&... arguments) const {
    launch_shared(kernel, grid_x, grid_y, threads, 0, std::forward<Arguments>(arguments)...);
  }

  // With bytes of dynamic_shared().
  template <typename... Parameters, typename... Arguments>
  void launch_shared(void (*kernel)(Parameters...), int64_t grid_x, int64_t grid_y, int threads, int bytes,
                     Arguments&&... arguments) const {
    if (bytes > 48 << 10)
      check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 bytes));
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(grid_x, 0x7fffffff)), static_cast<unsigned>(grid_y));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(bytes);
    config.stream = stream_;
    check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
  }

 private:
  // An attribute of the device; asked for once.
  template <cudaDeviceAttr kAttribute>
  int attribute() const {
    static std::atomic<int> known[64];
    const int slot = std::max(index_, 0) % 64;
    int value = known[slot].load(std::memory_order_relaxed);
    if (value == 0) {
      check(cudaDeviceGetAttribute(&value, kAttribute, std::max(index_, 0)));
      known[slot].store(value, std::memory_order_relaxed);
    }
    return value;
  }

  static void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // an error of the launch itself is taken off the list, so that it is not reported twice
    fail("CUDA: ", cudaGetErrorString(error));
  }

  int32_t index_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace qkernels
