// Rows of x as the tiles read them, and the terms that a row adds to each group.
#include "cpu/int4_gemm/groups.h"

namespace qkernels::QK_NAMESPACE {
namespace {

void code_terms(const int8_t* row, int64_t k, int64_t group_size, int bits, bool affine, Int4Term* terms,
                int64_t term_stride) {
  const int32_t missing = (affine ? 8 : 0) - code_offset(bits);
  for_each_group(k, group_size, [&](int64_t first, int64_t last, int64_t, int64_t term) {
    int32_t sum = 0;
    for (int64_t i = first; i < last; ++i) sum += row[i];
    terms[term * term_stride] = {missing * sum, static_cast<float>(sum)};
  });
}

template <typename S>
inline void sums_of_groups(const S* x, int64_t k, int64_t group_size, Int4Term* terms, int64_t term_stride) {
  for_each_group(k, group_size, [&](int64_t first, int64_t last, int64_t, int64_t term) {
    F32 sums = F32::set1(0);
    for_each_16(last - first, [&](int64_t i, auto... tail) { sums = sums + F32::load(x + first + i, tail...); });
    float lanes[16];
    sums.store(lanes);
    for (int width = 8; width > 0; width /= 2)
      for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    terms[term * term_stride].sum = lanes[0];
  });
}

void float_terms(const void* x, Element type, int64_t k, int64_t group_size, Int4Term* terms, int64_t term_stride) {
  switch (type) {
    case Element::bf16: return sums_of_groups(static_cast<const BFloat16*>(x), k, group_size, terms, term_stride);
    case Element::f16: return sums_of_groups(static_cast<const Half*>(x), k, group_size, terms, term_stride);
    default: return sums_of_groups(static_cast<const float*>(x), k, group_size, terms, term_stride);
  }
}

template <typename S>
inline void widen(const S* x, int64_t k, float* row) {
  for_each_16(k, [&](int64_t i, auto... tail) { F32::load(x + i, tail...).store(row + i, tail...); });
  for (int64_t i = k; i % kBlock; ++i) row[i] = 0;
}

void widen_row(const void* x, Element type, int64_t k, float* row) {
  switch (type) {
    case Element::bf16: return widen(static_cast<const BFloat16*>(x), k, row);
    case Element::f16: return widen(static_cast<const Half*>(x), k, row);
    default: return widen(static_cast<const float*>(x), k, row);
  }
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
