// Products of bytes on the avx2 path: exact, by the instruction for bytes.
#ifndef QK_AVX2_PRODUCTS
#define QK_AVX2_PRODUCTS

#include "cpu/common/vec.h"
#include "cpu/int8_gemm/int8_gemm.h"

namespace qkernels::QK_NAMESPACE {
namespace {

// vpmaddubsw multiplies an unsigned with a signed byte, and adds pairs of products in int16, where they saturate. They
// cannot
//   small:  with code + 128 and weights of at most 64: 2 * 255 * 64 < 2^15,
//   any:    with |code|, and the weight with the code's sign: 2 * 128 * 127 < 2^15,
//   lowest: nor where a weight is -128, which has no negative: it is -127 - 1.
// Of what kind weights are shows while rows are multiplied with them, watched: as any, and the largest |weight| is
// kept. One core of a Zen 3 (December 2026): any at 0.70 of the speed of small, and twice that of products widened to
// int16.
enum class Weights { watched, small, any, lowest };

inline Weights kind_of(__m256i largest) {
  alignas(32) uint8_t magnitudes[32];
  _mm256_store_si256(reinterpret_cast<__m256i*>(magnitudes), largest);
  const uint8_t most = *std::max_element(magnitudes, magnitudes + 32);
  return most <= 64 ? Weights::small : most <= 127 ? Weights::any : Weights::lowest;
}

// The codes of a row in every lane, as the kind of weights wants them; bytes of memory are the codes XORed with `flip`.
template <Weights kWeights>
struct RowCodes {
  __m256i codes, magnitudes;

  RowCodes() = default;
  RowCodes(const uint8_t* row, __m256i flip) {
    int32_t four;
    std::memcpy(&four, row, 4);
    codes = _mm256_set1_epi32(four);
    if constexpr (kWeights != Weights::small) {
      codes = _mm256_xor_si256(codes, flip);
      magnitudes = _mm256_abs_epi8(codes);
    }
  }
  __m256i dot(__m256i weights) const {
    if constexpr (kWeights == Weights::small) return sums_of_4(codes, weights);
    if constexpr (kWeights != Weights::lowest) return sums_of_4(magnitudes, _mm256_sign_epi8(weights, codes));
    const __m256i rest = _mm256_cmpeq_epi8(weights, _mm256_set1_epi8(-128));  // -1 where true
    return _mm256_add_epi32(sums_of_4(magnitudes, _mm256_sign_epi8(_mm256_sub_epi8(weights, rest), codes)),
                            sums_of_4(magnitudes, _mm256_sign_epi8(rest, codes)));
  }

 private:
  static __m256i sums_of_4(__m256i unsigned_bytes, __m256i signed_bytes) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(unsigned_bytes, signed_bytes), _mm256_set1_epi16(1));
  }
};

// Adds to sums[N][C * 8] the dot products of N rows of `groups` times 4 codes with C * 8 channels of a panel.
template <Weights kWeights, int N, int C>
inline __attribute__((always_inline)) void add_products(const uint8_t* const (&rows)[N], const int8_t* weights,
                                                        int64_t groups, __m256i flip, __m256i (&sums)[N][C],
                                                        __m256i& largest) {
  for (int64_t g = 0; g < groups; ++g, weights += kPanel * 4) {
    RowCodes<kWeights> codes[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) codes[n] = RowCodes<kWeights>(rows[n] + g * 4, flip);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + c * 32));
      if constexpr (kWeights == Weights::watched) largest = _mm256_max_epu8(largest, _mm256_abs_epi8(w));
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        sums[n][c] = _mm256_add_epi32(sums[n][c], codes[n].dot(w));
        __asm__("" : "+x"(sums[n][c]));  // without this GCC moves all additions to the end and spills
      }
    }
  }
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE

#endif
