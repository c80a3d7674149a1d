// Floats, pixel by pixel, to an output whose channels do not lie side by side.
#ifndef QK_CONV_TRANSPOSE
#define QK_CONV_TRANSPOSE

#include "cpu/common/vec.h"

namespace qkernels::QK_NAMESPACE {
namespace {

#if QK_PATH != QK_PATH_SCALAR
// 8 channels of 8 pixels, v_step floats apart, to the first `pixels` floats of 8 rows.
inline void transpose_8(const float* v, int64_t v_step, int64_t pixels, float* out, int64_t stride) {
  __m256 r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(v + i * v_step);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
#if QK_PATH == QK_PATH_AVX2
  alignas(32) float row[8];
  for (int i = 0; i < 8; ++i) {
    _mm256_store_ps(row, t[i]);
    for (int64_t p = 0; p < pixels; ++p) out[i * stride + p] = row[p];
  }
#else
  const __mmask8 inside = static_cast<__mmask8>((1u << pixels) - 1);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) _mm256_mask_storeu_ps(out + i * stride, inside, t[i]);
#endif
}
#endif

// v holds 8 pixels, v_step floats apart, those behind `pixels` of any value.
inline void store_by_channel(const float* v, int64_t v_step, int64_t pixels, int64_t channels, float* out,
                             int64_t channel_step, int64_t pixel_step) {
  int64_t c = 0;
#if QK_PATH != QK_PATH_SCALAR
  if (pixel_step == 1)
    for (; c + 8 <= channels; c += 8) transpose_8(v + c, v_step, pixels, out + c * channel_step, channel_step);
#endif
  for (; c < channels; ++c)
    for (int64_t p = 0; p < pixels; ++p) out[c * channel_step + p * pixel_step] = v[p * v_step + c];
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE

#endif
