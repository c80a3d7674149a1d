// Elementwise steps on runs of floats or codes.
#ifndef QK_PROGRAM_POINTWISE
#define QK_PROGRAM_POINTWISE

#include "cpu/common/activation_kernels.h"
#include "cpu/int8_program/kernels.h"

namespace qkernels::QK_NAMESPACE {
namespace {

// How floats become bytes code + 128, on 16 lanes.
struct Coder {
  F32 inverse, zero_point, low, high;

  explicit Coder(const Quantizer& q)
      : inverse(F32::set1(q.inverse)),
        zero_point(F32::set1(static_cast<float>(q.zero_point + 128))),
        low(F32::set1(static_cast<float>(q.low + 128))),
        high(F32::set1(static_cast<float>(q.high + 128))) {}

  // Where an element is NaN, the result is the zero point.
  F32 operator()(F32 v) const {
    const F32 code = min(high, max(low, round(v * inverse) + zero_point));
    return select(is_nan(code), zero_point, code);
  }
};

inline F32 value_of(F32 byte, const Quantizer& q) {
  return (byte - F32::set1(static_cast<float>(q.zero_point + 128))) * F32::set1(q.scale);
}

template <typename... Tail>
inline F32 load_operand(const Operand& x, int64_t i, Tail... tail) {
  return x.floats ? F32::load(x.floats + i, tail...) : value_of(F32::load(x.codes + i, tail...), x.quantizer);
}

bool quantize(const float* x, int64_t n, const Quantizer& q, uint8_t* codes) {
  const Coder coder(q);
  uint32_t nan = 0;
  for_each_16(n, [&](int64_t i, auto... tail) QK_INLINE {
    const F32 v = F32::load(x + i, tail...);
    nan |= is_nan(v).bits();
    coder(v).store(codes + i, tail...);
  });
  return nan != 0;
}

void pointwise(const Pointwise& p, int64_t n) {
  const Coder coder(p.quantizer);
  for_each_16(n, [&](int64_t i, auto... tail) QK_INLINE {
    F32 v = load_operand(p.a, i, tail...);
    switch (p.kind) {
      case Combination::none: break;
      case Combination::add: v = v + load_operand(p.b, i, tail...); break;
      case Combination::sub: v = v - load_operand(p.b, i, tail...); break;
      case Combination::subtracted: v = load_operand(p.b, i, tail...) - v; break;
      case Combination::mul: v = v * load_operand(p.b, i, tail...); break;
      case Combination::affine: v = v * F32::load(p.b.floats + i, tail...) + F32::load(p.shift + i, tail...); break;
    }
    v = activate(v, p.first.kind, p.first.low, p.first.high);
    if (p.floats) v.store(p.floats + i, tail...);
    if (p.codes) coder(v).store(p.codes + i, tail...);
  });
}

bool all_finite(const float* x, int64_t n) {
  uint32_t odd = 0;
  for_each_16(n, [&](int64_t i, auto... tail) QK_INLINE {
    const F32 v = F32::load(x + i, tail...);
    odd |= is_nan(v - v).bits();
  });
  return odd == 0;
}

bool any_nan(const float* x, int64_t n) {
  uint32_t nan = 0;
  for_each_16(n, [&](int64_t i, auto... tail) QK_INLINE { nan |= is_nan(F32::load(x + i, tail...)).bits(); });
  return nan != 0;
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE

#endif
