// Compiles the file QK_BODY, which ends in a table kKernels, once for each path of the GEMM kernels, with QK_PATH
// naming it: in namespace scalar for any CPU, avx2 and avx512vnni for theirs. best_kernels() is the table of the best
// path that active_isa() allows.
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
#include "cpu/common/isa.h"

#define QK_PATH_SCALAR 0
#define QK_PATH_AVX2 1
#define QK_PATH_AVX512VNNI 2

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of its own _mm512_undefined_* inside the intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace qkernels {
namespace {

namespace scalar {
#define QK_LEVEL 0
#include "cpu/common/vec.h"
#define QK_PATH QK_PATH_SCALAR
#include QK_BODY
#undef QK_LEVEL
#undef QK_PATH
}  // namespace scalar

#if defined(__x86_64__)
QK_TARGET_AVX2_BEGIN
namespace avx2 {
#define QK_LEVEL 1
#include "cpu/common/vec.h"
#define QK_PATH QK_PATH_AVX2
#include QK_BODY
#undef QK_LEVEL
#undef QK_PATH
}  // namespace avx2
QK_TARGET_END

QK_TARGET_AVX512VNNI_BEGIN
namespace avx512vnni {
#define QK_LEVEL 2
#include "cpu/common/vec.h"
#define QK_PATH QK_PATH_AVX512VNNI
#include QK_BODY
#undef QK_LEVEL
#undef QK_PATH
}  // namespace avx512vnni
QK_TARGET_END
#endif

inline const auto& best_kernels() {
#if defined(__x86_64__)
  if (active_isa() >= Isa::avx512vnni) return avx512vnni::kKernels;
  if (active_isa() >= Isa::avx2) return avx2::kKernels;
#endif
  return scalar::kKernels;
}

}  // namespace
}  // namespace qkernels
