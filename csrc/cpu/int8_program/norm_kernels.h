// LayerNorm and RMSNorm of one row of floats or codes.
#ifndef QK_PROGRAM_NORM
#define QK_PROGRAM_NORM

#include "cpu/common/row_sum.h"
#include "cpu/int8_program/pointwise_kernels.h"

namespace qkernels::QK_NAMESPACE {
namespace {

// Lanes behind the end of a row are 0, so that sums do not count them.
inline F32 inside_row(F32 v) { return v; }
inline F32 inside_row(F32 v, int64_t count) {
  return select(F32::Mask::from_bits(static_cast<uint16_t>(bits_of(0xffff, count))), v, zero<F32>());
}

bool normalize(const Norm& norm, const Operand& x, int64_t n, const Quantizer& q, float* floats, uint8_t* codes) {
  const double count = static_cast<double>(n);
  F32 mean = zero<F32>();
  if (norm.centered) {
    Sum<F32> sum;
    for_each_16(n,
                [&](int64_t i, auto... tail) QK_INLINE { sum.add(inside_row(load_operand(x, i, tail...), tail...)); });
    mean = F32::set1(static_cast<float>(sum.total() / count));
  }
  Sum<F32> squares;
  for_each_16(n, [&](int64_t i, auto... tail) QK_INLINE {
    const F32 v = inside_row(load_operand(x, i, tail...) - mean, tail...);
    squares.add(v * v);
  });
  const F32 rstd = F32::set1(1 / std::sqrt(static_cast<float>(squares.total() / count) + norm.eps));
  const ToCodes to_codes(q);
  uint32_t nan = 0;
  for_each_16(n, [&](int64_t i, auto... tail) QK_INLINE {
    F32 v = (load_operand(x, i, tail...) - mean) * rstd;
    if (norm.weight) v = v * F32::load(norm.weight + i, tail...);
    if (norm.bias) v = v + F32::load(norm.bias + i, tail...);
    nan |= bits_of(is_nan(v).bits(), tail...);
    if (floats) v.store(floats + i, tail...);
    if (codes) to_codes(v).store(codes + i, tail...);
  });
  return nan != 0;
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE

#endif
