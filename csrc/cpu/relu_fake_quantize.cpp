// ReLU fused with fake quantization on the CPU; the kernels are in relu_fake_quantize_kernels.h.
#include "cpu/common/qparams.h"

#define QK_BODY "cpu/relu_fake_quantize_kernels.h"
#include "cpu/common/foreach_isa.h"

#include "cpu/common/gradient.h"

namespace qkernels {
namespace {

// y in the layout of x, and the mask where there is one.
Tensor forward(const Tensor& x_any, const Tensor& scale, const std::optional<Tensor>& zero_point, int64_t quant_min,
               int64_t quant_max, const Tensor* mask, bool lsq = false) {
  check_floating("x", x_any);
  Tensor y = empty_dense_like(x_any);
  const Tensor x = in_layout_of(x_any, y);
  const int64_t numel = x.numel();
  dispatch_floating("x", x, [&](auto tag) {
    using S = decltype(tag);
    const auto q = qparams<Arithmetic<S>>(x, scale, zero_point, quant_min, quant_max);
    if (numel == 0) return;
    const IndexedRuns runs = indexed_runs(x, scale);
    const S* in = static_cast<const S*>(x.const_data_ptr());
    S* out = static_cast<S*>(y.mutable_data_ptr());
    uint8_t* bits = mask ? static_cast<uint8_t*>(mask->mutable_data_ptr()) : nullptr;
    if (mask && lsq) {
      QK_DISPATCH_ISA(relu_forward_mask<true>(runs, q, numel, in, out, bits));
    } else if (mask) {
      QK_DISPATCH_ISA(relu_forward_mask<false>(runs, q, numel, in, out, bits));
    } else {
      QK_DISPATCH_ISA(relu_forward<false>(runs, q, numel, in, out, nullptr));
    }
  });
  return y;
}

Tensor relu_fake_quantize_forward(const Tensor& x, const Tensor& scale, std::optional<Tensor> zero_point,
                                  int64_t quant_min, int64_t quant_max) {
  return forward(x, scale, zero_point, quant_min, quant_max, nullptr);
}

std::tuple<Tensor, Tensor> relu_fake_quantize_forward_mask(const Tensor& x, const Tensor& scale,
                                                           std::optional<Tensor> zero_point, int64_t quant_min,
                                                           int64_t quant_max, bool lsq) {
  const Tensor mask = empty_mask(x.numel(), x);
  const Tensor y = forward(x, scale, zero_point, quant_min, quant_max, &mask, lsq);
  return {y, mask};
}

Tensor relu_fake_quantize_backward(const Tensor& grad_any, const Tensor& x_any, const Tensor& scale,
                                   std::optional<Tensor> zero_point, int64_t quant_min, int64_t quant_max, bool lsq) {
  check_floating("x", x_any);
  check_grad(grad_any, x_any);
  const Tensor x = to_dense(x_any);
  const Tensor grad = in_layout_of(grad_any, x);
  Tensor dx = empty_strided(x.sizes(), x.strides(), x.scalar_type());
  const int64_t numel = x.numel();
  dispatch_floating("x", x, [&](auto tag) {
    using S = decltype(tag);
    const auto q = qparams<Arithmetic<S>>(x, scale, zero_point, quant_min, quant_max);
    if (numel == 0) return;
    const IndexedRuns runs = indexed_runs(x, scale);
    const S* dy = static_cast<const S*>(grad.const_data_ptr());
    const S* in = static_cast<const S*>(x.const_data_ptr());
    S* out = static_cast<S*>(dx.mutable_data_ptr());
    if (lsq) {
      QK_DISPATCH_ISA(relu_backward<true>(runs, q, numel, dy, in, out));
    } else {
      QK_DISPATCH_ISA(relu_backward(runs, q, numel, dy, in, out));
    }
  });
  return dx;
}

std::tuple<Tensor, Tensor, Tensor> relu_fake_quantize_learnable_backward(const Tensor& grad, const Tensor& x,
                                                                         const Tensor& scale,
                                                                         std::optional<Tensor> zero_point,
                                                                         int64_t quant_min, int64_t quant_max,
                                                                         double grad_factor, bool lsq) {
  return learned(
      grad, x, scale, zero_point, quant_min, quant_max,
      [&](const auto& runs, const auto& q, int64_t numel, const auto* dy, const auto* in, auto* out, double* dscale,
          double* dzero_point) {
        if (lsq) {
          QK_DISPATCH_ISA(relu_learnable_backward<true>(runs, q, numel, dy, in, out, grad_factor, dscale, dzero_point));
        } else {
          QK_DISPATCH_ISA(relu_learnable_backward(runs, q, numel, dy, in, out, grad_factor, dscale, dzero_point));
        }
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("relu_fake_quantize_forward", TORCH_BOX(&relu_fake_quantize_forward));
  m.impl("relu_fake_quantize_forward_mask", TORCH_BOX(&relu_fake_quantize_forward_mask));
  m.impl("relu_fake_quantize_backward", TORCH_BOX(&relu_fake_quantize_backward));
  m.impl("relu_fake_quantize_learnable_backward", TORCH_BOX(&relu_fake_quantize_learnable_backward));
}

}  // namespace qkernels
