// What codebook.cpp and codebook_kernels.h share.
#pragma once

#include "cpu/common/qparams.h"

namespace qkernels {

constexpr int kMaxLevels = 256;

// A codebook as the kernels search it.
//
// `tree` holds the midpoints between ascending levels, breadth first, as a binary search visits them. The search starts
// at node 1. From node n it goes to 2n, or to 2n + 1 if v lies above tree[n]. After `bits` steps the index is
// n − 2^bits. So the first steps find their midpoints in one vector register. Nodes without a midpoint hold infinity.
template <typename T>
struct Codebook {
  alignas(64) T tree[kMaxLevels];
  alignas(64) T level[kMaxLevels];  // ascending; dequantize: as given, NaN beyond the last
  int bits = 4;
  int64_t size = 0;
  uint8_t order[kMaxLevels];  // where each level stands in the codebook as given
  bool ordered = true;        // order[i] == i

  T low() const { return level[0]; }
  T high() const { return level[size - 1]; }
};

}  // namespace qkernels
