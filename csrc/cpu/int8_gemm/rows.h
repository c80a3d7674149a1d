// From rows of floats or codes to the rows of codes that the tiles read.
#include "cpu/common/vec.h"
#include "cpu/int8_gemm/int8_gemm.h"

namespace qkernels::QK_NAMESPACE {
namespace {

void copy_codes(const int8_t* codes, int64_t stride, int64_t k, uint8_t flip, uint8_t* row) {
  if (stride == 1)
    for (int64_t i = 0; i < k; ++i) row[i] = static_cast<uint8_t>(codes[i]) ^ flip;
  else
    for (int64_t i = 0; i < k; ++i) row[i] = static_cast<uint8_t>(codes[i * stride]) ^ flip;
}

constexpr int64_t kChunk = 1024;  // floats of a row that are converted at a time: 4 KiB of stack

inline const float* as_floats(const float* x, int64_t, float*) { return x; }

inline const float* as_floats(const BFloat16* x, int64_t n, float* buffer) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(x[i].bits) << 16;
    std::memcpy(buffer + i, &bits, 4);
  }
  return buffer;
}

inline const float* as_floats(const Half* x, int64_t n, float* buffer) {
  for_each_16(n, [&](int64_t i, auto... tail) { F32::load(x + i, tail...).store(buffer + i, tail...); });
  return buffer;
}

// The bits of the largest |x|. As integers, bits are ordered as the values are, with NaN above infinity.
inline uint32_t max_magnitude(const float* x, int64_t n) {
  int32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return static_cast<uint32_t>(largest);
}

// Returns whether x holds a NaN.
inline bool quantize_chunk(const float* x, int64_t n, const RowQparams& q, uint8_t flip, uint8_t* row) {
  int64_t i = 0;
  int32_t nan = 0;
#if QK_PATH == QK_PATH_AVX512VNNI
  const __m512 inverse = _mm512_set1_ps(q.inverse), zero_point = _mm512_set1_ps(q.zero_point);
  const __m512 low = _mm512_set1_ps(q.low), high = _mm512_set1_ps(q.high);
  const __m128i flips = _mm_set1_epi8(static_cast<char>(flip));
  for (; i < n; i += 16) {
    const __mmask16 inside = n - i >= 16 ? 0xffff : (1u << (n - i)) - 1;
    const __m512 t = _mm512_mul_ps(_mm512_maskz_loadu_ps(inside, x + i), inverse);
    nan |= _mm512_cmp_ps_mask(t, t, _CMP_UNORD_Q);
    const __m512 rounded = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 code = _mm512_min_ps(_mm512_max_ps(_mm512_add_ps(rounded, zero_point), low), high);
    const __m128i bytes = _mm_xor_si128(_mm512_cvtepi32_epi8(_mm512_cvtps_epi32(code)), flips);
    _mm_mask_storeu_epi8(row + i, inside, bytes);
  }
#else
  for (; i < n; ++i) {
    const float t = x[i] * q.inverse;
    nan |= t != t;
    const float code = __builtin_rintf(t) + q.zero_point;
    const float clamped = code > q.low ? (code < q.high ? code : q.high) : q.low;
    row[i] = static_cast<uint8_t>(static_cast<int32_t>(clamped)) ^ flip;
  }
#endif
  return nan != 0;
}

template <typename T>
float quantize_row_of(const T* x, int64_t k, RowQparams q, uint8_t flip, uint8_t* row) {
  float buffer[kChunk];
  if (q.dynamic) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < k; i += kChunk) {
      const int64_t n = std::min(kChunk, k - i);
      largest = std::max(largest, max_magnitude(as_floats(x + i, n, buffer), n));
    }
    float amax;
    std::memcpy(&amax, &largest, 4);
    q.scale = std::max(amax / q.half, std::numeric_limits<float>::min());
    q.inverse = 1.0f / q.scale;
    if (largest >= 0x7f800000) q.scale = std::numeric_limits<float>::quiet_NaN();
  }
  bool nan = false;
  for (int64_t i = 0; i < k; i += kChunk) {
    const int64_t n = std::min(kChunk, k - i);
    nan |= quantize_chunk(as_floats(x + i, n, buffer), n, q, flip, row + i);
  }
  return nan ? std::numeric_limits<float>::quiet_NaN() : q.scale;
}

float quantize_row(const void* x, Element type, int64_t k, const RowQparams& qparams, uint8_t flip, uint8_t* row) {
  switch (type) {
    case Element::bf16: return quantize_row_of(static_cast<const BFloat16*>(x), k, qparams, flip, row);
    case Element::f16: return quantize_row_of(static_cast<const Half*>(x), k, qparams, flip, row);
    default: return quantize_row_of(static_cast<const float*>(x), k, qparams, flip, row);
  }
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
