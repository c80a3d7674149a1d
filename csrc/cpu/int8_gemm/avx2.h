// The int8 GEMM tile of the avx2 path.
#include "cpu/common/vec.h"
#include "cpu/int8_gemm/avx2_products.h"
#include "cpu/int8_gemm/int8_gemm.h"

namespace qkernels::QK_NAMESPACE {
namespace {

constexpr Isa kIsa = Isa::avx2;
constexpr uint8_t kFlip = 0;
constexpr int kTileRows = 8;
constexpr int kUnpackedRows = 2;

template <Weights kWeights, int N>
inline Weights dot_rows(const uint8_t* const (&rows)[N], const int8_t* b, int64_t groups, int32_t* sums) {
  __m256i acc[N][4] = {}, largest = _mm256_setzero_si256();
  add_products<kWeights>(rows, b, groups, _mm256_setzero_si256(), acc, largest);
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) _mm256_store_si256(reinterpret_cast<__m256i*>(sums + n * kPanel + c * 8), acc[n][c]);
  return kWeights == Weights::watched ? kind_of(largest) : kWeights;
}

// The dot products of MR rows and one panel: sums[MR][32].
template <int MR>
void tile(const uint8_t* a, int64_t stride, const int8_t* b, int64_t groups, int32_t* sums) {
  constexpr int kFirst = MR % 2 ? 1 : 2;
  Weights weights;
  if constexpr (MR % 2)
    weights = dot_rows<Weights::watched, 1>({a}, b, groups, sums);
  else
    weights = dot_rows<Weights::watched, 2>({a, a + stride}, b, groups, sums);
  const bool lowest = weights == Weights::lowest;
  for (int r = lowest ? 0 : kFirst; r < MR; r += lowest ? 1 : 2) {
    const uint8_t* row = a + r * stride;
    if (lowest)
      dot_rows<Weights::lowest, 1>({row}, b, groups, sums + r * kPanel);
    else
      dot_rows<Weights::any, 2>({row, row + stride}, b, groups, sums + r * kPanel);
  }
}

// Adds the sums of 4 neighbouring codes to `total`.
inline __m256i add_groups(__m256i total, __m256i codes) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), codes);
  return _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
