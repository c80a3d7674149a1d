// Ranges taken from x itself: what fake_quantize_dynamic and quantize_dynamic share. Include after foreach_isa.h.
#pragma once

#include "cpu/common/granularity.h"

namespace qkernels {

template <typename S>
void whole_tensor_qparams(const Tensor& x, const QparamsRule& rule, Arithmetic<S>* scale, int32_t* zero_point) {
  using T = Arithmetic<S>;
  const View view{one_run(x), {}};
  T low = 0, high = 0;
  const S* in = static_cast<const S*>(x.const_data_ptr());
  if (x.numel()) QK_DISPATCH_ISA(range(view, view.inner, in, &low, &high));
  const auto chosen = choose_qparams<T>(low, high, rule);
  *scale = chosen.scale;
  *zero_point = static_cast<int32_t>(chosen.zero_point);
}

}  // namespace qkernels
