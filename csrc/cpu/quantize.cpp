// Real quantization on the CPU: checks and memory layout here, the kernels in quantize_kernels.h.
#include "cpu/common/granularity.h"

#define QK_BODY "cpu/quantize_kernels.h"
#include "cpu/common/foreach_isa.h"

#include "cpu/common/dynamic.h"

namespace qkernels {
namespace {

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
      const auto params = quantizer<Arithmetic<S>>(x, scale, zero_point, quant_min, quant_max);
      if (numel == 0) return;
      const View view = view_of(x, scale);
      const S* in = static_cast<const S*>(x.const_data_ptr());
      I* out = static_cast<I*>(q.mutable_data_ptr());
      QK_DISPATCH_ISA(quantize(view, params, numel, in, out));
    });
  });
  return q;
}

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
      const auto params = dequantizer<Arithmetic<S>>(q, scale, zero_point);
      if (numel == 0) return;
      const View view = view_of(q, scale);
      const I* in = static_cast<const I*>(q.const_data_ptr());
      S* out = static_cast<S*>(y.mutable_data_ptr());
      QK_DISPATCH_ISA(dequantize(view, params, numel, in, out));
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> quantize_dynamic(const Tensor& x, int64_t group_size, int64_t quant_min,
                                                    int64_t quant_max, bool symmetric) {
  check_group_size(x, group_size);
  const auto rule = QparamsRule::dynamic(quant_min, quant_max, symmetric);
  auto qparams = empty_qparams(x, group_size);  // no structured binding: C++17 lets no lambda capture one
  Tensor &scale = std::get<0>(qparams), &zero_point = std::get<1>(qparams);
  const int64_t numel = x.numel();
  const bool one_pass = group_size != 0 && x.is_contiguous();
  const Tensor rows = group_size == 0 ? to_dense(x) : to_contiguous(x);
  Tensor q = empty_strided(rows.sizes(), rows.strides(), ScalarType::Char);
  dispatch_floating("x", x, [&](auto tag) {
    using S = decltype(tag);
    auto* s = static_cast<Arithmetic<S>*>(scale.mutable_data_ptr());
    auto* z = static_cast<int32_t*>(zero_point.mutable_data_ptr());
    const S* in = static_cast<const S*>(rows.const_data_ptr());
    if (group_size == 0) return whole_tensor_qparams<S>(rows, rule, s, z);
    const int64_t count = scale.numel();
    const int64_t length = count ? numel / count : 0;
    int8_t* out = static_cast<int8_t*>(q.mutable_data_ptr());
    QK_DISPATCH_ISA(quantize_dynamic(count, length, rule, in, out, s, z));
  });
  // In x's own memory order where that is not row by row.
  if (!one_pass) q = quantize(x, scale, zero_point, quant_min, quant_max, ScalarType::Char);
  return {q, scale, zero_point};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("quantize_dynamic", TORCH_BOX(&quantize_dynamic));
}

}  // namespace qkernels
