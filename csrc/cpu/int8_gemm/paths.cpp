// Compiles int8_gemm_kernels.h once per instruction-set path and chooses among them.
#include "cpu/int8_gemm/int8_gemm.h"

namespace qkernels {
namespace {

// Packed weights are read without software prefetching: forward streams in huge pages are the hardware's own case.
// 1 x 11008 x 4096, 1 thread: 29 GB/s with a prefetch 4 KiB ahead, 45 without; from small pages 25 and 30.
// Weights that are being packed are read in too many streams for the hardware to follow.
constexpr int64_t kRowsAhead = 16, kBytesAhead = 256;

}  // namespace
}  // namespace qkernels

#define QK_BODY "cpu/int8_gemm/int8_gemm_kernels.h"
#include "cpu/common/foreach_gemm_isa.h"

namespace qkernels {

const Int8Kernels& int8_kernels() { return best_kernels(); }

}  // namespace qkernels
