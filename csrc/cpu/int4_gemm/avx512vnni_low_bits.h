// The tiles of the avx512vnni path for weights of 2 and 3 bits: as those of avx512vnni.h, by blocks of 8 k, which
// become operands in registers.
#include "cpu/int4_gemm/avx512vnni.h"

namespace qkernels::QK_NAMESPACE {
namespace {

// Up to 6 rows have a second set of sums, for the last 4 k of a block: a dot product waits 4 cycles for the one before
// it that adds to the same sums, as long as the block's bytes take to arrive.
// clang-format off
#define QK_SECOND_0(F) F(12, 13, "(%[p0])", 0)
#define QK_SECOND_1(F) F(14, 15, "(%[p0],%[s])", 1)
#define QK_SECOND_2(F) F(16, 17, "(%[p0],%[s],2)", 2)
#define QK_SECOND_3(F) F(18, 19, "(%[p3])", 3)
#define QK_SECOND_4(F) F(20, 21, "(%[p3],%[s])", 4)
#define QK_SECOND_5(F) F(22, 23, "(%[p3],%[s],2)", 5)
#define QK_SECONDS_1(F) QK_SECOND_0(F)
#define QK_SECONDS_2(F) QK_SECONDS_1(F) QK_SECOND_1(F)
#define QK_SECONDS_3(F) QK_SECONDS_2(F) QK_SECOND_2(F)
#define QK_SECONDS_4(F) QK_SECONDS_3(F) QK_SECOND_3(F)
#define QK_SECONDS_5(F) QK_SECONDS_4(F) QK_SECOND_4(F)
#define QK_SECONDS_6(F) QK_SECONDS_5(F) QK_SECOND_5(F)

#define QK_NEXT_DOTS(low, high, codes, r)                                                                             \
  "vpdpbusd 4" codes "%{1to16%},%%zmm24,%%zmm" #low "\n\t"                                                            \
  "vpdpbusd 4" codes "%{1to16%},%%zmm25,%%zmm" #high "\n\t"
#define QK_FOLD_ROW(low, high, low2, high2)                                                                           \
  "vpaddd %%zmm" #low2 ",%%zmm" #low ",%%zmm" #low "\n\t"                                                             \
  "vpaddd %%zmm" #high2 ",%%zmm" #high ",%%zmm" #high "\n\t"
#define QK_FOLDS_1 QK_FOLD_ROW(0, 1, 12, 13)
#define QK_FOLDS_2 QK_FOLDS_1 QK_FOLD_ROW(2, 3, 14, 15)
#define QK_FOLDS_3 QK_FOLDS_2 QK_FOLD_ROW(4, 5, 16, 17)
#define QK_FOLDS_4 QK_FOLDS_3 QK_FOLD_ROW(6, 7, 18, 19)
#define QK_FOLDS_5 QK_FOLDS_4 QK_FOLD_ROW(8, 9, 20, 21)
#define QK_FOLDS_6 QK_FOLDS_5 QK_FOLD_ROW(10, 11, 22, 23)

// Codes of channels 0 to 15 in zmm24, and 16 times those of 16 to 31 in zmm25: of the first 4 k of a block, and of the
// last. 3-bit codes get their highest bits from zmm27, shifted right by one in its upper half.
#define QK_CODES                                                                                                      \
  "vpandd %[low_bits],%%zmm26,%%zmm24\n\t"                                                                            \
  "vpandd %[high_bits],%%zmm26,%%zmm25\n\t"
#define QK_FIRST_2 "vmovdqu32 (%[b]),%%zmm26\n\t" QK_CODES
#define QK_LAST_2 "vpsrlw $2,%%zmm26,%%zmm26\n\t" QK_CODES
#define QK_CODES_AND(thirds)                                                                                          \
  "vpandd %[low_third],%%" thirds ",%%zmm24\n\t"                                                                      \
  "vpandd %[high_third],%%" thirds ",%%zmm25\n\t"                                                                     \
  "vpternlogd $0xf8,%[low_bits],%%zmm26,%%zmm24\n\t"                                                                  \
  "vpternlogd $0xf8,%[high_bits],%%zmm26,%%zmm25\n\t"
#define QK_FIRST_3                                                                                                    \
  "vbroadcasti64x4 64(%[b]),%%zmm27\n\t"                                                                              \
  "vpsrlvd %[halves],%%zmm27,%%zmm27\n\t"                                                                             \
  "vmovdqu32 (%[b]),%%zmm26\n\t"                                                                                      \
  "vpsllw $2,%%zmm27,%%zmm25\n\t"                                                                                     \
  QK_CODES_AND("zmm25")
#define QK_LAST_3 "vpsrlw $2,%%zmm26,%%zmm26\n\t" QK_CODES_AND("zmm27")

#define QK_LOW_BIT_GROUP(bits, bytes, rows, second_rows, zeros, folds, next, add)                                     \
  __asm__ volatile(                                                                                                   \
    QK_ROWS_##rows(QK_START)                                                                                          \
    zeros                                                                                                             \
    "0:\n\t"                                                                                                          \
    "prefetcht0 1024(%[b])\n\t"                                                                                       \
    QK_FIRST_##bits                                                                                                   \
    QK_ROWS_##rows(QK_DOTS)                                                                                           \
    QK_LAST_##bits                                                                                                    \
    second_rows(QK_NEXT_DOTS)                                                                                         \
    "add $" bytes ",%[b]\n\t"                                                                                         \
    next                                                                                                              \
    "dec %[blocks]\n\t"                                                                                               \
    "jnz 0b\n\t"                                                                                                      \
    folds                                                                                                             \
    QK_ROWS_##rows(QK_TO_FLOATS)                                                                                      \
    QK_ROWS_##rows(add)                                                                                               \
    : [b] "+r"(b), [p0] "+r"(p0), [p3] "+r"(p3), [p6] "+r"(p6), [p9] "+r"(p9), [blocks] "+r"(blocks)                  \
    : [s] "r"(stride), [terms] "r"(terms), [y] "r"(y), [low_bits] "v"(low_bits), [high_bits] "v"(high_bits),          \
      [low_third] "m"(thirds[0]), [high_third] "m"(thirds[1]), [halves] "m"(halves),                                  \
      [scale0] "m"(values.scale[0].v), [scale1] "m"(values.scale[1].v),                                               \
      [offset0] "v"(values.offset[0].v), [offset1] "v"(values.offset[1].v)                                            \
    : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",        \
      "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21",              \
      "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27")
#define QK_NEXT_FEW "add $8,%[p0]\n\t" "add $8,%[p3]\n\t"
#define QK_NEXT_MANY QK_NEXT_FEW "add $8,%[p6]\n\t" "add $8,%[p9]\n\t"
#define QK_FEW(bits, bytes, rows, add)                                                                                \
  QK_LOW_BIT_GROUP(bits, bytes, rows, QK_SECONDS_##rows, QK_SECONDS_##rows(QK_ZERO), QK_FOLDS_##rows, QK_NEXT_FEW, add)
#define QK_MANY(bits, bytes, rows, add) QK_LOW_BIT_GROUP(bits, bytes, rows, QK_ROWS_##rows, "", "", QK_NEXT_MANY, add)
#define QK_LOW_BIT_CASE(rows, group)                                                                                  \
  if constexpr (MR == rows) {                                                                                         \
    if constexpr (kBits == 2 && kAffine)                                                                              \
      group(2, "64", rows, QK_ADD_AFFINE);                                                                            \
    else if constexpr (kBits == 2)                                                                                    \
      group(2, "64", rows, QK_ADD);                                                                                   \
    else if constexpr (kAffine)                                                                                       \
      group(3, "96", rows, QK_ADD_AFFINE);                                                                            \
    else                                                                                                              \
      group(3, "96", rows, QK_ADD);                                                                                   \
  }

// For floats, what zmm26 holds of int4 weights: the first 4 k of a block, and the last. Bits above a 2-bit code are
// ignored.
#define QK_FIRST_INT4_2 "vmovdqu32 (%[b]),%%zmm26\n\t"
#define QK_LAST_INT4_2 "vpsrlw $2,%%zmm26,%%zmm26\n\t"
#define QK_FIRST_INT4_3                                                                                               \
  "vbroadcasti64x4 64(%[b]),%%zmm27\n\t"                                                                              \
  "vpsrlvd %[halves],%%zmm27,%%zmm27\n\t"                                                                             \
  "vmovdqu32 (%[b]),%%zmm28\n\t"                                                                                      \
  "vpsllw $2,%%zmm27,%%zmm26\n\t"                                                                                     \
  "vpandd %[third],%%zmm26,%%zmm26\n\t"                                                                               \
  "vpternlogd $0xf8,%[two_bits],%%zmm28,%%zmm26\n\t"
#define QK_LAST_INT4_3                                                                                                \
  "vpsrlw $2,%%zmm28,%%zmm28\n\t"                                                                                     \
  "vpandd %[third],%%zmm27,%%zmm26\n\t"                                                                               \
  "vpternlogd $0xf8,%[two_bits],%%zmm28,%%zmm26\n\t"
#define QK_LOW_BIT_FLOAT_GROUP(step, element_bytes, bits, bytes, rows, add)                                           \
  __asm__ volatile(                                                                                                   \
    QK_ROWS_##rows(QK_ZERO)                                                                                           \
    "0:\n\t"                                                                                                          \
    "prefetcht0 1024(%[b])\n\t"                                                                                       \
    QK_FIRST_INT4_##bits                                                                                              \
    step(rows)                                                                                                        \
    QK_LAST_INT4_##bits                                                                                               \
    step(rows)                                                                                                        \
    "add $" bytes ",%[b]\n\t"                                                                                         \
    "dec %[blocks]\n\t"                                                                                               \
    "jnz 0b\n\t"                                                                                                      \
    QK_ROWS_##rows(add)                                                                                               \
    : [b] "+r"(b), [p0] "+r"(p0), [p3] "+r"(p3), [p6] "+r"(p6), [p9] "+r"(p9), [blocks] "+r"(blocks)                  \
    : [s] "r"(element_bytes * stride), [terms] "r"(terms), [y] "r"(y), [table] "v"(table),                            \
      [first] "m"(pairs.first), [second] "m"(pairs.second), [third] "m"(third), [two_bits] "m"(two_bits),             \
      [halves] "m"(halves), [scale0] "m"(values.scale[0].v), [scale1] "m"(values.scale[1].v),                         \
      [offset0] "v"(values.offset[0].v), [offset1] "v"(values.offset[1].v)                                            \
    : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",        \
      "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21",              \
      "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28")
#define QK_FLOATS(bits, bytes, rows, add) QK_LOW_BIT_FLOAT_GROUP(QK_FLOAT_STEP, 4, bits, bytes, rows, add)
#define QK_PAIRS(bits, bytes, rows, add) QK_LOW_BIT_FLOAT_GROUP(QK_PAIR_STEP, 2, bits, bytes, rows, add)
// clang-format on

template <int kBits, bool kAffine, int MR>
void low_bit_tile(const int8_t* a, int64_t stride, const Int4Term* all_terms, int64_t term_stride,
                  const Int4Panel& panel, float* y) {
  const __m512i low_bits = _mm512_set1_epi8(0x03), high_bits = _mm512_set1_epi8(0x30);
  const __m512i thirds[2] = {_mm512_set1_epi8(0x04), _mm512_set1_epi8(0x40)};
  const __m512i halves = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(1), 1);
  for_each_group(panel.k, panel.group_size, [=, &panel](int64_t first, int64_t last, int64_t group, int64_t term) {
    const GroupValues values(panel, group, kAffine);
    const uint8_t* b = panel.data + first / kBlock * block_bytes(kBits);
    const int8_t *p0 = a + first, *p3 = p0 + 3 * stride, *p6 = p3 + 3 * stride, *p9 = p6 + 3 * stride;
    const Int4Term* terms = all_terms + term * term_stride;
    int64_t blocks = blocks_of(last - first);
    // clang-format off
    QK_LOW_BIT_CASE(1, QK_FEW) QK_LOW_BIT_CASE(2, QK_FEW) QK_LOW_BIT_CASE(3, QK_FEW)
    QK_LOW_BIT_CASE(4, QK_FEW) QK_LOW_BIT_CASE(5, QK_FEW) QK_LOW_BIT_CASE(6, QK_FEW)
    QK_LOW_BIT_CASE(7, QK_MANY) QK_LOW_BIT_CASE(8, QK_MANY) QK_LOW_BIT_CASE(9, QK_MANY)
    QK_LOW_BIT_CASE(10, QK_MANY) QK_LOW_BIT_CASE(11, QK_MANY) QK_LOW_BIT_CASE(12, QK_MANY)
    // clang-format on
  });
}

// Rows of floats, or of bf16 whose pairs are swapped.
template <int kBits, bool kAffine, int MR, typename X>
void low_bit_float_tile(const X* a, int64_t stride, const Int4Term* all_terms, int64_t term_stride,
                        const Int4Panel& panel, float* y) {
  constexpr bool kPairs = std::is_same_v<X, uint16_t>;
  const __m512i table = kPairs ? bf16_table<kBits, kAffine>() : _mm512_castps_si512(float_table<kBits, kAffine>());
  const BytesOfPairs pairs = bytes_of_pairs();
  const __m512i two_bits = _mm512_set1_epi8(0x33), third = _mm512_set1_epi8(0x44);
  const __m512i halves = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(1), 1);
  for_each_group(panel.k, panel.group_size, [=, &panel](int64_t first, int64_t last, int64_t group, int64_t term) {
    const GroupValues values(panel, group, kAffine);
    const uint8_t* b = panel.data + first / kBlock * block_bytes(kBits);
    const X *p0 = a + first, *p3 = p0 + 3 * stride, *p6 = p3 + 3 * stride, *p9 = p6 + 3 * stride;
    const Int4Term* terms = all_terms + term * term_stride;
    int64_t blocks = blocks_of(last - first);
    // clang-format off
    if constexpr (kPairs) {
      QK_LOW_BIT_CASE(1, QK_PAIRS) QK_LOW_BIT_CASE(2, QK_PAIRS) QK_LOW_BIT_CASE(3, QK_PAIRS)
      QK_LOW_BIT_CASE(4, QK_PAIRS) QK_LOW_BIT_CASE(5, QK_PAIRS) QK_LOW_BIT_CASE(6, QK_PAIRS)
      QK_LOW_BIT_CASE(7, QK_PAIRS) QK_LOW_BIT_CASE(8, QK_PAIRS) QK_LOW_BIT_CASE(9, QK_PAIRS)
      QK_LOW_BIT_CASE(10, QK_PAIRS) QK_LOW_BIT_CASE(11, QK_PAIRS) QK_LOW_BIT_CASE(12, QK_PAIRS)
    } else {
      QK_LOW_BIT_CASE(1, QK_FLOATS) QK_LOW_BIT_CASE(2, QK_FLOATS) QK_LOW_BIT_CASE(3, QK_FLOATS)
      QK_LOW_BIT_CASE(4, QK_FLOATS) QK_LOW_BIT_CASE(5, QK_FLOATS) QK_LOW_BIT_CASE(6, QK_FLOATS)
      QK_LOW_BIT_CASE(7, QK_FLOATS) QK_LOW_BIT_CASE(8, QK_FLOATS) QK_LOW_BIT_CASE(9, QK_FLOATS)
      QK_LOW_BIT_CASE(10, QK_FLOATS) QK_LOW_BIT_CASE(11, QK_FLOATS) QK_LOW_BIT_CASE(12, QK_FLOATS)
    }
    // clang-format on
  });
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
