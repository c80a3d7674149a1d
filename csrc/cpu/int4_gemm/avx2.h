// The int4 GEMM tiles of the avx2 path.
#include "cpu/int4_gemm/groups.h"

namespace qkernels::QK_NAMESPACE {
namespace {

constexpr Isa kIsa = Isa::avx2;
constexpr int kTileRows = 4;
constexpr int kFloatTileRows = 24;

// Adds the products of MR rows of codes and one panel to y[MR][32].
// int16 holds pairs of products, and the sums of 8 pairs: 8 * 2 * 15 * 128 < 2^15.
template <bool kAffine, int MR>
void tile(const int8_t* a, int64_t stride, const Int4Term* terms, int64_t term_stride, const Int4Panel& panel,
          float* y) {
  const __m256i low_bits = _mm256_set1_epi8(0x0f), ones = _mm256_set1_epi16(1);
  for_each_group(panel.k, panel.group_size, [&](int64_t first, int64_t last, int64_t group, int64_t term) {
    alignas(32) int32_t sums[MR][kPanel];
    for (int r = 0; r < MR; ++r)
      for (int c = 0; c < kPanel; ++c) sums[r][c] = terms[term * term_stride + r].start;
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

// The 8 weights of channels from `strip` on and from 16 + strip on, as integers, that belong to the k at 0 <= j < 4.
inline __m256 weights_of(__m256i word, int j, int half, __m256i lowest) {
  const __m256i code = _mm256_and_si256(_mm256_srli_epi32(word, 8 * j + 4 * half), _mm256_set1_epi32(15));
  return _mm256_cvtepi32_ps(_mm256_add_epi32(code, lowest));
}

inline __m256i word_at(const uint8_t* b, int strip) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + strip * 4));
}

// Adds to sums[MR][32] the products of MR rows of floats with the codes of n k, for so few rows that each weight is
// used in registers.
template <int MR>
inline void add_floats(const float* a, int64_t stride, const uint8_t* b, int64_t n, __m256i lowest,
                       float (*sums)[kPanel]) {
  for (int64_t i = 0; i < n; i += 4, b += 64)
    for (int strip = 0; strip < 16; strip += 8) {
      const __m256i word = word_at(b, strip);
      __m256 acc[MR][2];
#pragma GCC unroll 4
      for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) acc[r][h] = _mm256_load_ps(sums[r] + h * 16 + strip);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          const __m256 w = weights_of(word, j, h, lowest);
#pragma GCC unroll 4
          for (int r = 0; r < MR; ++r) acc[r][h] = _mm256_fmadd_ps(w, _mm256_set1_ps(a[r * stride + i + j]), acc[r][h]);
        }
#pragma GCC unroll 4
      for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) _mm256_store_ps(sums[r] + h * 16 + strip, acc[r][h]);
      __asm__ volatile("" ::: "memory");  // without this GCC keeps the sums of both strips in registers, and spills
    }
}

// The same with weights that are floats already.
template <int MR>
inline void add_widened(const float* a, int64_t stride, const float (*weights)[kPanel], int64_t n,
                        float (*sums)[kPanel]) {
  for (int at = 0; at < kPanel; at += 16) {
    __m256 acc[MR][2];
#pragma GCC unroll 6
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) acc[r][h] = _mm256_load_ps(sums[r] + at + h * 8);
    for (int64_t i = 0; i < n; ++i) {
      const __m256 w[2] = {_mm256_load_ps(weights[i] + at), _mm256_load_ps(weights[i] + at + 8)};
#pragma GCC unroll 6
      for (int r = 0; r < MR; ++r) {
        const __m256 x = _mm256_set1_ps(a[r * stride + i]);
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) acc[r][h] = _mm256_fmadd_ps(w[h], x, acc[r][h]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) _mm256_store_ps(sums[r] + at + h * 8, acc[r][h]);
  }
}

// By 6 rows: 12 of 16 registers hold sums. Many rows share the weights of so many k: 8 KiB.
constexpr int kWidenedRows = 6, kFewRows = 4;
constexpr int64_t kWidened = 64;

template <int MR>
inline void add_many(const float* a, int64_t stride, const uint8_t* b, int64_t n, __m256i lowest,
                     float (*sums)[kPanel]) {
  alignas(32) float weights[kWidened][kPanel];
  for (int64_t first = 0; first < n; first += kWidened, b += kWidened * 16) {
    const int64_t count = std::min(kWidened, n - first);
    for (int64_t i = 0; i < count; i += 4)
      for (int strip = 0; strip < 16; strip += 8) {
        const __m256i word = word_at(b + i * 16, strip);
        for (int j = 0; j < 4; ++j)
          for (int h = 0; h < 2; ++h) _mm256_store_ps(weights[i + j] + h * 16 + strip, weights_of(word, j, h, lowest));
      }
    int r = 0;
    for (; r + kWidenedRows <= MR; r += kWidenedRows)
      add_widened<kWidenedRows>(a + r * stride + first, stride, weights, count, sums + r);
    if constexpr (MR % kWidenedRows != 0)
      add_widened<MR % kWidenedRows>(a + r * stride + first, stride, weights, count, sums + r);
  }
}

// The same as tile for rows of floats.
template <bool kAffine, int MR>
void float_tile(const float* a, int64_t stride, const Int4Term* terms, int64_t term_stride, const Int4Panel& panel,
                float* y) {
  const __m256i lowest = _mm256_set1_epi32(kAffine ? 0 : -8);
  for_each_group(panel.k, panel.group_size, [&](int64_t first, int64_t last, int64_t group, int64_t term) {
    alignas(32) float sums[MR][kPanel] = {};
    const uint8_t* b = panel.data + first * 16;
    if constexpr (MR <= kFewRows)
      add_floats<MR>(a + first, stride, b, last - first, lowest, sums);
    else
      add_many<MR>(a + first, stride, b, last - first, lowest, sums);
    const GroupValues values(panel, group, kAffine);
    for (int r = 0; r < MR; ++r)
      for (int h = 0; h < 2; ++h)
        add_group<kAffine>(values, h, terms[term * term_stride + r], F32::load(sums[r] + h * 16),
                           y + r * kPanel + h * 16);
  });
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
