// Functions that the file of one op offers to those of others, so that no kernel is compiled twice. They do not check
// their arguments.
#pragma once

#include "common.cuh"

namespace qkernels {

// Writes y, which is laid out as a dense x, and the packed mask unless `mask` is null. Where `on` has a tensor and is
// not set, y = x.
void fake_quantize_into(const Gpu& gpu, const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point,
                        int64_t quant_min, int64_t quant_max, const Tensor& y, const Tensor* mask, Flag on);

// Both write dx; the second one writes the gradients of scale and zero point too. grad, x and dx are dense and in one
// layout.
void fake_quantize_backward_into(const Gpu& gpu, const Tensor& grad, const Tensor& x, const Tensor& scale,
                                 const std::optional<Tensor>& zero_point, int64_t quant_min, int64_t quant_max,
                                 const Tensor& dx, bool lsq);
void fake_quantize_learnable_backward_into(const Gpu& gpu, const Tensor& grad, const Tensor& x, const Tensor& scale,
                                           const std::optional<Tensor>& zero_point, int64_t quant_min,
                                           int64_t quant_max, double grad_factor, bool lsq, const Tensor& dx,
                                           const Tensor& dscale, const Tensor& dzero_point);

// Writes q, which has an integer dtype and the layout of x. x is dense.
void quantize_into(const Gpu& gpu, const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point,
                   int64_t quant_min, int64_t quant_max, const Tensor& q);

}  // namespace qkernels
