// The int4 GEMM tiles of the avx2 path.
#include "cpu/int4_gemm/groups.h"

namespace qkernels::QK_NAMESPACE {
namespace {

constexpr Isa kIsa = Isa::avx2;
constexpr int kTileRows = 4;
constexpr int kFloatTileRows = 4;

// Adds the products of MR rows of codes and one panel to y[MR][32].
// int16 holds pairs of products, and the sums of 8 pairs: 8 * 2 * 15 * 128 < 2^15.
template <bool kAffine, int MR>
void tile(const int8_t* a, int64_t stride, const Int4Term* terms, int64_t term_stride, const Int4Panel& panel,
          float* y) {
  const __m256i low_bits = _mm256_set1_epi8(0x0f), ones = _mm256_set1_epi16(1);
  for_each_group(panel.k, panel.group_size, [&](int64_t first, int64_t last, int64_t group, int64_t term) {
    alignas(32) int32_t sums[MR][kPanel];
    for (int r = 0; r < MR; ++r)
      for (int c = 0; c < kPanel; ++c) sums[r][c] = kAffine ? 0 : terms[term * term_stride + r].start;
    const int64_t steps = (last - first + 3) / 4;
    for (int64_t begin = 0; begin < steps; begin += 8) {
      const int64_t end = std::min(begin + 8, steps);
      for (int strip = 0; strip < 16; strip += 8) {  // 8 channels from strip on, and 8 from 16 + strip on
        __m256i acc[MR][2];
#pragma GCC unroll 4
        for (int r = 0; r < MR; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
        const uint8_t* b = panel.data + first * 16 + strip * 4;
        for (int64_t i = begin; i < end; ++i) {
          const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + i * 64));
          const __m256i low = _mm256_and_si256(both, low_bits);
          const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_bits);
#pragma GCC unroll 4
          for (int r = 0; r < MR; ++r) {
            int32_t four;
            std::memcpy(&four, a + r * stride + first + i * 4, 4);
            const __m256i codes = _mm256_set1_epi32(four);
            acc[r][0] = _mm256_add_epi16(acc[r][0], _mm256_maddubs_epi16(low, codes));
            acc[r][1] = _mm256_add_epi16(acc[r][1], _mm256_maddubs_epi16(high, codes));
          }
        }
#pragma GCC unroll 4
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) {
            __m256i* sum = reinterpret_cast<__m256i*>(sums[r] + h * 16 + strip);
            _mm256_store_si256(sum, _mm256_add_epi32(_mm256_load_si256(sum), _mm256_madd_epi16(acc[r][h], ones)));
          }
      }
    }
    const GroupValues values(panel, group, kAffine);
    for (int r = 0; r < MR; ++r)
      for (int h = 0; h < 2; ++h)
        add_group<kAffine>(values, h, terms[term * term_stride + r], F32::load(sums[r] + h * 16),
                           y + r * kPanel + h * 16);
  });
}

// The same for rows of floats.
template <bool kAffine, int MR>
void float_tile(const float* a, int64_t stride, const Int4Term* terms, int64_t term_stride, const Int4Panel& panel,
                float* y) {
  const int32_t lowest = kAffine ? 0 : -8;
  for_each_group(panel.k, panel.group_size, [&](int64_t first, int64_t last, int64_t group, int64_t term) {
    alignas(32) float sums[MR][kPanel] = {};
    const uint8_t* b = panel.data + first * 16;
    for (int64_t i = first; i < last; i += 4, b += 64) {
      for (int strip = 0; strip < 16; strip += 8) {
        const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + strip * 4));
        __m256 acc[MR][2];
#pragma GCC unroll 4
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) acc[r][h] = _mm256_load_ps(sums[r] + h * 16 + strip);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) {
            const __m256i code = _mm256_and_si256(_mm256_srli_epi32(word, 8 * j + 4 * h), _mm256_set1_epi32(15));
            const __m256 w = _mm256_cvtepi32_ps(_mm256_add_epi32(code, _mm256_set1_epi32(lowest)));
#pragma GCC unroll 4
            for (int r = 0; r < MR; ++r)
              acc[r][h] = _mm256_fmadd_ps(w, _mm256_set1_ps(a[r * stride + i + j]), acc[r][h]);
          }
#pragma GCC unroll 4
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) _mm256_store_ps(sums[r] + h * 16 + strip, acc[r][h]);
      }
    }
    const GroupValues values(panel, group, kAffine);
    for (int r = 0; r < MR; ++r)
      for (int h = 0; h < 2; ++h)
        add_group<kAffine>(values, h, terms[term * term_stride + r], F32::load(sums[r] + h * 16),
                           y + r * kPanel + h * 16);
  });
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
