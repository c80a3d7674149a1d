// The convolution tile of the avx2 path.
#include "cpu/common/vec.h"
#include "cpu/int8_conv/conv_epilogue.h"
#include "cpu/int8_conv/conv_work.h"
#include "cpu/int8_gemm/avx2_products.h"
#include "cpu/int8_gemm/int8_gemm.h"

namespace qkernels::QK_NAMESPACE {
namespace {

// Some channels of a panel, and the groups of each run for which they have weights.
struct PanelPart {
  const int8_t* weights;
  int64_t first, last;
  const int32_t* start;           // the sums begin at, for products with code + 128
  const int32_t* start_of_codes;  // for products with the codes
};

// The dot products of N pixels with C * 8 channels.
template <Weights kWeights, int N, int C>
inline Weights dot_pixels(const TileInput& in, const uint8_t* const (&pixels)[N], const PanelPart& part,
                          int32_t* sums) {
  const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x80));
  const int32_t* const start = kWeights == Weights::small ? part.start : part.start_of_codes;
  __m256i acc[N][C], largest = _mm256_setzero_si256();
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[n][c] = _mm256_load_si256(reinterpret_cast<const __m256i*>(start + c * 8));
  for (int64_t r = 0; r < in.runs; ++r) {
    const uint8_t* rows[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) rows[n] = pixels[n] + in.offsets[r] + part.first * 4;
    add_products<kWeights>(rows, part.weights + (r * in.run_groups + part.first) * kPanel * 4, part.last - part.first,
                           flip, acc, largest);
  }
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) _mm256_store_si256(reinterpret_cast<__m256i*>(sums + n * kPanel + c * 8), acc[n][c]);
  return kWeights == Weights::watched ? kind_of(largest) : kWeights;
}

template <Weights kWeights, int C>
void dot_pairs(const TileInput& in, const uint8_t* const* pixels, int first, int n, const PanelPart& part,
               int32_t* sums) {
  for (int i = first; i < n; i += 2)
    dot_pixels<kWeights, 2, C>(in, {pixels[i], pixels[i + 1]}, part, sums + i * kPanel);
}

template <int C>
void dot_part(const TileInput& in, const uint8_t* const* pixels, int n, const PanelPart& part, int32_t* sums) {
  const int first = n % 2 ? 1 : 2;
  const Weights found = n % 2 ? dot_pixels<Weights::watched, 1, C>(in, {pixels[0]}, part, sums)
                              : dot_pixels<Weights::watched, 2, C>(in, {pixels[0], pixels[1]}, part, sums);
  if (found == Weights::small) return dot_pairs<Weights::small, C>(in, pixels, first, n, part, sums);
  if (found == Weights::any) return dot_pairs<Weights::any, C>(in, pixels, first, n, part, sums);
  for (int i = 0; i < n; ++i) dot_pixels<Weights::lowest, 1, C>(in, {pixels[i]}, part, sums + i * kPanel);
}

template <int H, int Segments>
void conv_tile(const TileInput& in, const int8_t* weights, const int32_t* start, int32_t* sums) {
  constexpr int kPixels = H * Segments;
  const uint8_t* pixels[kPixels];
  for (int i = 0; i < kPixels; ++i) pixels[i] = in.pixels[i / H] + i % H * in.step;
  alignas(32) int32_t of_codes[kPanel];
  for (int c = 0; c < kPanel; ++c)
    of_codes[c] = static_cast<int32_t>(static_cast<uint32_t>(start[c]) + 128u * static_cast<uint32_t>(in.colsum[c]));
  if (in.first_half) {
    dot_part<2>(in, pixels, kPixels, {weights, 0, in.first_half, start, of_codes}, sums);
    return dot_part<2>(in, pixels, kPixels, {weights + 16 * 4, in.first_half, in.run_groups, start + 16, of_codes + 16},
                       sums + 16);
  }
  const PanelPart whole = {weights, 0, in.run_groups, start, of_codes};
  if (in.channels > 24) return dot_part<4>(in, pixels, kPixels, whole, sums);
  if (in.channels > 16) return dot_part<3>(in, pixels, kPixels, whole, sums);
  if (in.channels > 8) return dot_part<2>(in, pixels, kPixels, whole, sums);
  dot_part<1>(in, pixels, kPixels, whole, sums);
}

// Codes from the sums of a panel's channels, where results are bounded and activations only clamp them.
template <bool kResidual>
class CodesOfSums {
 public:
  CodesOfSums(const PanelValues& panel, const ClampedCodes& to)
      : panel_(panel),
        in_scale_(_mm256_set1_ps(to.in_scale)),
        inverse_(_mm256_set1_ps(to.inverse)),
        residual_scale_(_mm256_set1_ps(to.residual_scale)),
        residual_zero_(_mm256_set1_ps(to.residual_zero)),
        zero_point_(_mm256_set1_epi16(to.zero_point)),
        low_(_mm256_set1_epi8(static_cast<char>(to.low))),
        high_(_mm256_set1_epi8(static_cast<char>(to.high))) {}

  // Of one pixel. `residual`: 32 codes may be read.
  QK_INLINE void store(const int32_t* sums, const uint8_t* residual, uint8_t* pixel) const {
    const __m256i first = words(sums, residual, 0);
    const __m256i second = panel_.channels > 16 ? words(sums, residual, 16) : first;
    // Packing leaves 4 channels of each of 4 vectors in every 128 bits.
    __m256i codes =
        _mm256_permutevar8x32_epi32(_mm256_packus_epi16(first, second), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    codes = _mm256_min_epu8(_mm256_max_epu8(codes, low_), high_);
    if (panel_.channels == kPanel) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(pixel), codes);
    alignas(32) uint8_t bytes[kPanel];
    _mm256_store_si256(reinterpret_cast<__m256i*>(bytes), codes);
    std::memcpy(pixel, bytes, static_cast<size_t>(panel_.channels));
  }

 private:
  QK_INLINE __m256i words(const int32_t* sums, const uint8_t* residual, int at) const {
    const __m256i both = _mm256_packs_epi32(steps(sums, residual, at), steps(sums, residual, at + 8));
    return _mm256_adds_epi16(both, zero_point_);
  }
  QK_INLINE __m256i steps(const int32_t* sums, const uint8_t* residual, int at) const {
    __m256 v = _mm256_cvtepi32_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(sums + at)));
    v = _mm256_mul_ps(_mm256_mul_ps(v, _mm256_load_ps(panel_.scale + at)), in_scale_);
    v = _mm256_add_ps(v, _mm256_load_ps(panel_.bias + at));
    if constexpr (kResidual) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(residual + at));
      const __m256 code = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
      v = _mm256_add_ps(v, _mm256_mul_ps(_mm256_sub_ps(code, residual_zero_), residual_scale_));
    }
    return _mm256_cvtps_epi32(_mm256_mul_ps(v, inverse_));
  }

  const PanelValues& panel_;
  __m256 in_scale_, inverse_, residual_scale_, residual_zero_;
  __m256i zero_point_, low_, high_;
};

template <int H, int Segments, bool kResidual>
inline void store_codes(const int32_t* sums, const PanelValues& panel, const ClampedCodes& to) {
  const CodesOfSums<kResidual> of(panel, to);
  for (int s = 0; s < Segments; ++s)
    for (int i = 0; i < H; ++i, sums += kPanel)
      of.store(sums, kResidual ? to.residual[s] + i * to.residual_step : nullptr, to.codes[s] + i * to.step);
}

template <int H, int Segments>
void conv_tile_codes(const TileInput& in, const int8_t* weights, const PanelValues& panel, const ClampedCodes& to) {
  alignas(64) int32_t sums[H * Segments * kPanel];
  conv_tile<H, Segments>(in, weights, panel.start, sums);
  to.residual[0] ? store_codes<H, Segments, true>(sums, panel, to) : store_codes<H, Segments, false>(sums, panel, to);
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
