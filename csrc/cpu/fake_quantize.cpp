// Fake quantization on the CPU, element by element: checks and memory layout. The kernels are in
// fake_quantize_kernels.h.
#include "cpu/common/ops.h"
#include "cpu/common/qparams.h"

#define QK_BODY "cpu/fake_quantize_kernels.h"
#include "cpu/common/foreach_isa.h"

namespace qkernels {
namespace {

// Builds the call's Qparams from tensors or from numbers.
struct TensorParams {
  const Tensor& scale;
  const std::optional<Tensor>& zero_point;
  IndexedRuns runs(const Tensor& x) const { return indexed_runs(x, scale); }
  template <typename T>
  Qparams<T> make(const Tensor& x, int64_t quant_min, int64_t quant_max) const {
    return qparams<T>(x, scale, zero_point, quant_min, quant_max);
  }
};

struct ScalarParams {
  double scale;
  int64_t zero_point;
  IndexedRuns runs(const Tensor& x) const { return {one_run(x), {}}; }
  template <typename T>
  Qparams<T> make(const Tensor&, int64_t quant_min, int64_t quant_max) const {
    return qparams<T>(scale, zero_point, quant_min, quant_max);
  }
};

template <typename Params>
void run_forward(const Tensor& x_any, const Params& params, int64_t quant_min, int64_t quant_max, const Tensor& y,
                 const Tensor* mask, bool lsq = false) {
  const Tensor x = in_layout_of(x_any, y);
  const int64_t numel = x.numel();
  dispatch_floating("x", x, [&](auto tag) {
    using S = decltype(tag);
    const auto q = params.template make<Arithmetic<S>>(x_any, quant_min, quant_max);
    if (numel == 0) return;
    const IndexedRuns runs = params.runs(x);
    const S* in = static_cast<const S*>(x.const_data_ptr());
    S* out = static_cast<S*>(y.mutable_data_ptr());
    uint8_t* bits = mask ? static_cast<uint8_t*>(mask->mutable_data_ptr()) : nullptr;
    if (lsq) {
      QK_DISPATCH_ISA(forward<true>(runs, q, numel, in, out, bits));
    } else {
      QK_DISPATCH_ISA(forward(runs, q, numel, in, out, bits));
    }
  });
}

template <typename Params>
Tensor forward_with(const Tensor& x, const Params& params, int64_t quant_min, int64_t quant_max) {
  check_floating("x", x);
  Tensor y = empty_dense_like(x);
  run_forward(x, params, quant_min, quant_max, y, nullptr);
  return y;
}

template <typename Params>
std::tuple<Tensor, Tensor> forward_mask_with(const Tensor& x, const Params& params, int64_t quant_min,
                                             int64_t quant_max, bool lsq = false) {
  check_floating("x", x);
  Tensor y = empty_dense_like(x), mask = empty_mask(x.numel(), x);
  run_forward(x, params, quant_min, quant_max, y, &mask, lsq);
  return {y, mask};
}

template <typename Params>
Tensor backward_with(const Tensor& grad_any, const Tensor& x_any, const Params& params, int64_t quant_min,
                     int64_t quant_max, bool lsq = false) {
  check_floating("x", x_any);
  check_grad(grad_any, x_any);
  const Tensor x = to_dense(x_any);
  const Tensor grad = in_layout_of(grad_any, x);
  Tensor dx = empty_strided(x.sizes(), x.strides(), x.scalar_type());
  const int64_t numel = x.numel();
  dispatch_floating("x", x, [&](auto tag) {
    using S = decltype(tag);
    const auto q = params.template make<Arithmetic<S>>(x, quant_min, quant_max);
    if (numel == 0) return;
    const IndexedRuns runs = params.runs(x);
    const S* dy = static_cast<const S*>(grad.const_data_ptr());
    const S* in = static_cast<const S*>(x.const_data_ptr());
    S* out = static_cast<S*>(dx.mutable_data_ptr());
    if (lsq) {
      QK_DISPATCH_ISA(backward<true>(runs, q, numel, dy, in, out));
    } else {
      QK_DISPATCH_ISA(backward(runs, q, numel, dy, in, out));
    }
  });
  return dx;
}

Tensor fake_quantize_forward(const Tensor& x, const Tensor& scale, std::optional<Tensor> zero_point, int64_t quant_min,
                             int64_t quant_max) {
  return forward_with(x, TensorParams{scale, zero_point}, quant_min, quant_max);
}

Tensor fake_quantize_forward_scalar(const Tensor& x, double scale, int64_t zero_point, int64_t quant_min,
                                    int64_t quant_max) {
  return forward_with(x, ScalarParams{scale, zero_point}, quant_min, quant_max);
}

std::tuple<Tensor, Tensor> fake_quantize_forward_mask(const Tensor& x, const Tensor& scale,
                                                      std::optional<Tensor> zero_point, int64_t quant_min,
                                                      int64_t quant_max, bool lsq) {
  return forward_mask_with(x, TensorParams{scale, zero_point}, quant_min, quant_max, lsq);
}

std::tuple<Tensor, Tensor> fake_quantize_forward_mask_scalar(const Tensor& x, double scale, int64_t zero_point,
                                                             int64_t quant_min, int64_t quant_max) {
  return forward_mask_with(x, ScalarParams{scale, zero_point}, quant_min, quant_max);
}

Tensor fake_quantize_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                              std::optional<Tensor> zero_point, int64_t quant_min, int64_t quant_max, bool lsq) {
  return backward_with(grad, x, TensorParams{scale, zero_point}, quant_min, quant_max, lsq);
}

Tensor fake_quantize_backward_scalar(const Tensor& grad, const Tensor& x, double scale, int64_t zero_point,
                                     int64_t quant_min, int64_t quant_max) {
  return backward_with(grad, x, ScalarParams{scale, zero_point}, quant_min, quant_max);
}

Tensor fake_quantize_backward_mask(const Tensor& grad_any, const Tensor& mask) {
  check_floating("grad", grad_any);
  const Tensor grad = to_dense(grad_any);
  const int64_t numel = grad.numel();
  check_mask(mask, grad);
  Tensor dx = empty_strided(grad.sizes(), grad.strides(), grad.scalar_type());
  if (numel == 0) return dx;
  const uint8_t* bits = static_cast<const uint8_t*>(mask.const_data_ptr());
  dispatch_floating("grad", grad, [&](auto tag) {
    using S = decltype(tag);
    const S* dy = static_cast<const S*>(grad.const_data_ptr());
    S* out = static_cast<S*>(dx.mutable_data_ptr());
    QK_DISPATCH_ISA(backward_mask(numel, dy, bits, out));
  });
  return dx;
}

}  // namespace

void fake_quantize_into(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point,
                        int64_t quant_min, int64_t quant_max, const Tensor& y, const Tensor* mask) {
  run_forward(x, TensorParams{scale, zero_point}, quant_min, quant_max, y, mask);
}

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("fake_quantize_forward", TORCH_BOX(&fake_quantize_forward));
  m.impl("fake_quantize_forward.scalar", TORCH_BOX(&fake_quantize_forward_scalar));
  m.impl("fake_quantize_forward_mask", TORCH_BOX(&fake_quantize_forward_mask));
  m.impl("fake_quantize_forward_mask.scalar", TORCH_BOX(&fake_quantize_forward_mask_scalar));
  m.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward));
  m.impl("fake_quantize_backward.scalar", TORCH_BOX(&fake_quantize_backward_scalar));
  m.impl("fake_quantize_backward_mask", TORCH_BOX(&fake_quantize_backward_mask));
}

}  // namespace qkernels
