// Compiles program_kernels.h once per path and chooses among the paths.
#define QK_BODY "cpu/int8_program/program_kernels.h"
#define QK_USES_VNNI
#include "cpu/common/foreach_isa.h"

namespace qkernels {

const ProgramKernels& program_kernels() { return QK_OF_ACTIVE_ISA(kProgramKernels); }

}  // namespace qkernels
