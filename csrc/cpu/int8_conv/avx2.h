// The convolution tile of the avx2 path.
#include "cpu/common/vec.h"
#include "cpu/int8_conv/conv_work.h"
#include "cpu/int8_gemm/int8_gemm.h"

namespace qkernels::QK_NAMESPACE {
namespace {

// The dot products of N pixels with 16 channels of a panel, of each run's groups from `first` to `last`. Bytes are
// widened to int16, and pairs of products are summed in int32. This is exact, while the instruction for bytes would
// saturate.
template <int N>
inline void multiply_half(const TileInput& in, const uint8_t* const (&pixels)[N], const int8_t* weights, int64_t first,
                          int64_t last, const int32_t* start, int32_t* const (&sums)[N]) {
  __m256i acc[N][4];  // [4 channels][2 sums of pairs]
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) acc[n][i] = _mm256_setzero_si256();
  for (int64_t r = 0; r < in.runs; ++r)
    for (int64_t g = first; g < last; ++g) {
      const int8_t* of_group = weights + (r * in.run_groups + g) * kPanel * 4;
      __m256i codes[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        const __m128 four = _mm_broadcast_ss(reinterpret_cast<const float*>(pixels[n] + in.offsets[r] + g * 4));
        codes[n] = _mm256_cvtepu8_epi16(_mm_castps_si128(four));
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(of_group + i * 16)));
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) {
          acc[n][i] = _mm256_add_epi32(acc[n][i], _mm256_madd_epi16(codes[n], w));
          __asm__("" : "+x"(acc[n][i]));  // without this GCC moves all additions to the end and spills
        }
      }
    }
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += 2) {
      const __m256i sum = _mm256_permute4x64_epi64(_mm256_hadd_epi32(acc[n][i], acc[n][i + 1]), 0xD8);
      const __m256i begin = _mm256_load_si256(reinterpret_cast<const __m256i*>(start + i * 4));
      _mm256_store_si256(reinterpret_cast<__m256i*>(sums[n] + i * 4), _mm256_add_epi32(sum, begin));
    }
}

template <int H, int Segments>
void conv_tile(const TileInput& in, const int8_t* weights, const int32_t* start, int32_t* sums) {
  const auto pixel = [&](int i) { return in.pixels[i / H] + i % H * in.step; };
  for (int half = 0; half < kPanel; half += 16) {
    const int64_t first = half ? in.first_half : 0, last = !half && in.first_half ? in.first_half : in.run_groups;
    int i = 0;
    for (; i + 2 <= H * Segments; i += 2)
      multiply_half<2>(in, {pixel(i), pixel(i + 1)}, weights + half * 4, first, last, start + half,
                       {sums + i * kPanel + half, sums + (i + 1) * kPanel + half});
    if (i < H * Segments)
      multiply_half<1>(in, {pixel(i)}, weights + half * 4, first, last, start + half, {sums + i * kPanel + half});
  }
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
