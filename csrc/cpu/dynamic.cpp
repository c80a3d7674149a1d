// Ops on the CPU that take the range from x itself: checks and memory layout. The kernels are in dynamic_kernels.h.
#include "cpu/common/ops.h"
#include "cpu/common/qparams.h"

#define QK_BODY "cpu/dynamic_kernels.h"
#include "cpu/common/foreach_isa.h"

namespace qkernels {
namespace {

template <typename S>
void whole_tensor_qparams(const Tensor& x, const QparamsRule& rule, Arithmetic<S>* scale, int32_t* zero_point) {
  using T = Arithmetic<S>;
  const IndexedRuns runs{one_run(x), {}};
  T low = 0, high = 0;
  const S* in = static_cast<const S*>(x.const_data_ptr());
  if (x.numel()) QK_DISPATCH_ISA(range(runs, runs.inner, in, &low, &high));
  const auto chosen = choose_qparams<T>(low, high, rule);
  *scale = chosen.scale;
  *zero_point = static_cast<int32_t>(chosen.zero_point);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fake_quantize_dynamic_forward(const Tensor& x, int64_t group_size,
                                                                         int64_t quant_min, int64_t quant_max,
                                                                         bool symmetric) {
  check_group_size(x, group_size);
  const auto rule = QparamsRule::dynamic(quant_min, quant_max, symmetric);
  auto qparams = empty_qparams(x, group_size);  // no structured binding: C++17 lets no lambda capture one
  Tensor &scale = std::get<0>(qparams), &zero_point = std::get<1>(qparams);
  const int64_t numel = x.numel();
  Tensor y = empty_dense_like(x), mask = empty_mask(symmetric ? 0 : numel, x);
  // Contiguous rows take one pass. Otherwise the ranges of all channels come first, and then y in x's memory order.
  const bool one_pass = group_size != 0 && x.is_contiguous();
  const Tensor rows = group_size == 0 ? to_dense(x) : to_contiguous(x);
  dispatch_floating("x", x, [&](auto tag) {
    using S = decltype(tag);
    auto* s = static_cast<Arithmetic<S>*>(scale.mutable_data_ptr());
    auto* z = static_cast<int32_t*>(zero_point.mutable_data_ptr());
    if (group_size == 0) return whole_tensor_qparams<S>(rows, rule, s, z);
    const int64_t count = scale.numel();
    const int64_t length = count ? numel / count : 0;
    const S* in = static_cast<const S*>(rows.const_data_ptr());
    S* out = one_pass ? static_cast<S*>(y.mutable_data_ptr()) : nullptr;
    uint8_t* bits = one_pass && !symmetric ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr;
    QK_DISPATCH_ISA(dynamic_forward(count, length, rule, in, out, s, z, bits));
  });
  if (!one_pass) {
    fake_quantize_into(x, scale, zero_point, quant_min, quant_max, y, symmetric ? nullptr : &mask);
  }
  return {y, scale, zero_point, mask};
}

std::tuple<Tensor, Tensor, Tensor> quantize_dynamic(const Tensor& x, int64_t group_size, int64_t quant_min,
                                                    int64_t quant_max, bool symmetric) {
  check_group_size(x, group_size);
  check_codes_hold<int8_t>(ScalarType::Char, quant_min, quant_max);
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
  // Otherwise q is written in x's memory order.
  if (!one_pass) q = quantize(x, scale, zero_point, quant_min, quant_max, ScalarType::Char);
  return {q, scale, zero_point};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("fake_quantize_dynamic_forward", TORCH_BOX(&fake_quantize_dynamic_forward));
  m.impl("quantize_dynamic", TORCH_BOX(&quantize_dynamic));
}

}  // namespace qkernels
