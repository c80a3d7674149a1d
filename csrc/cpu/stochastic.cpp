// Stochastic rounding on the CPU: checks and memory layout. The kernels are in stochastic_kernels.h.
#include "cpu/common/philox.h"
#include "cpu/common/qparams.h"

#define QK_BODY "cpu/stochastic_kernels.h"
#include "cpu/common/foreach_isa.h"

#include "cpu/common/gradient.h"

namespace qkernels {
namespace {

std::tuple<Tensor, Tensor> fake_quantize_stochastic_forward(const Tensor& x_any, const Tensor& scale,
                                                            std::optional<Tensor> zero_point, int64_t quant_min,
                                                            int64_t quant_max, int64_t seed, int64_t offset,
                                                            std::optional<Tensor> offset_tensor) {
  check_floating("x", x_any);
  const int64_t numel = x_any.numel();
  Tensor y = empty_dense_like(x_any), mask = empty_mask(numel, x_any);
  const Tensor x = in_layout_of(x_any, y);
  const Philox philox = generator(seed, offset, offset_tensor);
  dispatch_floating("x", x, [&](auto tag) {
    using S = decltype(tag);
    const auto q = qparams<Arithmetic<S>>(x_any, scale, zero_point, quant_min, quant_max);
    if (numel == 0) return;
    const IndexedRuns runs = indexed_runs(x, scale);
    const S* in = static_cast<const S*>(x.const_data_ptr());
    S* out = static_cast<S*>(y.mutable_data_ptr());
    uint8_t* bits = static_cast<uint8_t*>(mask.mutable_data_ptr());
    QK_DISPATCH_ISA(stochastic_forward(runs, q, numel, in, out, bits, philox));
  });
  return {y, mask};
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_stochastic_backward(
    const Tensor& grad, const Tensor& x, const Tensor& scale, std::optional<Tensor> zero_point, int64_t quant_min,
    int64_t quant_max, int64_t seed, int64_t offset, std::optional<Tensor> offset_tensor, double grad_factor) {
  const Philox philox = generator(seed, offset, offset_tensor);
  return learned(
      grad, x, scale, zero_point, quant_min, quant_max,
      [&](const auto& runs, const auto& q, int64_t numel, const auto* dy, const auto* in, auto* out, double* dscale,
          double* dzero_point) {
        QK_DISPATCH_ISA(stochastic_backward(runs, q, numel, dy, in, out, philox, grad_factor, dscale, dzero_point));
      });
}

Tensor quantize_stochastic(const Tensor& x_any, const Tensor& scale, std::optional<Tensor> zero_point,
                           int64_t quant_min, int64_t quant_max, int64_t seed, int64_t offset,
                           std::optional<Tensor> offset_tensor, ScalarType dtype) {
  check_floating("x", x_any);
  const Tensor x = to_dense(x_any);
  const int64_t numel = x.numel();
  const Philox philox = generator(seed, offset, offset_tensor);
  Tensor codes;
  dispatch_integer("dtype", dtype, [&](auto code) {
    using I = decltype(code);
    check_codes_hold<I>(dtype, quant_min, quant_max);
    codes = empty_strided(x.sizes(), x.strides(), dtype);
    dispatch_floating("x", x, [&](auto tag) {
      using S = decltype(tag);
      const auto q = qparams<Arithmetic<S>>(x, scale, zero_point, quant_min, quant_max);
      if (numel == 0) return;
      const IndexedRuns runs = indexed_runs(x, scale);
      const S* in = static_cast<const S*>(x.const_data_ptr());
      I* out = static_cast<I*>(codes.mutable_data_ptr());
      QK_DISPATCH_ISA(quantize_stochastic(runs, q, numel, in, out, philox));
    });
  });
  return codes;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("fake_quantize_stochastic_forward", TORCH_BOX(&fake_quantize_stochastic_forward));
  m.impl("fake_quantize_stochastic_backward", TORCH_BOX(&fake_quantize_stochastic_backward));
  m.impl("quantize_stochastic", TORCH_BOX(&quantize_stochastic));
}

}  // namespace qkernels
