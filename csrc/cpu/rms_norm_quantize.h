// What rms_norm_quantize.cpp and rms_norm_quantize_kernels.h share.
#pragma once

#include <cstdint>

namespace qkernels {

constexpr int64_t kSummedRows = 16;  // rows whose share of the weight's gradient is summed in x's arithmetic type

}  // namespace qkernels
