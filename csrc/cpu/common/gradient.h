// What ops with gradients of x, scale and zero point share.
#pragma once

#include <tuple>

#include "cpu/common/qparams.h"

namespace qkernels {

// A contiguous tensor of `dtype` in the shape of `like`, from fp64 values.
inline Tensor from_double(const std::vector<double>& values, const Tensor& like) {
  Tensor out = empty(to_vector(like.sizes()), like.scalar_type());
  dispatch_floating("scale", out, [&](auto tag) {
    using S = decltype(tag);
    S* p = static_cast<S*>(out.mutable_data_ptr());
    for (size_t i = 0; i < values.size(); ++i) p[i] = from_float<S>(values[i]);
  });
  return out;
}

// Returns dx, dscale and dzero_point. `run(runs, qparams, numel, grad, x, dx, dscale, dzero_point)` calls the kernel:
// its pointers are of x's storage type, its sums fp64.
template <typename F>
std::tuple<Tensor, Tensor, Tensor> learned(const Tensor& grad_any, const Tensor& x_any, const Tensor& scale,
                                           const std::optional<Tensor>& zero_point, int64_t quant_min,
                                           int64_t quant_max, F run) {
  check_floating("x", x_any);
  check_grad(grad_any, x_any);
  const Tensor x = to_dense(x_any);
  const Tensor grad = in_layout_of(grad_any, x);
  Tensor dx = empty_strided(x.sizes(), x.strides(), x.scalar_type());
  const int64_t numel = x.numel();
  std::vector<double> dscale(scale.numel()), dzero_point(scale.numel());
  dispatch_floating("x", x, [&](auto tag) {
    using S = decltype(tag);
    const auto q = qparams<Arithmetic<S>>(x, scale, zero_point, quant_min, quant_max);
    if (numel == 0) return;
    const IndexedRuns runs = indexed_runs(x, scale);
    run(runs, q, numel, static_cast<const S*>(grad.const_data_ptr()), static_cast<const S*>(x.const_data_ptr()),
        static_cast<S*>(dx.mutable_data_ptr()), dscale.data(), dzero_point.data());
  });
  return {dx, from_double(dscale, scale), from_double(dzero_point, scale)};
}

}  // namespace qkernels
