// Groups of weights that share a scale.
#ifndef QK_INT4_GROUPS
#define QK_INT4_GROUPS

#include "cpu/common/vec.h"
#include "cpu/int4_gemm/int4_gemm.h"

namespace qkernels::QK_NAMESPACE {
namespace {

// Calls f(first k, end, number of the scale, number of the term) for each group of a row. For a group longer than
// kMaxGroup there is a call for each part of it.
template <typename F>
inline void for_each_group(int64_t k, int64_t group_size, F f) {
  int64_t term = 0, group = 0;
  for (int64_t first = 0; first < k; first += group_size, ++group)
    for (int64_t part = first; part < first + group_size; part += kMaxGroup)
      f(part, std::min(part + kMaxGroup, first + group_size), group, term++);
}

// The 16 scales or minima of a panel from `at` on.
inline F32 load_values(const void* values, Element type, int64_t at) {
  switch (type) {
    case Element::bf16: return F32::load(static_cast<const BFloat16*>(values) + at);
    case Element::f16: return F32::load(static_cast<const Half*>(values) + at);
    default: return F32::load(static_cast<const float*>(values) + at);
  }
}

// The scale of one group of a panel, and the value that the code -8 stands for, each as two vectors of 16 channels.
struct GroupValues {
  F32 scale[2], offset[2];

  GroupValues(const Int4Panel& panel, int64_t group, bool affine) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const int64_t at = group * kPanel + h * 16;
      scale[h] = load_values(panel.scale, panel.type, at);
      offset[h] = F32::set1(0);
      if (!affine) continue;
      if (panel.minimum)
        offset[h] = load_values(panel.minimum, panel.type, at);
      else
        offset[h] = (F32::set1(-8) - F32::load(panel.zero_point + at)) * scale[h];
    }
  }
};

// Adds a group to y, 16 channels of a row: first offset * sum, then scale * dot.
template <bool kAffine>
inline void add_group(const GroupValues& values, int h, const Int4Term& term, F32 dot, float* y) {
  F32 total = F32::load(y);
  if constexpr (kAffine) total = total + values.offset[h] * F32::set1(term.sum);
  (total + values.scale[h] * dot).store(y);
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE

#endif
