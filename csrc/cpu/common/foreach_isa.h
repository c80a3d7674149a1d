// Compiles the file QK_BODY three times: for the paths scalar, avx2 and avx512. With QK_USES_VNNI the third path is
// avx512vnni. QK_PATH names the path. A source file includes this file once.
#include "cpu/common/isa.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of its own _mm256_undefined_* and _mm512_undefined_* inside the intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define QK_PATH QK_PATH_SCALAR
#include QK_BODY
#include "cpu/common/end_of_path.h"

#if defined(__x86_64__)
QK_TARGET_AVX2_BEGIN
#define QK_PATH QK_PATH_AVX2
#include QK_BODY
#include "cpu/common/end_of_path.h"
QK_TARGET_END

#ifdef QK_USES_VNNI
#define QK_WIDEST avx512vnni
QK_TARGET_AVX512VNNI_BEGIN
#define QK_PATH QK_PATH_AVX512VNNI
#else
#define QK_WIDEST avx512
QK_TARGET_AVX512_BEGIN
#define QK_PATH QK_PATH_AVX512
#endif
#include QK_BODY
#include "cpu/common/end_of_path.h"
QK_TARGET_END

// Calls `call` in the namespace of the active path.
#define QK_DISPATCH_ISA(call)                   \
  do {                                          \
    const ::qkernels::Isa isa_ = active_isa();  \
    if (isa_ >= ::qkernels::Isa::QK_WIDEST) {   \
      record_isa(::qkernels::Isa::QK_WIDEST);   \
      ::qkernels::QK_WIDEST::call;              \
    } else if (isa_ >= ::qkernels::Isa::avx2) { \
      record_isa(::qkernels::Isa::avx2);        \
      ::qkernels::avx2::call;                   \
    } else {                                    \
      record_isa(::qkernels::Isa::scalar);      \
      ::qkernels::scalar::call;                 \
    }                                           \
  } while (0)

// The object `name` of the active path's namespace.
#define QK_OF_ACTIVE_ISA(name)                                              \
  (active_isa() >= ::qkernels::Isa::QK_WIDEST ? ::qkernels::QK_WIDEST::name \
   : active_isa() >= ::qkernels::Isa::avx2    ? ::qkernels::avx2::name      \
                                              : ::qkernels::scalar::name)
#else
#define QK_DISPATCH_ISA(call)            \
  do {                                   \
    record_isa(::qkernels::Isa::scalar); \
    ::qkernels::scalar::call;            \
  } while (0)
#define QK_OF_ACTIVE_ISA(name) ::qkernels::scalar::name
#endif
