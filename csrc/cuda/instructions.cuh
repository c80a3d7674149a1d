// Functions for single instructions of the GPU, or for a few. Where __CUDA_ARCH__ is not defined (the compiler's host
// pass, and the emulator of the tests) each does the same in plain C++.
#pragma once

#include <cuda_runtime.h>

#include "qparams_rule.h"
#include "runs.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "these kernels need compute capability 8.0 or later"
#endif

namespace qkernels {

// On sm_90 the same code takes fewer registers than elsewhere, so more blocks fit a multiprocessor.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr bool kFrugal = true;
#else
constexpr bool kFrugal = false;
#endif

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

// Stores 16 bytes by one instruction. The compiler splits a plain store in two where it cannot rule out a read between
// them.
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

// Keeps elements of a half type packed in registers, two to each. Otherwise the compiler widens them as soon as they
// are loaded, and they take twice the registers until they are used.
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

// Load and store a whole vector, at an address that is a multiple of its size, or of 16 bytes where it is larger. Where
// `there` is false, nothing is read and the elements are 0.
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

// Load and store elements [first, last) of a vector one by one, at ragged ends and misaligned addresses. The others
// load as 0.
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

// Load and store elements [first, last) of a vector. kWhole: these are known to be all elements, at an aligned address,
// or none (last is 0).
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

// Widens element k. In bf16 it comes from the word that holds two elements, by one instruction instead of two.
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

// Rounds each value once, half to even; two values at a time where there is an instruction for it.
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

// Minimum and maximum, which are NaN where either operand is.
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

// Two words each hold two numbers of the half type S. Applies f to the two low ones and to the two high ones, and
// rounds each result once, as the instructions on such pairs do.
template <typename S, typename F>
unsigned by_halves(unsigned a, unsigned b, F f) {
  unsigned out = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const auto part = [&](unsigned word) { return to_float(S{static_cast<uint16_t>(word >> shift)}); };
    out |= static_cast<unsigned>(from_float<S>(f(part(a), part(b))).bits) << shift;
  }
  return out;
}

// The same for two numbers of a half type in each word.
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

// 1 / scale, rounded as IEEE prescribes, for a scale that is NaN or at least the smallest normal number. The compiler's
// division takes the same three instructions, but calls a function for values outside of their range, and spills
// registers around the call.
__device__ __forceinline__ double reciprocal(double scale) { return 1 / scale; }
__device__ __forceinline__ float reciprocal(float scale) {
#ifdef __CUDA_ARCH__
  float y;
  if (scale < 0x1p126f) {
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(scale));
    return __fmaf_rn(y, __fmaf_rn(-scale, y, 1), y);
  }
  if (scale > FLT_MAX) return 0;
  // The reciprocal is subnormal. It is rounded once, from an fp64 value that is nearer to it than any of these
  // reciprocals is to a tie. NaN stays.
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

// A policy for copy_async: what it reads leaves the L2 cache first, since nothing reads it again.
__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy = 0;
#ifdef __CUDA_ARCH__
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
  return policy;
}

// Starts a copy of 16 bytes to shared memory, past the L1 cache. Where `there` is false it reads nothing and writes
// zeros.
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

// Makes one group of the copies that this thread has started since the last group.
__device__ __forceinline__ void commit_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif defined(EMULATED)
  emulator::commit_copies();
#endif
}

// Waits until all groups of this thread's copies are done, except for the last kPending. Other threads see the copies
// after a barrier.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#elif defined(EMULATED)
  emulator::wait_copies(kPending);
#endif
}

// A kernel that Gpu::launch_early launches may start before the previous kernel in the stream has ended, once every
// block of the previous one has called let_next_start(). Its launch then takes no extra time. Every thread of the
// kernel must call wait_for_previous(). Only after this call can it read what the previous kernel writes; without the
// call the kernel could end before the previous one, and the stream's order would be lost.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#elif defined(EMULATED)
  emulator::wait_for_previous();
#endif
}

// d = a·b + d on the tensor cores. a [16, 16] and b [16, 8] are of a half type, two elements to a word; d is fp32. With
// g = lane / 4 and t = lane % 4 a thread holds
//   of a   rows g, g + 8, g, g + 8 at k = 2t, 2t, 2t + 8, 2t + 8, each with the k after it
//   of b   column g at k = 2t, 2t + 8, each with the k after it
//   of d   rows g, g, g + 8, g + 8 in columns 2t, 2t + 1, 2t, 2t + 1
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

// (a & b) ^ c in one instruction. Where two of the operands are constants, the compiler would take two.
__device__ __forceinline__ unsigned and_xor(unsigned a, unsigned b, unsigned c) {
#ifdef __CUDA_ARCH__
  unsigned out;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
#else
  return (a & b) ^ c;
#endif
}

// a·b + c for the two numbers of a half type in each word. Each result is rounded once.
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

}  // namespace qkernels
