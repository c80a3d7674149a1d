// Between floats and codes, on 16 lanes.
#ifndef QK_CODES
#define QK_CODES

#include "cpu/common/vec.h"
#include "cpu/int8_conv/int8_conv.h"

namespace qkernels::QK_NAMESPACE {
namespace {

// To bytes code + 128. No code is NaN: a NaN becomes the zero point.
class ToCodes {
 public:
  explicit ToCodes(const Quantizer& q)
      : inverse_(F32::set1(q.inverse)),
        zero_point_(F32::set1(static_cast<float>(q.zero_point + 128))),
        low_(F32::set1(static_cast<float>(q.low + 128))),
        high_(F32::set1(static_cast<float>(q.high + 128))) {}

  F32 operator()(F32 v) const {
    const F32 code = min(high_, max(low_, round(v * inverse_) + zero_point_));
    return select(is_nan(code), zero_point_, code);
  }

 private:
  F32 inverse_, zero_point_, low_, high_;
};

// From bytes code + 128.
class FromCodes {
 public:
  explicit FromCodes(const Quantizer& q)
      : scale_(F32::set1(q.scale)), zero_point_(F32::set1(static_cast<float>(128 + q.zero_point))) {}

  F32 operator()(F32 bytes) const { return (bytes - zero_point_) * scale_; }

 private:
  F32 scale_, zero_point_;
};

}  // namespace
}  // namespace qkernels::QK_NAMESPACE

#endif
