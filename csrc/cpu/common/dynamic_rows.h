// What two ops share: each computes values, and quantizes each group of them by its own range.
#pragma once

#include "cpu/common/qparams.h"

namespace qkernels {

// The values come in `count` units of `length` elements; a unit is computed at once. It holds `groups` groups, or,
// where `whole` is set, all units are one group.
struct Units {
  int64_t count, length, groups;
  bool whole;
};

// Allocates the results in the shape of x. run(tag of x's storage type, rule, number of groups, values or codes, scale,
// zero point) fills them.
template <typename F>
std::tuple<Tensor, Tensor, Tensor> quantized_rows(const Tensor& x, int64_t group_size, int64_t quant_min,
                                                  int64_t quant_max, bool symmetric, bool codes, F run) {
  if (codes) check_codes_hold<int8_t>(ScalarType::Char, quant_min, quant_max);
  const auto rule = QparamsRule::dynamic(quant_min, quant_max, symmetric);
  auto [scale, zero_point] = empty_qparams(x, group_size);
  Tensor out = empty(to_vector(x.sizes()), codes ? ScalarType::Char : x.scalar_type());
  const int64_t groups = scale.numel();
  void *values = out.mutable_data_ptr(), *scales = scale.mutable_data_ptr();
  int32_t* zero_points = static_cast<int32_t*>(zero_point.mutable_data_ptr());
  dispatch_floating("x", x, [&](auto tag) {
    using S = decltype(tag);
    using T = Arithmetic<S>;
    if (codes) {
      run(tag, rule, groups, static_cast<int8_t*>(values), static_cast<T*>(scales), zero_points);
    } else {
      run(tag, rule, groups, static_cast<S*>(values), static_cast<T*>(scales), zero_points);
    }
  });
  return {out, scale, zero_point};
}

}  // namespace qkernels
