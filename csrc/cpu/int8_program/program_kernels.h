// The kernels of one path, and their table.
#include "cpu/int8_program/norm_kernels.h"
#include "cpu/int8_program/pointwise_kernels.h"
#include "cpu/int8_program/pool_kernels.h"
#include "cpu/int8_program/transpose_kernels.h"

namespace qkernels::QK_NAMESPACE {
namespace {

constexpr ProgramKernels kProgramKernels = {quantize,        quantize_planes, pointwise,  normalize, to_planes,
                                            bytes_to_planes, max_codes,       max_floats, average,   blend,
                                            shuffle,         all_finite,      any_nan};

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
