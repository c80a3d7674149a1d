// Compiles int4_gemm_kernels.h once per path and chooses among the paths.
#define QK_BODY "cpu/int4_gemm/int4_gemm_kernels.h"
#define QK_USES_VNNI
#include "cpu/common/foreach_isa.h"

namespace qkernels {

const Int4Kernels& int4_kernels() {
#ifdef QK_HAS_AMX
  if (active_isa() >= Isa::amx) return avx512vnni::kAmxKernels;
#endif
  return QK_OF_ACTIVE_ISA(kKernels);
}

}  // namespace qkernels
