// Functions that the file of one op offers to those of others, so that no kernel is compiled twice.
#pragma once

#include "tensor.h"

namespace qkernels {

// Writes y, which is laid out as a dense x, and the packed mask where there is one. x is floating.
void fake_quantize_into(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point,
                        int64_t quant_min, int64_t quant_max, const Tensor& y, const Tensor* mask);

Tensor quantize(const Tensor& x, const Tensor& scale, std::optional<Tensor> zero_point, int64_t quant_min,
                int64_t quant_max, ScalarType dtype);

}  // namespace qkernels
