// The convolution tile of the avx2 path.
#include "cpu/common/vec.h"
#include "cpu/int8_conv/conv_work.h"
#include "cpu/int8_gemm/avx2_products.h"
#include "cpu/int8_gemm/int8_gemm.h"

namespace qkernels::QK_NAMESPACE {
namespace {

// The dot products of N pixels with C * 8 channels of a panel, of each run's groups from `first` to `last`.
template <Weights kWeights, int N, int C>
inline Weights dot_pixels(const TileInput& in, const uint8_t* const (&pixels)[N], const int8_t* weights, int64_t first,
                          int64_t last, const int32_t* start, int32_t* const (&sums)[N]) {
  const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x80));
  __m256i acc[N][C], largest = _mm256_setzero_si256();
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[n][c] = _mm256_load_si256(reinterpret_cast<const __m256i*>(start + c * 8));
  for (int64_t r = 0; r < in.runs; ++r) {
    const uint8_t* rows[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) rows[n] = pixels[n] + in.offsets[r] + first * 4;
    add_products<kWeights>(rows, weights + (r * in.run_groups + first) * kPanel * 4, last - first, flip, acc, largest);
  }
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) _mm256_store_si256(reinterpret_cast<__m256i*>(sums[n] + c * 8), acc[n][c]);
  return kWeights == Weights::watched ? kind_of(largest) : kWeights;
}

// C * 8 channels of a panel from `at` on.
template <int H, int Segments, int C>
inline void conv_tile_part(const TileInput& in, const int8_t* weights, const int32_t* start, int at, int64_t first,
                           int64_t last, int32_t* sums) {
  alignas(32) int32_t start_of_codes[C * 8];  // for products with the codes, not with code + 128
  for (int c = 0; c < C * 8; ++c)
    start_of_codes[c] =
        static_cast<int32_t>(static_cast<uint32_t>(start[at + c]) + 128u * static_cast<uint32_t>(in.colsum[at + c]));
  constexpr int kPixels = H * Segments;
  const auto pixel = [&](int i) { return in.pixels[i / H] + i % H * in.step; };
  const auto two = [&](auto kind, int i) {
    constexpr Weights kWeights = decltype(kind)::value;
    return dot_pixels<kWeights, 2, C>(in, {pixel(i), pixel(i + 1)}, weights + at * 4, first, last,
                                      kWeights == Weights::small ? start + at : start_of_codes,
                                      {sums + i * kPanel + at, sums + (i + 1) * kPanel + at});
  };
  const auto one = [&](auto kind, int i) {
    constexpr Weights kWeights = decltype(kind)::value;
    return dot_pixels<kWeights, 1, C>(in, {pixel(i)}, weights + at * 4, first, last,
                                      kWeights == Weights::small ? start + at : start_of_codes,
                                      {sums + i * kPanel + at});
  };
  using Watched = std::integral_constant<Weights, Weights::watched>;
  Weights found;
  if constexpr (kPixels % 2)
    found = one(Watched(), 0);
  else
    found = two(Watched(), 0);
  int i = kPixels % 2 ? 1 : 2;
  if (found == Weights::lowest)
    for (i = 0; i < kPixels; ++i) one(std::integral_constant<Weights, Weights::lowest>(), i);
  else if (found == Weights::small)
    for (; i < kPixels; i += 2) two(std::integral_constant<Weights, Weights::small>(), i);
  else
    for (; i < kPixels; i += 2) two(std::integral_constant<Weights, Weights::any>(), i);
}

template <int H, int Segments>
void conv_tile(const TileInput& in, const int8_t* weights, const int32_t* start, int32_t* sums) {
  if (!in.first_half) return conv_tile_part<H, Segments, 4>(in, weights, start, 0, 0, in.run_groups, sums);
  conv_tile_part<H, Segments, 2>(in, weights, start, 0, 0, in.first_half, sums);
  conv_tile_part<H, Segments, 2>(in, weights, start, 16, in.first_half, in.run_groups, sums);
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
