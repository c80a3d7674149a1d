// Instruction-set paths of the CPU kernels: which exist, which one runs, and how code is compiled for each.
//
// One translation unit holds a kernel for all paths, without flags of its own: code between QK_TARGET_<ISA>_BEGIN and
// QK_TARGET_END may use the instructions of that path, and runs only where active_isa() allows the path.
#pragma once

#include <atomic>
#include <cstdint>

#include "cpu/common/amx.h"

namespace qkernels {

// amx is the avx512vnni path, whose code is not compiled once more, with the products of int8_gemm/amx.h.
enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512vnni = 3, amx = 4 };
constexpr const char* kIsaNames[] = {"scalar", "avx2", "avx512", "avx512vnni", "amx"};

struct IsaState {
  std::atomic<int> active;  // the highest path that kernels may take
  std::atomic<int> last;    // the path that the last kernel took, or -1; tests assert it
};

inline Isa supported_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return Isa::scalar;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")))
    return Isa::avx2;
  if (!__builtin_cpu_supports("avx512vnni")) return Isa::avx512;
  return amx_allowed() ? Isa::amx : Isa::avx512vnni;
#else
  return Isa::scalar;
#endif
}

// Dot products of bf16 pairs, which not every CPU of the avx512vnni path has.
inline bool has_bf16_dot() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

inline IsaState isa_state{{static_cast<int>(supported_isa())}, {-1}};

inline Isa active_isa() { return static_cast<Isa>(isa_state.active.load(std::memory_order_relaxed)); }
inline void record_isa(Isa isa) { isa_state.last.store(static_cast<int>(isa), std::memory_order_relaxed); }

}  // namespace qkernels

// The paths as numbers that #if compares.
#define QK_PATH_SCALAR 0
#define QK_PATH_AVX2 1
#define QK_PATH_AVX512 2
#define QK_PATH_AVX512VNNI 3

#define QK_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
// clang has no preferred width, and ignores a whole target attribute if it does not know one feature in it.
#define QK_PREFER_512
#define QK_TARGET_BEGIN(...) QK_PRAGMA(clang attribute push(__attribute__((target(__VA_ARGS__))), apply_to = function))
#define QK_TARGET_END QK_PRAGMA(clang attribute pop)
#else
#define QK_PREFER_512 , "prefer-vector-width=512"
#define QK_TARGET_BEGIN(...) QK_PRAGMA(GCC push_options) QK_PRAGMA(GCC target(__VA_ARGS__))
#define QK_TARGET_END QK_PRAGMA(GCC pop_options)
#endif
#define QK_TARGET_AVX2_BEGIN QK_TARGET_BEGIN("avx2,fma,f16c,bmi2")
#define QK_TARGET_AVX512_BEGIN QK_TARGET_BEGIN("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512vl,avx512dq" QK_PREFER_512)
#define QK_TARGET_AVX512VNNI_BEGIN \
  QK_TARGET_BEGIN("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni" QK_PREFER_512)
