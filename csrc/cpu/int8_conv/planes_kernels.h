// The kernel of one path for planes: vectors of 16 pixels times single weights.
#include "cpu/int8_conv/planes_work.h"
#include "cpu/int8_conv/quantized_pixels.h"
#include "cpu/int8_gemm/int8_gemm.h"

namespace qkernels::QK_NAMESPACE {
namespace {

#if QK_PATH == QK_PATH_AVX512VNNI
// Up to 8 channels of up to 48 pixels. codes: [group of 4 channels][16 pixels][4], group_step bytes apart.
using PlanesTile = void (*)(const PlanesWork&, const uint8_t* codes, int64_t group_step, int64_t channel,
                            int64_t channels, float* out, __mmask16 last);

template <int Channels, int Vectors>
void planes_tile(const PlanesWork& work, const uint8_t* codes, int64_t group_step, int64_t channel, int64_t channels,
                 float* out, __mmask16 last) {
  __m512i acc[Channels][Vectors];
#pragma GCC unroll 8
  for (int c = 0; c < Channels; ++c)
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) acc[c][v] = _mm512_set1_epi32(work.start[channel + c]);
  const int8_t* weights = work.data + channel / kPanel * work.panel_bytes + channel % kPanel * 4;
  for (int64_t g = 0; g < work.groups; ++g, codes += group_step, weights += kPanel * 4) {
    __m512i pixels[Vectors];
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) pixels[v] = _mm512_loadu_si512(codes + v * 64);
#pragma GCC unroll 8
    for (int c = 0; c < Channels; ++c) {
      int32_t four;
      std::memcpy(&four, weights + c * 4, 4);
      const __m512i weight = _mm512_set1_epi32(four);
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) acc[c][v] = _mm512_dpbusd_epi32(acc[c][v], pixels[v], weight);
    }
  }
  // From here on the sums are other values to GCC, which would otherwise store them in the loop.
#pragma GCC unroll 8
  for (int c = 0; c < Channels; ++c)
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) __asm__ volatile("" : "+v"(acc[c][v]));
  const __m512 in_scale = _mm512_set1_ps(work.in_scale);
#pragma GCC unroll 8
  for (int c = 0; c < Channels; ++c) {
    if (c >= channels) break;
    const __m512 scale = _mm512_set1_ps(work.scale[channel + c]), bias = _mm512_set1_ps(work.bias[channel + c]);
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) {
      const __m512 product = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(acc[c][v]), scale), in_scale);
      _mm512_mask_storeu_ps(out + c * work.out_stride_c + v * 16, v + 1 == Vectors ? last : __mmask16{0xffff},
                            _mm512_add_ps(product, bias));
    }
  }
}

constexpr PlanesTile kPlanesTiles[2][3] = {{planes_tile<2, 1>, planes_tile<2, 2>, planes_tile<2, 3>},
                                           {planes_tile<8, 1>, planes_tile<8, 2>, planes_tile<8, 3>}};

bool convolve_pixels(const PlanesWork& work, const float* x, int64_t pixels, uint8_t* codes, float* out) {
  const int64_t vectors = (pixels + 15) / 16, group_step = vectors * 64;
  const __mmask16 last = F32::first(pixels - (vectors - 1) * 16);
  QuantizedPixels quantized(work.quantizer);
  for (int64_t g = 0; g < work.groups; ++g)
    for (int64_t v = 0; v < vectors; ++v)
      _mm512_storeu_si512(codes + g * group_step + v * 64,
                          quantized(x + g * 4 * work.x_stride_c + v * 16, work.x_stride_c, work.in_channels - g * 4,
                                    v + 1 == vectors ? last : __mmask16{0xffff}));
  for (int64_t channel = 0, channels; channel < work.out_channels; channel += channels) {
    channels = std::min<int64_t>(8, work.out_channels - channel);
    const auto& tiles = kPlanesTiles[channels > 2];
    for (int64_t v = 0, n; v < vectors; v += n) {
      n = std::min<int64_t>(3, vectors - v);
      tiles[n - 1](work, codes + v * 64, group_step, channel, channels, out + channel * work.out_stride_c + v * 16,
                   v + n == vectors ? last : __mmask16{0xffff});
    }
  }
  return quantized.found_nan();
}
constexpr ConvolvePixels kConvolvePixels = convolve_pixels;
#else
constexpr ConvolvePixels kConvolvePixels = nullptr;
#endif

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
