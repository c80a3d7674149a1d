// Ranges of the channels of a tensor.
#pragma once

#include "cpu/common/qparams.h"

namespace qkernels {

// The minimum and the maximum of each channel, in fp32; NaN where the channel holds one.
struct Ranges {
  std::vector<float> low, high;
};

// x is dense and not empty.
Ranges ranges_of(const Tensor& x, const IndexedRuns& runs);

}  // namespace qkernels
