// The kernels of one path, and their table.
#include "cpu/int8_program/norm_kernels.h"
#include "cpu/int8_program/pointwise_kernels.h"
#include "cpu/int8_program/pool_kernels.h"
#include "cpu/int8_program/transpose_kernels.h"

namespace qkernels::QK_NAMESPACE {
namespace {

#if QK_PATH == QK_PATH_SCALAR
constexpr Isa kPath = Isa::scalar;
#elif QK_PATH == QK_PATH_AVX2
constexpr Isa kPath = Isa::avx2;
#else
constexpr Isa kPath = Isa::avx512vnni;
#endif

constexpr ProgramKernels kProgramKernels = {kPath,     quantize,        quantize_planes, pointwise,  normalize,
                                            to_planes, bytes_to_planes, max_codes,       max_floats, average,
                                            blend,     shuffle,         all_finite,      any_nan};

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
