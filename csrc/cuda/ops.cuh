// Calls from one op's file into another's, so that no kernel is compiled twice.
#pragma once

#include "common.cuh"

namespace qkernels {

// All of these trust what they are given.

// y (laid out as a dense x) and the packed mask, where one is wanted. Where `on` is given and not set, y = x.
void fake_quantize_into(const Gpu& gpu, const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point,
                        int64_t quant_min, int64_t quant_max, const Tensor& y, const Tensor* mask, Flag on);

// dx and the gradients of scale and zero point; grad, x and dx are dense and in one layout.
void fake_quantize_backward_into(const Gpu& gpu, const Tensor& grad, const Tensor& x, const Tensor& scale,
                                 const std::optional<Tensor>& zero_point, int64_t quant_min, int64_t quant_max,
                                 const Tensor& dx, bool lsq);
void fake_quantize_learnable_backward_into(const Gpu& gpu, const Tensor& grad, const Tensor& x, const Tensor& scale,
                                           const std::optional<Tensor>& zero_point, int64_t quant_min,
                                           int64_t quant_max, double grad_factor, bool lsq, const Tensor& dx,
                                           const Tensor& dscale, const Tensor& dzero_point);

// q, of an integer dtype, laid out as the dense x.
void quantize_into(const Gpu& gpu, const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point,
                   int64_t quant_min, int64_t quant_max, const Tensor& q);

}  // namespace qkernels
