// The int4 GEMM tiles of the avx2 path.
#include "cpu/int4_gemm/groups.h"

namespace qkernels::QK_NAMESPACE {
namespace {

constexpr Isa kIsa = Isa::avx2;
constexpr int kTileRows = 4;
constexpr int kFloatTileRows = 24;

inline __m256i load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// 4 k of 8 channels from `strip` on in the low bits, and of 8 from 16 + strip on in the high bits, as int4 weights have
// them; b is at the start of 8 k, of which these are the first or the last.
template <int kBits>
inline __m256i int4_at(const uint8_t* b, int last, int strip) {
  if constexpr (kBits == 4) return load_bytes(b + last * 64 + strip * 4);
  __m256i codes = load_bytes(b + strip * 4);
  if (last) codes = _mm256_srli_epi16(codes, 2);
  codes = _mm256_and_si256(codes, _mm256_set1_epi8(0x33));
  if constexpr (kBits == 3) {
    __m256i highest = load_bytes(b + 64);
    if (strip) highest = _mm256_srli_epi16(highest, 1);
    if (!last) highest = _mm256_slli_epi16(highest, 2);
    codes = _mm256_or_si256(codes, _mm256_and_si256(highest, _mm256_set1_epi8(0x44)));
  }
  return codes;
}

template <int kBits>
constexpr int64_t kBlockBytes = kBits == 4 ? 128 : 32 * kBits;  // of 8 k

// How many steps of 4 k the panel holds for n k; the k behind the last have weights that are zeros.
template <int kBits>
inline int64_t steps_of(int64_t n) {
  return kBits == 4 ? k_groups(n) : 2 * blocks_of(n);
}

// Adds the products of MR rows of codes and one panel to y[MR][32].
// int16 holds pairs of products, and the sums of 8 pairs: 8 * 2 * 15 * 128 < 2^15.
template <int kBits, bool kAffine, int MR>
void tile_of(const int8_t* a, int64_t stride, const Int4Term* terms, int64_t term_stride, const Int4Panel& panel,
             float* y) {
  const __m256i low_bits = _mm256_set1_epi8(0x0f), ones = _mm256_set1_epi16(1);
  for_each_group(panel.k, panel.group_size, [&](int64_t first, int64_t last, int64_t group, int64_t term) {
    alignas(32) int32_t sums[MR][kPanel];
    for (int r = 0; r < MR; ++r)
      for (int c = 0; c < kPanel; ++c) sums[r][c] = terms[term * term_stride + r].start;
    const int64_t steps = steps_of<kBits>(last - first);
    for (int64_t begin = 0; begin < steps; begin += 8) {
      const int64_t end = std::min(begin + 8, steps);
      for (int strip = 0; strip < 16; strip += 8) {  // 8 channels from strip on, and 8 from 16 + strip on
        __m256i acc[MR][2];
#pragma GCC unroll 4
        for (int r = 0; r < MR; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
        const uint8_t* b = panel.data + (first / 4 + begin) * kBlockBytes<kBits> / 2;
        auto add = [&](int64_t i, int half) {
          const __m256i both = int4_at<kBits>(b, half, strip);
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
        };
        int64_t i = begin;
        for (; i + 2 <= end; i += 2, b += kBlockBytes<kBits>) {
          add(i, 0);
          add(i + 1, 1);
        }
        if (i < end) add(i, 0);
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

template <bool kAffine, int MR>
void tile(const int8_t* a, int64_t stride, const Int4Term* terms, int64_t term_stride, const Int4Panel& panel,
          float* y) {
  switch (panel.bits) {
    case 2: return tile_of<2, kAffine, MR>(a, stride, terms, term_stride, panel, y);
    case 3: return tile_of<3, kAffine, MR>(a, stride, terms, term_stride, panel, y);
    default: return tile_of<4, kAffine, MR>(a, stride, terms, term_stride, panel, y);
  }
}

// The 8 weights of channels from `strip` on and from 16 + strip on, as integers, that belong to the k at 0 <= j < 4.
inline __m256 weights_of(__m256i word, int j, int half, __m256i lowest) {
  const __m256i code = _mm256_and_si256(_mm256_srli_epi32(word, 8 * j + 4 * half), _mm256_set1_epi32(15));
  return _mm256_cvtepi32_ps(_mm256_add_epi32(code, lowest));
}

// Adds to sums[MR][32] the products of MR rows of floats with the codes of n k, for so few rows that each weight is
// used in registers.
template <int kBits, int MR>
inline void add_floats(const float* a, int64_t stride, const uint8_t* b, int64_t n, __m256i lowest,
                       float (*sums)[kPanel]) {
  for (int64_t i = 0; i < steps_of<kBits>(n); ++i)
    for (int strip = 0; strip < 16; strip += 8) {
      const __m256i word = int4_at<kBits>(b + i / 2 * kBlockBytes<kBits>, i & 1, strip);
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
          for (int r = 0; r < MR; ++r)
            acc[r][h] = _mm256_fmadd_ps(w, _mm256_set1_ps(a[r * stride + i * 4 + j]), acc[r][h]);
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

template <int kBits>
inline void widen_weights(const uint8_t* b, int64_t n, __m256i lowest, float (*weights)[kPanel]) {
  for (int64_t i = 0; i < k_groups(n); ++i)
    for (int strip = 0; strip < 16; strip += 8) {
      const __m256i word = int4_at<kBits>(b + i / 2 * kBlockBytes<kBits>, i & 1, strip);
      for (int j = 0; j < 4; ++j)
        for (int h = 0; h < 2; ++h)
          _mm256_store_ps(weights[i * 4 + j] + h * 16 + strip, weights_of(word, j, h, lowest));
    }
}

template <int kBits, int MR>
inline void add_many(const float* a, int64_t stride, const uint8_t* b, int64_t n, __m256i lowest,
                     float (*sums)[kPanel]) {
  alignas(32) float weights[kWidened][kPanel];
  for (int64_t first = 0; first < n; first += kWidened, b += kWidened / kBlock * kBlockBytes<kBits>) {
    const int64_t count = std::min(kWidened, n - first);
    widen_weights<kBits>(b, count, lowest, weights);
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
  const __m256i lowest = _mm256_set1_epi32((kAffine ? 8 : 0) - code_offset(panel.bits));
  for_each_group(panel.k, panel.group_size, [&](int64_t first, int64_t last, int64_t group, int64_t term) {
    alignas(32) float sums[MR][kPanel] = {};
    auto add = [&](auto bits) {
      constexpr int kBits = decltype(bits)::value;
      const uint8_t* b = panel.data + first / 4 * kBlockBytes<kBits> / 2;
      if constexpr (MR <= kFewRows)
        add_floats<kBits, MR>(a + first, stride, b, last - first, lowest, sums);
      else
        add_many<kBits, MR>(a + first, stride, b, last - first, lowest, sums);
    };
    switch (panel.bits) {
      case 2: add(std::integral_constant<int, 2>()); break;
      case 3: add(std::integral_constant<int, 3>()); break;
      default: add(std::integral_constant<int, 4>());
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
