// Ranges taken from x itself: what fake_quantize_dynamic and quantize_dynamic share. Include after foreach_isa.h.
#pragma once

#include <tuple>

#include "granularity.h"

namespace qkernels {

inline void check_group_size(const Tensor& x, int64_t group_size) {
  check_floating("x", x);
  if (group_size == 0) return;
  QK_CHECK(x.dim() > 0, "x: got 0 dims; accepted: at least 1, or group_size None");
  const int64_t last = x.sizes()[x.dim() - 1];
  QK_CHECK(group_size == -1 || (group_size > 0 && last % group_size == 0), "group_size: got ", group_size,
           "; accepted: -1 (a row), None (the whole tensor), or a divisor of x's last dim ", last);
}

// Scale and zero point tensors of x's groups, empty as yet.
inline std::tuple<Tensor, Tensor> empty_qparams(const Tensor& x, int64_t group_size) {
  auto shape = to_vector(x.sizes());
  if (group_size == 0) std::fill(shape.begin(), shape.end(), 1);
  if (group_size == -1) shape.back() = 1;
  if (group_size > 0) shape.back() /= group_size;
  const ScalarType dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return {empty(shape, dtype), empty(shape, ScalarType::Int)};
}

template <typename S>
void whole_tensor_qparams(const Tensor& x, const QparamsRule& rule, Arithmetic<S>* scale, int32_t* zero_point) {
  using T = Arithmetic<S>;
  View view;
  view.inner = x.numel();
  T low = 0, high = 0;
  const S* in = static_cast<const S*>(x.const_data_ptr());
  if (x.numel()) QK_DISPATCH_ISA(range(view, view.inner, in, &low, &high));
  const auto chosen = choose_qparams<T>(low, high, rule);
  *scale = chosen.scale;
  *zero_point = static_cast<int32_t>(chosen.zero_point);
}

}  // namespace qkernels
