// Compiles int4_gemm_kernels.h once per instruction-set path and chooses among them.
#include "cpu/int4_gemm/int4_gemm.h"

#define QK_BODY "cpu/int4_gemm/int4_gemm_kernels.h"
#include "cpu/common/foreach_gemm_isa.h"

namespace qkernels {

const Int4Kernels& int4_kernels() { return best_kernels(); }

}  // namespace qkernels
