// Gradients of learned scales and zero points (LSQ, LSQ+). One pass over grad and x writes dx and adds up the terms.
#include "learnable.cuh"
#include "ops.cuh"

namespace qkernels {
namespace {

std::tuple<Tensor, Tensor, Tensor> fake_quantize_learnable_backward(const Tensor& grad_any, const Tensor& x_any,
                                                                    const Tensor& scale,
                                                                    std::optional<Tensor> zero_point, int64_t quant_min,
                                                                    int64_t quant_max, double grad_factor, bool lsq) {
  check_floating("x", x_any);
  const Gpu gpu(x_any);
  const Device device = gpu.device();
  check_grad(grad_any, x_any, device);
  check_range(quant_min, quant_max);
  check_scale(scale, zero_point, x_any, device);
  const Tensor x = to_dense(x_any);
  const Tensor grad = in_layout_of(grad_any, x);
  Tensor dx = empty_strided(x.sizes(), x.strides(), x.scalar_type(), device);
  Tensor dscale = empty(to_vector(scale.sizes()), scale.scalar_type(), device);
  Tensor dzero_point = empty(to_vector(scale.sizes()), scale.scalar_type(), device);
  fake_quantize_learnable_backward_into(gpu, grad, x, scale, zero_point, quant_min, quant_max, grad_factor, lsq, dx,
                                        dscale, dzero_point);
  return {dx, dscale, dzero_point};
}

}  // namespace

void fake_quantize_learnable_backward_into(const Gpu& gpu, const Tensor& grad, const Tensor& x, const Tensor& scale,
                                           const std::optional<Tensor>& zero_point, int64_t quant_min,
                                           int64_t quant_max, double grad_factor, bool lsq, const Tensor& dx,
                                           const Tensor& dscale, const Tensor& dzero_point) {
  dispatch_floating("x", x, [&](auto tag) {
    using S = decltype(tag);
    const auto q = qparams<Arithmetic<S>>(scale, zero_point, quant_min, quant_max);
    with_convention(lsq, [&](auto open) {
      const LearnableOp<S, decltype(open)::value> op{static_cast<const S*>(grad.const_data_ptr()),
                                                     static_cast<const S*>(x.const_data_ptr()),
                                                     static_cast<S*>(dx.mutable_data_ptr()),
                                                     q.quant_min,
                                                     q.quant_max,
                                                     grad_factor,
                                                     RealOutput(dscale),
                                                     RealOutput(dzero_point)};
      reduce_channels(gpu, op, q, runs_of(x, scale), x.numel(), is_aligned({op.grad, op.x, op.dx}));
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("fake_quantize_learnable_backward", TORCH_BOX(&fake_quantize_learnable_backward));
}

}  // namespace qkernels
