// Quantization to integers on the CPU, and back: checks and memory layout. The kernels are in quantize_kernels.h.
#include "cpu/common/ops.h"
#include "cpu/common/qparams.h"

#define QK_BODY "cpu/quantize_kernels.h"
#include "cpu/common/foreach_isa.h"

namespace qkernels {

Tensor quantize(const Tensor& x_any, const Tensor& scale, std::optional<Tensor> zero_point, int64_t quant_min,
                int64_t quant_max, ScalarType dtype) {
  check_floating("x", x_any);
  const Tensor x = to_dense(x_any);
  const int64_t numel = x.numel();
  Tensor q;
  dispatch_integer("dtype", dtype, [&](auto code) {
    using I = decltype(code);
    check_codes_hold<I>(dtype, quant_min, quant_max);
    q = empty_strided(x.sizes(), x.strides(), dtype);
    dispatch_floating("x", x, [&](auto tag) {
      using S = decltype(tag);
      const auto params = qparams<Arithmetic<S>>(x, scale, zero_point, quant_min, quant_max);
      if (numel == 0) return;
      const IndexedRuns runs = indexed_runs(x, scale);
      const S* in = static_cast<const S*>(x.const_data_ptr());
      I* out = static_cast<I*>(q.mutable_data_ptr());
      QK_DISPATCH_ISA(quantize(runs, params, numel, in, out));
    });
  });
  return q;
}

namespace {

Tensor dequantize(const Tensor& q_any, const Tensor& scale, std::optional<Tensor> zero_point, ScalarType dtype) {
  QK_CHECK(is_floating(dtype), "dtype: got ", dtype_name(dtype), "; accepted: a floating dtype");
  check_cpu("q", q_any);
  const Tensor q = to_dense(q_any);
  const int64_t numel = q.numel();
  Tensor y = empty_strided(q.sizes(), q.strides(), dtype);
  dispatch_integer("q", q.scalar_type(), [&](auto code) {
    using I = decltype(code);
    dispatch_floating("dtype", y, [&](auto tag) {
      using S = decltype(tag);
      const auto params = unclamped_qparams<Arithmetic<S>>(q, scale, zero_point);
      if (numel == 0) return;
      const IndexedRuns runs = indexed_runs(q, scale);
      const I* in = static_cast<const I*>(q.const_data_ptr());
      S* out = static_cast<S*>(y.mutable_data_ptr());
      QK_DISPATCH_ISA(dequantize(runs, params, numel, in, out));
    });
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("dequantize", TORCH_BOX(&dequantize));
}

}  // namespace qkernels
