// Compiles int4_gemm_kernels.h once per instruction-set path and chooses among them.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "element.h"
#include "int4_gemm.h"

#define QK_PATH_SCALAR 0
#define QK_PATH_AVX2 1
#define QK_PATH_AVX512VNNI 2

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of its own _mm512_undefined_* inside the intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace qkernels {
namespace {

namespace scalar {
#define QK_LEVEL 0
#include "vec.h"
#define QK_PATH QK_PATH_SCALAR
#include "int4_gemm_kernels.h"
#undef QK_LEVEL
#undef QK_PATH
}  // namespace scalar

#if defined(__x86_64__)
QK_TARGET_AVX2_BEGIN
namespace avx2 {
#define QK_LEVEL 1
#include "vec.h"
#define QK_PATH QK_PATH_AVX2
#include "int4_gemm_kernels.h"
#undef QK_LEVEL
#undef QK_PATH
}  // namespace avx2
QK_TARGET_END

QK_TARGET_AVX512VNNI_BEGIN
namespace avx512vnni {
#define QK_LEVEL 2
#include "vec.h"
#define QK_PATH QK_PATH_AVX512VNNI
#include "int4_gemm_kernels.h"
#undef QK_LEVEL
#undef QK_PATH
}  // namespace avx512vnni
QK_TARGET_END
#endif

}  // namespace

const Int4Kernels& int4_kernels() {
#if defined(__x86_64__)
  if (active_isa() >= Isa::avx512vnni) return avx512vnni::kKernels;
  if (active_isa() >= Isa::avx2) return avx2::kKernels;
#endif
  return scalar::kKernels;
}

}  // namespace qkernels
