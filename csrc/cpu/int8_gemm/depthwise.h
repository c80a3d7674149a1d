// Convolutions with one filter per channel.
#include "cpu/int8_gemm/epilogue.h"
#include "cpu/int8_gemm/tile.h"

namespace qkernels::QK_NAMESPACE {
namespace {

void multiply_depthwise(const uint8_t* codes, int64_t step, int64_t pixels, const int64_t* taps, int64_t n_taps,
                        const int32_t* weights, const PanelOutput& output) {
  const ChannelValues channels(output);
  constexpr int kAtOnce = 8;  // pixels of one epilogue
  alignas(64) int32_t batch[kAtOnce * kPanel];
  for (int64_t pixel = 0; pixel < pixels; ++pixel, codes += step) {
    int32_t* sums = batch + pixel % kAtOnce * kPanel;
#if QK_PATH == QK_PATH_AVX512VNNI
    __m512i sum0 = _mm512_setzero_si512(), sum1 = _mm512_setzero_si512();
    for (int64_t t = 0; t < n_taps; ++t) {
      const __m128i* code = reinterpret_cast<const __m128i*>(codes + taps[t]);
      const __m512i product0 =
          _mm512_mullo_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128(code)), _mm512_loadu_si512(weights + t * kPanel));
      const __m512i product1 = _mm512_mullo_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128(code + 1)),
                                                  _mm512_loadu_si512(weights + t * kPanel + 16));
      sum0 = _mm512_add_epi32(sum0, product0);
      sum1 = _mm512_add_epi32(sum1, product1);
    }
    _mm512_store_si512(sums, sum0);
    _mm512_store_si512(sums + 16, sum1);
#else
    for (int c = 0; c < kPanel; ++c) sums[c] = 0;
    for (int64_t t = 0; t < n_taps; ++t) {
      const int8_t* code = reinterpret_cast<const int8_t*>(codes + taps[t]);
      for (int c = 0; c < kPanel; ++c) sums[c] += code[c] * weights[t * kPanel + c];
    }
#endif
    const int64_t waiting = pixel % kAtOnce + 1;
    if (waiting == kAtOnce || pixel + 1 == pixels) finish(batch, waiting, pixel + 1 - waiting, kFlip, channels, output);
  }
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
