// What the ops share that compute values and quantize them by the ranges of their own groups.
#pragma once

#include <memory>

#include "granularity.h"

namespace qkernels {

// `units` pieces of `length` elements in order, which a kernel computes each at once; they hold `groups` groups of
// `group` elements.
struct Units {
  int64_t units, length, group, groups;
};

}  // namespace qkernels
