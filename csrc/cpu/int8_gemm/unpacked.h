// Products with weights that are not packed, for so few rows that packing would cost more.
#include "cpu/int8_gemm/epilogue.h"

namespace qkernels::QK_NAMESPACE {
namespace {

#if QK_PATH == QK_PATH_AVX512VNNI
// The sum of the lanes of each of 4 vectors.
inline __m128i sum_lanes(const __m512i (&v)[4]) {
  const __m512i low = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
  const __m512i high = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
  const __m256i halves = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}

// The dot products of 4 channels with MR rows, and with a row of ones, which gives colsum.
template <int MR>
inline void dot_columns(const int8_t* a, int64_t stride, const int8_t* b, int64_t stride_n, int64_t k,
                        const int32_t* rowsum, int32_t* sums, int32_t* colsum) {
  // Here the weights are the unsigned operand: w XOR 0x80 is w + 128, and 128 * rowsum is subtracted once from each
  // row.
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i acc[MR + 1][4];
#pragma GCC unroll 5
  for (int r = 0; r <= MR; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) acc[r][c] = _mm512_setzero_si512();
  for (int64_t i = 0; i < k; i += 64) {
    const __mmask64 inside = k - i >= 64 ? ~__mmask64{0} : (__mmask64{1} << (k - i)) - 1;
    __m512i w[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const __m512i s = _mm512_maskz_loadu_epi8(inside, b + c * stride_n + i);
      acc[MR][c] = _mm512_dpbusd_epi32(acc[MR][c], ones, s);
      w[c] = _mm512_xor_si512(s, flip);
    }
#pragma GCC unroll 4
    for (int r = 0; r < MR; ++r) {
      const __m512i codes = _mm512_maskz_loadu_epi8(inside, a + r * stride + i);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) acc[r][c] = _mm512_dpbusd_epi32(acc[r][c], w[c], codes);
    }
  }
  _mm_storeu_si128(reinterpret_cast<__m128i*>(colsum), sum_lanes(acc[MR]));
#pragma GCC unroll 4
  for (int r = 0; r < MR; ++r) {
    const __m128i offset = _mm_set1_epi32(static_cast<int32_t>(128u * static_cast<uint32_t>(rowsum[r])));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + r * kPanel), _mm_sub_epi32(sum_lanes(acc[r]), offset));
  }
}
#else
template <int MR>
inline void dot_columns(const int8_t* a, int64_t stride, const int8_t* b, int64_t stride_n, int64_t k, const int32_t*,
                        int32_t* sums, int32_t* colsum) {
  for (int c = 0; c < 4; ++c) {
    const int8_t* w = b + c * stride_n;
    int32_t total = 0;
    for (int64_t i = 0; i < k; ++i) total += w[i];
    colsum[c] = total;
    for (int r = 0; r < MR; ++r) {
      const int8_t* codes = a + r * stride;
      int32_t sum = 0;
      for (int64_t i = 0; i < k; ++i) sum += codes[i] * w[i];
      sums[r * kPanel + c] = sum;
    }
  }
}
#endif

template <int MR>
inline void unpacked_rows(const int8_t* a, int64_t stride, const int8_t* b, int64_t stride_n, int64_t k,
                          int64_t channels, int32_t* sums, int32_t* colsum) {
  int32_t rowsum[MR];
  for (int r = 0; r < MR; ++r) {
    int32_t total = 0;
    for (int64_t i = 0; i < k; ++i) total += a[r * stride + i];
    rowsum[r] = total;
  }
  for (int64_t c = 0; c < channels; c += 4) {
    // Where 4 does not divide the number of channels, the last four overlap the four before them. Fewer than 4 channels
    // are taken one by one.
    const int64_t first = channels < 4 ? 0 : std::min(c, channels - 4);
    if (channels < 4)
      for (int64_t one = 0; one < channels; ++one)  // writes 4 equal sums; the next channel overwrites the last 3
        dot_columns<MR>(a, stride, b + one * stride_n, 0, k, rowsum, sums + one, colsum + one);
    else
      dot_columns<MR>(a, stride, b + first * stride_n, stride_n, k, rowsum, sums + first, colsum + first);
  }
}

void multiply_unpacked(const int8_t* rows, int64_t row_stride, int64_t m, const int8_t* b, int64_t stride_n, int64_t k,
                       const PanelOutput& output) {
  ChannelValues channels(output);
  alignas(64) int32_t sums[4 * kPanel] = {};
  for (int64_t row = 0; row < m; row += 4) {
    const int8_t* a = rows + row * row_stride;
    const int64_t height = std::min<int64_t>(4, m - row);
    switch (height) {
      case 1: unpacked_rows<1>(a, row_stride, b, stride_n, k, output.channels, sums, channels.colsum); break;
      case 2: unpacked_rows<2>(a, row_stride, b, stride_n, k, output.channels, sums, channels.colsum); break;
      case 3: unpacked_rows<3>(a, row_stride, b, stride_n, k, output.channels, sums, channels.colsum); break;
      default: unpacked_rows<4>(a, row_stride, b, stride_n, k, output.channels, sums, channels.colsum);
    }
    finish(sums, height, row, 0, channels, output);
  }
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
