// The int8 GEMM tile of the avx2 path.
#include "cpu/common/vec.h"
#include "cpu/int8_gemm/int8_gemm.h"

namespace qkernels::QK_NAMESPACE {
namespace {

constexpr Isa kIsa = Isa::avx2;
constexpr uint8_t kFlip = 0;
constexpr int kTileRows = 2;
constexpr int kUnpackedRows = 2;

// The dot products of MR rows and one panel: sums[MR][32].
// Bytes are widened to int16, and pairs of products are summed in int32. This is exact, while the instruction for bytes
// would saturate.
template <int MR>
void tile(const uint8_t* a, int64_t stride, const int8_t* b, int64_t groups, int32_t* sums) {
  for (int half = 0; half < kPanel; half += 16) {
    __m256i acc[MR][4];  // [4 channels][2 sums of pairs]
#pragma GCC unroll 2
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) acc[r][i] = _mm256_setzero_si256();
    const int8_t* p = b + half * 4;
    for (int64_t g = 0; g < groups; ++g, p += kPanel * 4) {
      __m256i codes[MR];
#pragma GCC unroll 2
      for (int r = 0; r < MR; ++r) {
        const __m128 four = _mm_broadcast_ss(reinterpret_cast<const float*>(a + r * stride + g * 4));
        codes[r] = _mm256_cvtepi8_epi16(_mm_castps_si128(four));
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * 16)));
#pragma GCC unroll 2
        for (int r = 0; r < MR; ++r) {
          acc[r][i] = _mm256_add_epi32(acc[r][i], _mm256_madd_epi16(codes[r], w));
          __asm__("" : "+x"(acc[r][i]));  // without this GCC moves all additions to the end and spills
        }
      }
    }
#pragma GCC unroll 2
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < 4; i += 2) {
        const __m256i sum = _mm256_permute4x64_epi64(_mm256_hadd_epi32(acc[r][i], acc[r][i + 1]), 0xD8);
        _mm256_store_si256(reinterpret_cast<__m256i*>(sums + r * kPanel + half + i * 4), sum);
      }
  }
}

// Adds the sums of 4 neighbouring codes to `total`.
inline __m256i add_groups(__m256i total, __m256i codes) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), codes);
  return _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
