// Compiles conv_kernels.h once per path and chooses among the paths.
#define QK_BODY "cpu/int8_conv/conv_kernels.h"
#define QK_USES_VNNI
#include "cpu/common/foreach_isa.h"

namespace qkernels {

Convolve choose_convolve(ConvWork& work) {
#ifdef QK_HAS_AMX
  work.segment = kAmxRows;
  if (active_isa() >= Isa::amx && avx512vnni::worth_amx(work)) return avx512vnni::convolve_amx;
#endif
  work.segment = kSegment;
  return QK_OF_ACTIVE_ISA(convolve);
}

}  // namespace qkernels
