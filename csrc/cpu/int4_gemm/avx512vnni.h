// The int4 GEMM tiles of the avx512vnni path.
#include "cpu/int4_gemm/groups.h"

namespace qkernels::QK_NAMESPACE {
namespace {

constexpr Isa kIsa = Isa::avx512vnni;
constexpr int kTileRows = 12;
constexpr int kFloatTileRows = 12;

// Adds the products of MR rows of codes and one panel to y[MR][32].
// One block of assembly makes the products of a group, because GCC 12 spills the sums of a tile when it sees what they
// are used for: with 8 rows, groups of 128 and one thread, intrinsics reach 68 to 150 GOPS, and this code 400. Weights
// are prefetched 1 KiB ahead; without that it reaches 270 GOPS where they come from beyond the second-level cache.
// The sums of row r are in zmm(2r) for channels 0 to 15 and in zmm(2r + 1) for 16 to 31; 24 and 25 hold weights first
// and are free afterwards.
// clang-format off
#define QK_ROW_0(F) F(0, 1, "(%[p0])", 0)
#define QK_ROW_1(F) F(2, 3, "(%[p0],%[s])", 1)
#define QK_ROW_2(F) F(4, 5, "(%[p0],%[s],2)", 2)
#define QK_ROW_3(F) F(6, 7, "(%[p3])", 3)
#define QK_ROW_4(F) F(8, 9, "(%[p3],%[s])", 4)
#define QK_ROW_5(F) F(10, 11, "(%[p3],%[s],2)", 5)
#define QK_ROW_6(F) F(12, 13, "(%[p6])", 6)
#define QK_ROW_7(F) F(14, 15, "(%[p6],%[s])", 7)
#define QK_ROW_8(F) F(16, 17, "(%[p6],%[s],2)", 8)
#define QK_ROW_9(F) F(18, 19, "(%[p9])", 9)
#define QK_ROW_10(F) F(20, 21, "(%[p9],%[s])", 10)
#define QK_ROW_11(F) F(22, 23, "(%[p9],%[s],2)", 11)
#define QK_ROWS_1(F) QK_ROW_0(F)
#define QK_ROWS_2(F) QK_ROWS_1(F) QK_ROW_1(F)
#define QK_ROWS_3(F) QK_ROWS_2(F) QK_ROW_2(F)
#define QK_ROWS_4(F) QK_ROWS_3(F) QK_ROW_3(F)
#define QK_ROWS_5(F) QK_ROWS_4(F) QK_ROW_4(F)
#define QK_ROWS_6(F) QK_ROWS_5(F) QK_ROW_5(F)
#define QK_ROWS_7(F) QK_ROWS_6(F) QK_ROW_6(F)
#define QK_ROWS_8(F) QK_ROWS_7(F) QK_ROW_7(F)
#define QK_ROWS_9(F) QK_ROWS_8(F) QK_ROW_8(F)
#define QK_ROWS_10(F) QK_ROWS_9(F) QK_ROW_9(F)
#define QK_ROWS_11(F) QK_ROWS_10(F) QK_ROW_10(F)
#define QK_ROWS_12(F) QK_ROWS_11(F) QK_ROW_11(F)

#define QK_ZERO(low, high, codes, r)                                                                                  \
  "vpxord %%zmm" #low ",%%zmm" #low ",%%zmm" #low "\n\t"                                                              \
  "vpxord %%zmm" #high ",%%zmm" #high ",%%zmm" #high "\n\t"
// The sums start at -8 * the sum of the row's codes. Those of the high bits start at 16 times that.
#define QK_START(low, high, codes, r)                                                                                 \
  "vpbroadcastd 8*" #r "(%[terms]),%%zmm" #low "\n\t"                                                                 \
  "vpslld $4,%%zmm" #low ",%%zmm" #high "\n\t"
#define QK_DOTS(low, high, codes, r)                                                                                  \
  "vpdpbusd " codes "%{1to16%},%%zmm24,%%zmm" #low "\n\t"                                                             \
  "vpdpbusd " codes "%{1to16%},%%zmm25,%%zmm" #high "\n\t"
#define QK_TO_FLOATS(low, high, codes, r)                                                                             \
  "vpsrad $4,%%zmm" #high ",%%zmm" #high "\n\t"                                                                       \
  "vcvtdq2ps %%zmm" #low ",%%zmm" #low "\n\t"                                                                         \
  "vcvtdq2ps %%zmm" #high ",%%zmm" #high "\n\t"
// The products of floats with the first, the second, the third and the fourth of 4 k.
#define QK_FMA_0(low, high, x, r)                                                                                     \
  "vfmadd231ps 0" x "%{1to16%},%%zmm24,%%zmm" #low "\n\t"                                                             \
  "vfmadd231ps 0" x "%{1to16%},%%zmm25,%%zmm" #high "\n\t"
#define QK_FMA_1(low, high, x, r)                                                                                     \
  "vfmadd231ps 4" x "%{1to16%},%%zmm24,%%zmm" #low "\n\t"                                                             \
  "vfmadd231ps 4" x "%{1to16%},%%zmm25,%%zmm" #high "\n\t"
#define QK_FMA_2(low, high, x, r)                                                                                     \
  "vfmadd231ps 8" x "%{1to16%},%%zmm24,%%zmm" #low "\n\t"                                                             \
  "vfmadd231ps 8" x "%{1to16%},%%zmm25,%%zmm" #high "\n\t"
#define QK_FMA_3(low, high, x, r)                                                                                     \
  "vfmadd231ps 12" x "%{1to16%},%%zmm24,%%zmm" #low "\n\t"                                                            \
  "vfmadd231ps 12" x "%{1to16%},%%zmm25,%%zmm" #high "\n\t"
// The products of pairs of bf16 with the first and the second pair of 4 k.
#define QK_PAIR_0(low, high, x, r)                                                                                    \
  "vdpbf16ps 0" x "%{1to16%},%%zmm24,%%zmm" #low "\n\t"                                                               \
  "vdpbf16ps 0" x "%{1to16%},%%zmm25,%%zmm" #high "\n\t"
#define QK_PAIR_1(low, high, x, r)                                                                                    \
  "vdpbf16ps 4" x "%{1to16%},%%zmm24,%%zmm" #low "\n\t"                                                               \
  "vdpbf16ps 4" x "%{1to16%},%%zmm25,%%zmm" #high "\n\t"
// y += scale * dot
#define QK_ADD(low, high, codes, r)                                                                                   \
  "vmulps %[scale0],%%zmm" #low ",%%zmm" #low "\n\t"                                                                  \
  "vmulps %[scale1],%%zmm" #high ",%%zmm" #high "\n\t"                                                                \
  "vaddps 128*" #r "(%[y]),%%zmm" #low ",%%zmm" #low "\n\t"                                                           \
  "vaddps 128*" #r "+64(%[y]),%%zmm" #high ",%%zmm" #high "\n\t"                                                      \
  "vmovaps %%zmm" #low ",128*" #r "(%[y])\n\t"                                                                        \
  "vmovaps %%zmm" #high ",128*" #r "+64(%[y])\n\t"
// y = (y + offset * sum) + scale * dot
#define QK_ADD_AFFINE(low, high, codes, r)                                                                            \
  "vmulps %[scale0],%%zmm" #low ",%%zmm" #low "\n\t"                                                                  \
  "vmulps %[scale1],%%zmm" #high ",%%zmm" #high "\n\t"                                                                \
  "vmulps 8*" #r "+4(%[terms])%{1to16%},%[offset0],%%zmm24\n\t"                                                       \
  "vmulps 8*" #r "+4(%[terms])%{1to16%},%[offset1],%%zmm25\n\t"                                                       \
  "vaddps 128*" #r "(%[y]),%%zmm24,%%zmm24\n\t"                                                                       \
  "vaddps 128*" #r "+64(%[y]),%%zmm25,%%zmm25\n\t"                                                                    \
  "vaddps %%zmm" #low ",%%zmm24,%%zmm24\n\t"                                                                          \
  "vaddps %%zmm" #high ",%%zmm25,%%zmm25\n\t"                                                                         \
  "vmovaps %%zmm24,128*" #r "(%[y])\n\t"                                                                              \
  "vmovaps %%zmm25,128*" #r "+64(%[y])\n\t"

#define QK_GROUP(rows, start, add)                                                                                    \
  __asm__ volatile(                                                                                                   \
    QK_ROWS_##rows(start)                                                                                             \
    "0:\n\t"                                                                                                          \
    "prefetcht0 1024(%[b])\n\t"                                                                                       \
    "vpandd (%[b]),%[low_bits],%%zmm24\n\t"                                                                           \
    "vpandd (%[b]),%[high_bits],%%zmm25\n\t"                                                                          \
    QK_ROWS_##rows(QK_DOTS)                                                                                           \
    "add $64,%[b]\n\t"                                                                                                \
    "add $4,%[p0]\n\t"                                                                                                \
    "add $4,%[p3]\n\t"                                                                                                \
    "add $4,%[p6]\n\t"                                                                                                \
    "add $4,%[p9]\n\t"                                                                                                \
    "dec %[steps]\n\t"                                                                                                \
    "jnz 0b\n\t"                                                                                                      \
    QK_ROWS_##rows(QK_TO_FLOATS)                                                                                      \
    QK_ROWS_##rows(add)                                                                                               \
    : [b] "+r"(b), [p0] "+r"(p0), [p3] "+r"(p3), [p6] "+r"(p6), [p9] "+r"(p9), [steps] "+r"(steps)                    \
    : [s] "r"(stride), [terms] "r"(terms), [y] "r"(y), [low_bits] "v"(low_bits), [high_bits] "v"(high_bits),          \
      [scale0] "v"(values.scale[0].v), [scale1] "v"(values.scale[1].v),                                               \
      [offset0] "v"(values.offset[0].v), [offset1] "v"(values.offset[1].v)                                            \
    : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",        \
      "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21",              \
      "xmm22", "xmm23", "xmm24", "xmm25")
// The 4 k in zmm26, of which the sums of floats take one at a time.
#define QK_FLOAT_STEP(rows)                                                                                           \
  "vpermps %[table],%%zmm26,%%zmm24\n\t"                                                                              \
  "vpsrld $4,%%zmm26,%%zmm25\n\t"                                                                                     \
  "vpermps %[table],%%zmm25,%%zmm25\n\t"                                                                              \
  QK_ROWS_##rows(QK_FMA_0)                                                                                            \
  "vpsrld $8,%%zmm26,%%zmm24\n\t"                                                                                     \
  "vpermps %[table],%%zmm24,%%zmm24\n\t"                                                                              \
  "vpsrld $12,%%zmm26,%%zmm25\n\t"                                                                                    \
  "vpermps %[table],%%zmm25,%%zmm25\n\t"                                                                              \
  QK_ROWS_##rows(QK_FMA_1)                                                                                            \
  "vpsrld $16,%%zmm26,%%zmm24\n\t"                                                                                    \
  "vpermps %[table],%%zmm24,%%zmm24\n\t"                                                                              \
  "vpsrld $20,%%zmm26,%%zmm25\n\t"                                                                                    \
  "vpermps %[table],%%zmm25,%%zmm25\n\t"                                                                              \
  QK_ROWS_##rows(QK_FMA_2)                                                                                            \
  "vpsrld $24,%%zmm26,%%zmm24\n\t"                                                                                    \
  "vpermps %[table],%%zmm24,%%zmm24\n\t"                                                                              \
  "vpsrld $28,%%zmm26,%%zmm25\n\t"                                                                                    \
  "vpermps %[table],%%zmm25,%%zmm25\n\t"                                                                              \
  QK_ROWS_##rows(QK_FMA_3)                                                                                            \
  "add $16,%[p0]\n\t"                                                                                                 \
  "add $16,%[p3]\n\t"                                                                                                 \
  "add $16,%[p6]\n\t"                                                                                                 \
  "add $16,%[p9]\n\t"
#define QK_FLOAT_GROUP(rows, add)                                                                                     \
  __asm__ volatile(                                                                                                   \
    QK_ROWS_##rows(QK_ZERO)                                                                                           \
    "0:\n\t"                                                                                                          \
    "prefetcht0 1024(%[b])\n\t"                                                                                       \
    "vmovdqu32 (%[b]),%%zmm26\n\t"                                                                                    \
    QK_FLOAT_STEP(rows)                                                                                               \
    "add $64,%[b]\n\t"                                                                                                \
    "dec %[steps]\n\t"                                                                                                \
    "jnz 0b\n\t"                                                                                                      \
    QK_ROWS_##rows(add)                                                                                               \
    : [b] "+r"(b), [p0] "+r"(p0), [p3] "+r"(p3), [p6] "+r"(p6), [p9] "+r"(p9), [steps] "+r"(steps)                    \
    : [s] "r"(4 * stride), [terms] "r"(terms), [y] "r"(y), [table] "v"(table),                                        \
      [scale0] "v"(values.scale[0].v), [scale1] "v"(values.scale[1].v),                                               \
      [offset0] "v"(values.offset[0].v), [offset1] "v"(values.offset[1].v)                                            \
    : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",        \
      "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21",              \
      "xmm22", "xmm23", "xmm24", "xmm25", "xmm26")
// The same by pairs of bf16.
#define QK_PAIR_STEP(rows)                                                                                            \
  "vpshufb %[first],%%zmm26,%%zmm25\n\t"                                                                              \
  "vpermw %[table],%%zmm25,%%zmm24\n\t"                                                                               \
  "vpsrlw $4,%%zmm25,%%zmm25\n\t"                                                                                     \
  "vpermw %[table],%%zmm25,%%zmm25\n\t"                                                                               \
  QK_ROWS_##rows(QK_PAIR_0)                                                                                           \
  "vpshufb %[second],%%zmm26,%%zmm25\n\t"                                                                             \
  "vpermw %[table],%%zmm25,%%zmm24\n\t"                                                                               \
  "vpsrlw $4,%%zmm25,%%zmm25\n\t"                                                                                     \
  "vpermw %[table],%%zmm25,%%zmm25\n\t"                                                                               \
  QK_ROWS_##rows(QK_PAIR_1)                                                                                           \
  "add $8,%[p0]\n\t"                                                                                                  \
  "add $8,%[p3]\n\t"                                                                                                  \
  "add $8,%[p6]\n\t"                                                                                                  \
  "add $8,%[p9]\n\t"
#define QK_PAIR_GROUP(rows, add)                                                                                      \
  __asm__ volatile(                                                                                                   \
    QK_ROWS_##rows(QK_ZERO)                                                                                           \
    "0:\n\t"                                                                                                          \
    "prefetcht0 1024(%[b])\n\t"                                                                                       \
    "vmovdqu32 (%[b]),%%zmm26\n\t"                                                                                    \
    QK_PAIR_STEP(rows)                                                                                                \
    "add $64,%[b]\n\t"                                                                                                \
    "dec %[steps]\n\t"                                                                                                \
    "jnz 0b\n\t"                                                                                                      \
    QK_ROWS_##rows(add)                                                                                               \
    : [b] "+r"(b), [p0] "+r"(p0), [p3] "+r"(p3), [p6] "+r"(p6), [p9] "+r"(p9), [steps] "+r"(steps)                    \
    : [s] "r"(2 * stride), [terms] "r"(terms), [y] "r"(y), [table] "v"(table), [first] "m"(pairs.first),              \
      [second] "m"(pairs.second), [scale0] "v"(values.scale[0].v), [scale1] "v"(values.scale[1].v),                   \
      [offset0] "v"(values.offset[0].v), [offset1] "v"(values.offset[1].v)                                            \
    : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",        \
      "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21",              \
      "xmm22", "xmm23", "xmm24", "xmm25", "xmm26")
#define QK_CASE(rows)                                                                                                 \
  if constexpr (MR == rows) {                                                                                         \
    if constexpr (kAffine)                                                                                            \
      QK_GROUP(rows, QK_ZERO, QK_ADD_AFFINE);                                                                         \
    else                                                                                                              \
      QK_GROUP(rows, QK_START, QK_ADD);                                                                               \
  }
#define QK_FLOAT_CASE(rows)                                                                                           \
  if constexpr (MR == rows) {                                                                                         \
    if constexpr (kAffine)                                                                                            \
      QK_FLOAT_GROUP(rows, QK_ADD_AFFINE);                                                                            \
    else                                                                                                              \
      QK_FLOAT_GROUP(rows, QK_ADD);                                                                                   \
  }
#define QK_PAIR_CASE(rows)                                                                                            \
  if constexpr (MR == rows) {                                                                                         \
    if constexpr (kAffine)                                                                                            \
      QK_PAIR_GROUP(rows, QK_ADD_AFFINE);                                                                             \
    else                                                                                                              \
      QK_PAIR_GROUP(rows, QK_ADD);                                                                                    \
  }
// clang-format on

template <bool kAffine, int MR>
void tile(const int8_t* a, int64_t stride, const Int4Term* all_terms, int64_t term_stride, const Int4Panel& panel,
          float* y) {
  // High bits are not shifted down: their sums are exactly 16 times the true ones.
  const __m512i low_bits = _mm512_set1_epi8(0x0f), high_bits = _mm512_set1_epi8(static_cast<char>(0xf0));
  for_each_group(panel.k, panel.group_size, [=, &panel](int64_t first, int64_t last, int64_t group, int64_t term) {
    const GroupValues values(panel, group, kAffine);
    const uint8_t* b = panel.data + first * 16;
    const int8_t *p0 = a + first, *p3 = p0 + 3 * stride, *p6 = p3 + 3 * stride, *p9 = p6 + 3 * stride;
    const Int4Term* terms = all_terms + term * term_stride;
    int64_t steps = (last - first + 3) / 4;
    // clang-format off
    QK_CASE(1) QK_CASE(2) QK_CASE(3) QK_CASE(4) QK_CASE(5) QK_CASE(6)
    QK_CASE(7) QK_CASE(8) QK_CASE(9) QK_CASE(10) QK_CASE(11) QK_CASE(12)
    // clang-format on
  });
}

// What the bits of a code stand for, by the bits of the code and any above them.
template <int kBits, bool kAffine>
inline float value_of(int bits) {
  return static_cast<float>(bits % (1 << kBits) + (kAffine ? 8 : 0) - code_offset(kBits));
}

// A permutation looks the low 4 bits of each lane up.
template <int kBits, bool kAffine>
inline __m512 float_table() {
  alignas(64) float values[16];
  for (int i = 0; i < 16; ++i) values[i] = value_of<kBits, kAffine>(i);
  return _mm512_load_ps(values);
}

// The same for rows of floats.
template <bool kAffine, int MR>
void float_tile(const float* a, int64_t stride, const Int4Term* all_terms, int64_t term_stride, const Int4Panel& panel,
                float* y) {
  const __m512 table = float_table<4, kAffine>();
  for_each_group(panel.k, panel.group_size, [=, &panel](int64_t first, int64_t last, int64_t group, int64_t term) {
    const GroupValues values(panel, group, kAffine);
    const uint8_t* b = panel.data + first * 16;
    const float *p0 = a + first, *p3 = p0 + 3 * stride, *p6 = p3 + 3 * stride, *p9 = p6 + 3 * stride;
    const Int4Term* terms = all_terms + term * term_stride;
    int64_t steps = (last - first + 3) / 4;
    // clang-format off
    QK_FLOAT_CASE(1) QK_FLOAT_CASE(2) QK_FLOAT_CASE(3) QK_FLOAT_CASE(4) QK_FLOAT_CASE(5) QK_FLOAT_CASE(6)
    QK_FLOAT_CASE(7) QK_FLOAT_CASE(8) QK_FLOAT_CASE(9) QK_FLOAT_CASE(10) QK_FLOAT_CASE(11) QK_FLOAT_CASE(12)
    // clang-format on
  });
}

// A permutation looks the low 5 bits of each word up: a code, and bits of its neighbours, which are ignored.
template <int kBits, bool kAffine>
inline __m512i bf16_table() {
  alignas(64) uint16_t values[32];
  for (int i = 0; i < 32; ++i) {
    const float value = value_of<kBits, kAffine>(i);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    values[i] = static_cast<uint16_t>(bits >> 16);
  }
  return _mm512_load_si512(values);
}

// Of the 4 bytes of a channel, the second and the first, and the fourth and the third, each in a word.
struct BytesOfPairs {
  __m512i first, second;
};
inline BytesOfPairs bytes_of_pairs() {
  const __m512i of_lane = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
  return {_mm512_add_epi8(of_lane, _mm512_set1_epi32(0x00000101)),
          _mm512_add_epi8(of_lane, _mm512_set1_epi32(0x02020303))};
}

// The same for rows of bf16 whose pairs are swapped, so that a dot product, which adds the second product of a pair
// first, adds them in the order of k. Products of bf16 and codes are exact in fp32: so results are those of float_tile,
// but where numbers below the smallest normal one occur, which dot products take for 0.
template <bool kAffine, int MR>
void bf16_tile(const uint16_t* a, int64_t stride, const Int4Term* all_terms, int64_t term_stride,
               const Int4Panel& panel, float* y) {
  const __m512i table = bf16_table<4, kAffine>();
  const BytesOfPairs pairs = bytes_of_pairs();
  for_each_group(panel.k, panel.group_size, [=, &panel](int64_t first, int64_t last, int64_t group, int64_t term) {
    const GroupValues values(panel, group, kAffine);
    const uint8_t* b = panel.data + first * 16;
    const uint16_t *p0 = a + first, *p3 = p0 + 3 * stride, *p6 = p3 + 3 * stride, *p9 = p6 + 3 * stride;
    const Int4Term* terms = all_terms + term * term_stride;
    int64_t steps = (last - first + 3) / 4;
    // clang-format off
    QK_PAIR_CASE(1) QK_PAIR_CASE(2) QK_PAIR_CASE(3) QK_PAIR_CASE(4) QK_PAIR_CASE(5) QK_PAIR_CASE(6)
    QK_PAIR_CASE(7) QK_PAIR_CASE(8) QK_PAIR_CASE(9) QK_PAIR_CASE(10) QK_PAIR_CASE(11) QK_PAIR_CASE(12)
    // clang-format on
  });
}

void swap_pairs(const uint16_t* x, int64_t k, uint16_t* row) {
  int64_t i = 0;
  for (; i + 32 <= k; i += 32) _mm512_storeu_si512(row + i, _mm512_rol_epi32(_mm512_loadu_si512(x + i), 16));
  for (; i < k; i += kBlock)
    for (int j = 0; j < kBlock; ++j) row[i + j] = (i + (j ^ 1)) < k ? x[i + (j ^ 1)] : uint16_t{0};
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
