// torch's own fake-quantize ops: the rules of torch's arithmetic, and the kernels that take aten's place.
#pragma once

#include <tuple>

#include "tensor.h"

namespace qkernels {

// How torch computes where the types of the arguments matter; see aten_forward_exact.
struct AtenRule {
  double quant_min, quant_max;
  bool rounds_after;   // a float zero point is added before rounding
  bool float_product;  // the last product is fp32 even for fp64 inputs
};

using Masked = std::tuple<Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// Kernels with aten's signatures, which say no by throwing std::runtime_error.
namespace aten {

Masked per_tensor_cachemask(const Tensor& x, double scale, int64_t zero_point, int64_t quant_min, int64_t quant_max);
Masked per_tensor_cachemask_tensor_qparams(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                           const Tensor& enabled, int64_t quant_min, int64_t quant_max);
Masked per_channel_cachemask(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t axis,
                             int64_t quant_min, int64_t quant_max);
Tensor learnable_per_tensor(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
                            int64_t quant_max, double);
Tensor learnable_per_channel(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t axis,
                             int64_t quant_min, int64_t quant_max, double);
Gradients learnable_per_tensor_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                        const Tensor& zero_point, int64_t quant_min, int64_t quant_max,
                                        double grad_factor);
Gradients learnable_per_channel_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                         const Tensor& zero_point, int64_t axis, int64_t quant_min, int64_t quant_max,
                                         double grad_factor);
Masked fused_moving_avg_obs(const Tensor& x, const Tensor& observer_on, const Tensor& fake_quant_on, Tensor running_min,
                            Tensor running_max, Tensor scale, Tensor zero_point, double averaging_const,
                            int64_t quant_min, int64_t quant_max, int64_t axis, bool per_row, bool symmetric);

}  // namespace aten
}  // namespace qkernels
