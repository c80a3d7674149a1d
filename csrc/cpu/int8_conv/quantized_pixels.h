// From planes of floats to codes of neighbouring channels, in registers.
#include "cpu/common/vec.h"
#include "cpu/int8_conv/int8_conv.h"

#if QK_PATH == QK_PATH_AVX512VNNI
namespace qkernels::QK_NAMESPACE {
namespace {

// Codes of 16 pixels and 4 channels, [pixel][4], channels from `count` on of any value. Steps beyond 2**15 saturate in
// every conversion, and a NaN becomes the zero point.
class QuantizedPixels {
 public:
  explicit QuantizedPixels(const Quantizer& q)
      : inverse_(_mm512_set1_ps(q.inverse)),
        most_(_mm512_set1_ps(1e9f)),
        zero_point_(_mm512_set1_epi16(static_cast<int16_t>(q.zero_point + 128))),
        low_(_mm512_set1_epi8(static_cast<char>(q.low + 128))),
        high_(_mm512_set1_epi8(static_cast<char>(q.high + 128))) {}

  QK_INLINE __m512i operator()(const float* x, int64_t stride_c, int64_t count, __mmask16 inside) {
    // Packing puts the 4 pixels of 128 bits channel by channel.
    const __m512i by_pixel =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const auto words = [&](int64_t c) QK_INLINE {
      return _mm512_adds_epi16(_mm512_packs_epi32(steps(x + std::min(c, count - 1) * stride_c, inside),
                                                  steps(x + std::min(c + 1, count - 1) * stride_c, inside)),
                               zero_point_);
    };
    const __m512i first = words(0);
    const __m512i bytes = _mm512_min_epu8(_mm512_max_epu8(_mm512_packus_epi16(first, words(2)), low_), high_);
    return _mm512_shuffle_epi8(bytes, by_pixel);
  }
  bool found_nan() const { return nan_ != 0; }

 private:
  QK_INLINE __m512i steps(const float* x, __mmask16 inside) {
    const __m512 v = _mm512_maskz_loadu_ps(inside, x), t = _mm512_mul_ps(v, inverse_);
    nan_ |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask(t, t, _CMP_ORD_Q), _mm512_min_ps(t, most_));
  }

  __m512 inverse_, most_;
  __m512i zero_point_, low_, high_;
  uint32_t nan_ = 0;
};

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
#endif
