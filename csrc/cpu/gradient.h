// Gradients of scales as tensors: what the learnable backward passes share.
#pragma once

#include "granularity.h"

namespace qkernels {

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
