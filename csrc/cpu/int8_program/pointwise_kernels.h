// Elementwise steps on runs of floats or codes.
#ifndef QK_PROGRAM_POINTWISE
#define QK_PROGRAM_POINTWISE

#include "cpu/common/activation_kernels.h"
#include "cpu/int8_conv/codes.h"
#include "cpu/int8_program/kernels.h"

namespace qkernels::QK_NAMESPACE {
namespace {

template <typename... Tail>
inline F32 load_operand(const Operand& x, int64_t i, Tail... tail) {
  return x.floats ? F32::load(x.floats + i, tail...) : FromCodes(x.quantizer)(F32::load(x.codes + i, tail...));
}

bool any_nan(const float* x, int64_t n) {
  uint32_t nan = 0;
  for_each_16(n, [&](int64_t i, auto... tail) QK_INLINE { nan |= is_nan(F32::load(x + i, tail...)).bits(); });
  return nan != 0;
}

#if QK_PATH == QK_PATH_AVX512VNNI
// The codes of 64 floats, in 7 instructions for 16. Steps beyond 2**15 saturate in every conversion. Returns a bit for
// each that has no number of steps: a NaN or, where inverse is 0, an infinity.
inline uint64_t quantize_64(const float* x, const Quantizer& q, uint8_t* codes) {
  const __m512 inverse = _mm512_set1_ps(q.inverse), most = _mm512_set1_ps(1e9f);
  const __m512i zero_point = _mm512_set1_epi16(static_cast<int16_t>(q.zero_point + 128));
  const __m512i low = _mm512_set1_epi8(static_cast<char>(q.low + 128));
  const __m512i high = _mm512_set1_epi8(static_cast<char>(q.high + 128));
  // Packing leaves 4 elements of each of the 4 vectors in every 128 bits.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  uint64_t nan = 0;
  const auto steps = [&](int64_t i) QK_INLINE {
    const __m512 t = _mm512_mul_ps(_mm512_loadu_ps(x + i), inverse);
    const __mmask16 number = _mm512_cmp_ps_mask(t, t, _CMP_ORD_Q);
    nan |= static_cast<uint16_t>(~number);
    return _mm512_maskz_cvtps_epi32(number, _mm512_min_ps(t, most));
  };
  const auto words = [&](int64_t i) QK_INLINE {
    return _mm512_adds_epi16(_mm512_packs_epi32(steps(i), steps(i + 16)), zero_point);
  };
  const __m512i first = words(0);
  __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(first, words(32)));
  bytes = _mm512_min_epu8(_mm512_max_epu8(bytes, low), high);
  _mm512_storeu_si512(codes, bytes);
  return nan;
}
#endif

bool quantize(const float* x, int64_t n, const Quantizer& q, uint8_t* codes) {
  const ToCodes to_codes(q);
  uint64_t nan = 0;
  int64_t done = 0;
#if QK_PATH == QK_PATH_AVX512VNNI
  for (; done + 64 <= n; done += 64) nan |= quantize_64(x + done, q, codes + done);
  if (nan && !(q.inverse > 0)) nan = any_nan(x, done);
#endif
  for_each_16(n - done, [&](int64_t i, auto... tail) QK_INLINE {
    const F32 v = F32::load(x + done + i, tail...);
    nan |= is_nan(v).bits();
    to_codes(v).store(codes + done + i, tail...);
  });
  return nan != 0;
}

void pointwise(const Pointwise& p, int64_t n) {
  const ToCodes to_codes(p.quantizer);
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
    if (p.codes) to_codes(v).store(p.codes + i, tail...);
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

}  // namespace
}  // namespace qkernels::QK_NAMESPACE

#endif
