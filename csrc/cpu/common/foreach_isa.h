// Compiles the file QK_BODY once for each vector path: in namespace scalar for any CPU, avx2 and avx512 for theirs.
// Everything in it works on 16 lanes whatever the path, so that sums come out in one order and bit-identical.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/common/isa.h"

#define QK_LEVEL 0
namespace qkernels::scalar {
#include "cpu/common/vec.h"
#include QK_BODY
}  // namespace qkernels::scalar
#undef QK_LEVEL

#if defined(__x86_64__)
QK_TARGET_AVX2_BEGIN
#define QK_LEVEL 1
namespace qkernels::avx2 {
#include "cpu/common/vec.h"
#include QK_BODY
}  // namespace qkernels::avx2
#undef QK_LEVEL
QK_TARGET_END

QK_TARGET_AVX512_BEGIN
#define QK_LEVEL 2
namespace qkernels::avx512 {
#include "cpu/common/vec.h"
#include QK_BODY
}  // namespace qkernels::avx512
#undef QK_LEVEL
QK_TARGET_END

// Calls `call` in the namespace of the active path.
#define QK_DISPATCH_ISA(call)                   \
  do {                                          \
    const ::qkernels::Isa isa_ = active_isa();  \
    if (isa_ >= ::qkernels::Isa::avx512) {      \
      record_isa(::qkernels::Isa::avx512);      \
      ::qkernels::avx512::call;                 \
    } else if (isa_ == ::qkernels::Isa::avx2) { \
      record_isa(::qkernels::Isa::avx2);        \
      ::qkernels::avx2::call;                   \
    } else {                                    \
      record_isa(::qkernels::Isa::scalar);      \
      ::qkernels::scalar::call;                 \
    }                                           \
  } while (0)
#else
#define QK_DISPATCH_ISA(call)            \
  do {                                   \
    record_isa(::qkernels::Isa::scalar); \
    ::qkernels::scalar::call;            \
  } while (0)
#endif
