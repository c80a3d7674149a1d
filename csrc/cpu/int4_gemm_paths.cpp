// Compiles int4_gemm_kernels.h once per instruction-set path and chooses among them.
#include "int4_gemm.h"

#define QK_BODY "int4_gemm_kernels.h"
#include "foreach_gemm_isa.h"

namespace qkernels {

const Int4Kernels& int4_kernels() { return best_kernels(); }

}  // namespace qkernels
