// What backward passes share: the check of grad, and gradients of scales as tensors.
#pragma once

#include "granularity.h"

namespace qkernels {

inline void check_grad(const Tensor& grad, const Tensor& x) {
  check_cpu("grad", grad);
  QK_CHECK(grad.scalar_type() == x.scalar_type(), "grad: got ", dtype_name(grad.scalar_type()),
           "; accepted: x's dtype, ", dtype_name(x.scalar_type()));
  bool same = grad.dim() == x.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = grad.sizes()[i] == x.sizes()[i];
  QK_CHECK(same, "grad: got shape ", shape_of(grad), "; accepted: x's shape ", shape_of(x));
}

// A contiguous tensor in the shape of `like`, from fp64 values.
inline Tensor from_double(const std::vector<double>& values, const Tensor& like) {
  Tensor out = empty(to_vector(like.sizes()), like.scalar_type());
  dispatch_floating("scale", out, [&](auto tag) {
    using S = decltype(tag);
    S* p = static_cast<S*>(out.mutable_data_ptr());
    for (size_t i = 0; i < values.size(); ++i) p[i] = from_float<S>(values[i]);
  });
  return out;
}

}  // namespace qkernels
