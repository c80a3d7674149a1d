// The int4 GEMM kernels of one instruction-set path. Included once per path by foreach_gemm_isa.h, inside that path's
// target region and namespace, after vec.h, with QK_PATH naming it.

#if QK_PATH == QK_PATH_AVX512VNNI
constexpr Isa kIsa = Isa::avx512vnni;
constexpr int kTileRows = 12;
constexpr int kFloatTileRows = 12;
#elif QK_PATH == QK_PATH_AVX2
constexpr Isa kIsa = Isa::avx2;
constexpr int kTileRows = 4;
constexpr int kFloatTileRows = 4;
#else
constexpr Isa kIsa = Isa::scalar;
constexpr int kTileRows = 4;
constexpr int kFloatTileRows = 4;
#endif

// Calls f(first k, end, index of scale, index of term) for each group of a row, in parts of at most kMaxGroup.
template <typename F>
inline void for_each_group(int64_t k, int64_t group_size, F f) {
  int64_t term = 0, group = 0;
  for (int64_t first = 0; first < k; first += group_size, ++group)
    for (int64_t part = first; part < first + group_size; part += kMaxGroup)
      f(part, std::min(part + kMaxGroup, first + group_size), group, term++);
}

// 16 scales, minima or zero points of a panel, from `at` on.
inline F32 load_values(const void* values, Element type, int64_t at) {
  switch (type) {
    case Element::bf16: return F32::load(static_cast<const BFloat16*>(values) + at);
    case Element::f16: return F32::load(static_cast<const Half*>(values) + at);
    default: return F32::load(static_cast<const float*>(values) + at);
  }
}

// The scale, and the value of code -8, of the 16 channels of half a panel in one group.
struct GroupValues {
  F32 scale[2], offset[2];

  GroupValues(const Int4Panel& panel, int64_t group, bool affine) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const int64_t at = group * kPanel + h * 16;
      scale[h] = load_values(panel.scale, panel.type, at);
      offset[h] = F32::set1(0);
      if (!affine) continue;
      if (panel.minimum)
        offset[h] = load_values(panel.minimum, panel.type, at);
      else
        offset[h] = (F32::set1(-8) - F32::load(panel.zero_point + at)) * scale[h];
    }
  }
};

// y[16] += offset * sum + scale * dot, in this order: 16 channels of a row in one group.
template <bool kAffine>
inline void add_group(const GroupValues& values, int h, const Int4Term& term, F32 dot, float* y) {
  F32 total = F32::load(y);
  if constexpr (kAffine) total = total + values.offset[h] * F32::set1(term.sum);
  (total + values.scale[h] * dot).store(y);
}

// y[MR][32] += the products of MR rows of codes and one panel.
#if QK_PATH == QK_PATH_AVX512VNNI
// A group's products are one block of assembly, as GCC 12 spills the sums of a tile when it sees what becomes of them:
// 8 rows, groups of 128, one thread: 68 to 150 GOPS from intrinsics, 400 from this. Weights are fetched 1 KiB ahead:
// 270 GOPS without where they come from beyond the second-level cache.
// Row r's sums are zmm(2r) for channels 0 to 15 and zmm(2r + 1) for 16 to 31; 24 and 25 hold weights, then go free.
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
// -8 * sum of the row's codes; of the high bits 16 times that.
#define QK_START(low, high, codes, r)                                                                                 \
  "vpbroadcastd 4*" #r "(%[terms]),%%zmm" #low "\n\t"                                                                 \
  "vpslld $4,%%zmm" #low ",%%zmm" #high "\n\t"
#define QK_DOTS(low, high, codes, r)                                                                                  \
  "vpdpbusd " codes "%{1to16%},%%zmm24,%%zmm" #low "\n\t"                                                             \
  "vpdpbusd " codes "%{1to16%},%%zmm25,%%zmm" #high "\n\t"
#define QK_TO_FLOATS(low, high, codes, r)                                                                             \
  "vpsrad $4,%%zmm" #high ",%%zmm" #high "\n\t"                                                                       \
  "vcvtdq2ps %%zmm" #low ",%%zmm" #low "\n\t"                                                                         \
  "vcvtdq2ps %%zmm" #high ",%%zmm" #high "\n\t"
// The same for floats, of the first to the fourth of 4 k.
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
  "vmulps 4*" #r "(%[terms])%{1to16%},%[offset0],%%zmm24\n\t"                                                         \
  "vmulps 4*" #r "(%[terms])%{1to16%},%[offset1],%%zmm25\n\t"                                                         \
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
#define QK_FLOAT_GROUP(rows, add)                                                                                     \
  __asm__ volatile(                                                                                                   \
    QK_ROWS_##rows(QK_ZERO)                                                                                           \
    "0:\n\t"                                                                                                          \
    "prefetcht0 1024(%[b])\n\t"                                                                                       \
    "vmovdqu32 (%[b]),%%zmm26\n\t"                                                                                    \
    "vpermps %[table],%%zmm26,%%zmm24\n\t"                                                                            \
    "vpsrld $4,%%zmm26,%%zmm25\n\t"                                                                                   \
    "vpermps %[table],%%zmm25,%%zmm25\n\t"                                                                            \
    QK_ROWS_##rows(QK_FMA_0)                                                                                          \
    "vpsrld $8,%%zmm26,%%zmm24\n\t"                                                                                   \
    "vpermps %[table],%%zmm24,%%zmm24\n\t"                                                                            \
    "vpsrld $12,%%zmm26,%%zmm25\n\t"                                                                                  \
    "vpermps %[table],%%zmm25,%%zmm25\n\t"                                                                            \
    QK_ROWS_##rows(QK_FMA_1)                                                                                          \
    "vpsrld $16,%%zmm26,%%zmm24\n\t"                                                                                  \
    "vpermps %[table],%%zmm24,%%zmm24\n\t"                                                                            \
    "vpsrld $20,%%zmm26,%%zmm25\n\t"                                                                                  \
    "vpermps %[table],%%zmm25,%%zmm25\n\t"                                                                            \
    QK_ROWS_##rows(QK_FMA_2)                                                                                          \
    "vpsrld $24,%%zmm26,%%zmm24\n\t"                                                                                  \
    "vpermps %[table],%%zmm24,%%zmm24\n\t"                                                                            \
    "vpsrld $28,%%zmm26,%%zmm25\n\t"                                                                                  \
    "vpermps %[table],%%zmm25,%%zmm25\n\t"                                                                            \
    QK_ROWS_##rows(QK_FMA_3)                                                                                          \
    "add $64,%[b]\n\t"                                                                                                \
    "add $16,%[p0]\n\t"                                                                                               \
    "add $16,%[p3]\n\t"                                                                                               \
    "add $16,%[p6]\n\t"                                                                                               \
    "add $16,%[p9]\n\t"                                                                                               \
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
// clang-format on

template <bool kAffine, int MR>
void tile(const int8_t* a, int64_t stride, const Int4Term* all_terms, int64_t term_stride, const Int4Panel& panel,
          float* y) {
  // High bits stay where they are: their sums are 16 times the true ones, exactly.
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
#elif QK_PATH == QK_PATH_AVX2
// Pairs of products fit int16, and so do sums of 8 pairs: 8 * 2 * 15 * 128 < 2^15.
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
      for (int strip = 0; strip < 16; strip += 8) {  // channels strip… and 16 + strip…, 8 of each
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
#else
template <bool kAffine, int MR>
void tile(const int8_t* a, int64_t stride, const Int4Term* terms, int64_t term_stride, const Int4Panel& panel,
          float* y) {
  for_each_group(panel.k, panel.group_size, [&](int64_t first, int64_t last, int64_t group, int64_t term) {
    int32_t sums[MR][kPanel];
    for (int r = 0; r < MR; ++r)
      for (int c = 0; c < kPanel; ++c) sums[r][c] = kAffine ? 0 : terms[term * term_stride + r].start;
    const uint8_t* b = panel.data + first * 16;
    for (int64_t i = first; i < last; i += 4, b += 64)
      for (int r = 0; r < MR; ++r) {
        const int8_t* codes = a + r * stride + i;
        for (int c = 0; c < 16; ++c)
          for (int j = 0; j < 4; ++j) {
            sums[r][c] += codes[j] * (b[c * 4 + j] & 15);
            sums[r][c + 16] += codes[j] * (b[c * 4 + j] >> 4);
          }
      }
    const GroupValues values(panel, group, kAffine);
    for (int r = 0; r < MR; ++r)
      for (int h = 0; h < 2; ++h)
        add_group<kAffine>(values, h, terms[term * term_stride + r], F32::load(sums[r] + h * 16),
                           y + r * kPanel + h * 16);
  });
}
#endif

// The same for rows of floats.
#if QK_PATH == QK_PATH_AVX512VNNI
template <bool kAffine, int MR>
void float_tile(const float* a, int64_t stride, const Int4Term* all_terms, int64_t term_stride, const Int4Panel& panel,
                float* y) {
  // A permutation by the low 4 bits of each lane is a table of the 16 codes.
  alignas(64) float codes[16];
  for (int i = 0; i < 16; ++i) codes[i] = static_cast<float>(kAffine ? i : i - 8);
  const __m512 table = _mm512_load_ps(codes);
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
#else
template <bool kAffine, int MR>
void float_tile(const float* a, int64_t stride, const Int4Term* terms, int64_t term_stride, const Int4Panel& panel,
                float* y) {
  const int32_t lowest = kAffine ? 0 : -8;
  for_each_group(panel.k, panel.group_size, [&](int64_t first, int64_t last, int64_t group, int64_t term) {
    alignas(32) float sums[MR][kPanel] = {};
    const uint8_t* b = panel.data + first * 16;
    for (int64_t i = first; i < last; i += 4, b += 64) {
#if QK_PATH == QK_PATH_AVX2
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
#else
      for (int r = 0; r < MR; ++r)
        for (int j = 0; j < 4; ++j) {
          const float x = a[r * stride + i + j];
          for (int c = 0; c < 16; ++c) {
            sums[r][c] += x * static_cast<float>((b[c * 4 + j] & 15) + lowest);
            sums[r][c + 16] += x * static_cast<float>((b[c * 4 + j] >> 4) + lowest);
          }
        }
#endif
    }
    const GroupValues values(panel, group, kAffine);
    for (int r = 0; r < MR; ++r)
      for (int h = 0; h < 2; ++h)
        add_group<kAffine>(values, h, terms[term * term_stride + r], F32::load(sums[r] + h * 16),
                           y + r * kPanel + h * 16);
  });
}
#endif

template <typename X>
using Tile = void (*)(const X*, int64_t, const Int4Term*, int64_t, const Int4Panel&, float*);

template <bool kAffine, int... MR>
constexpr std::array<Tile<int8_t>, sizeof...(MR)> make_tiles(std::integer_sequence<int, MR...>) {
  return {tile<kAffine, MR + 1>...};
}
template <bool kAffine, int... MR>
constexpr std::array<Tile<float>, sizeof...(MR)> make_float_tiles(std::integer_sequence<int, MR...>) {
  return {float_tile<kAffine, MR + 1>...};
}
using TileRows = std::make_integer_sequence<int, kTileRows>;
using FloatTileRows = std::make_integer_sequence<int, kFloatTileRows>;
constexpr std::array<Tile<int8_t>, kTileRows> kTiles[2] = {make_tiles<false>(TileRows()), make_tiles<true>(TileRows())};
constexpr std::array<Tile<float>, kFloatTileRows> kFloatTiles[2] = {make_float_tiles<false>(FloatTileRows()),
                                                                    make_float_tiles<true>(FloatTileRows())};

template <typename T>
inline void store_row(F32 v, int64_t n, T* out) {
  if constexpr (std::is_same_v<T, BFloat16>)
    v = select(is_nan(v), F32::set1(std::numeric_limits<float>::quiet_NaN()), v);
  if (n == 16)
    v.store(out);
  else
    v.store(out, n);
}

// What becomes of y[rows][32].
inline void finish(const float* y, int64_t rows, int64_t first_row, const Int4Output& o) {
  for (int64_t h = 0; h < kPanel && h < o.channels; h += 16) {
    const int64_t n = std::min<int64_t>(16, o.channels - h);
    auto channel_values = [&](const float* values) {
      return n == 16 ? F32::load(values + h) : F32::load(values + h, n);
    };
    const F32 bias = o.bias ? channel_values(o.bias) : F32::set1(0);
    const F32 weight_sum = o.zero_point ? channel_values(o.weight_sum) : F32::set1(0);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = first_row + r, at = row * o.row_stride + h;
      F32 v = F32::load(y + r * kPanel + h);
      if (o.zero_point) v = v - F32::set1(static_cast<float>(o.zero_point[row * o.zero_point_step])) * weight_sum;
      if (o.scale) v = v * F32::set1(o.scale[row * o.scale_step]);
      if (o.bias) v = v + bias;
      switch (o.type) {
        case Element::bf16: store_row(v, n, static_cast<BFloat16*>(o.out) + at); break;
        case Element::f16: store_row(v, n, static_cast<Half*>(o.out) + at); break;
        default: store_row(v, n, static_cast<float*>(o.out) + at);
      }
    }
  }
}

template <typename X, typename Tiles>
inline void multiply_by(const Tiles& tiles, const X* rows, int64_t row_stride, const Int4Term* terms,
                        int64_t term_stride, int64_t m, const Int4Panel& panel, const Int4Output& output) {
  alignas(64) float y[std::tuple_size_v<Tiles> * kPanel];
  const int64_t most = tiles.size(), blocks = (m + most - 1) / most;
  for (int64_t i = 0, row = 0; i < blocks; ++i) {  // of equal height
    const int64_t height = (m - row) / (blocks - i);
    std::memset(y, 0, static_cast<size_t>(height) * kPanel * sizeof(float));
    tiles[static_cast<size_t>(height) - 1](rows + row * row_stride, row_stride, terms + row, term_stride, panel, y);
    finish(y, height, row, output);
    row += height;
  }
}

void multiply(const int8_t* rows, int64_t row_stride, const Int4Term* terms, int64_t term_stride, int64_t m,
              const Int4Panel& panel, const Int4Output& output) {
  multiply_by(kTiles[panel.affine()], rows, row_stride, terms, term_stride, m, panel, output);
}

void multiply_float(const float* rows, int64_t row_stride, const Int4Term* terms, int64_t term_stride, int64_t m,
                    const Int4Panel& panel, const Int4Output& output) {
  multiply_by(kFloatTiles[panel.affine()], rows, row_stride, terms, term_stride, m, panel, output);
}

void pack_panel(const int8_t* q, int64_t stride_n, int64_t stride_k, int64_t channels, int64_t k, uint8_t* data) {
  const int64_t whole = channels == kPanel && stride_k == 1 ? k / 4 : 0;
  for (int64_t g = 0; g < whole; ++g)
    for (int64_t c = 0; c < 16; ++c) {
      uint32_t low, high;  // 4 codes of a channel, and of the one 16 further
      std::memcpy(&low, q + c * stride_n + g * 4, 4);
      std::memcpy(&high, q + (c + 16) * stride_n + g * 4, 4);
      constexpr uint32_t kOffset = 0x08080808, kBits = 0x0f0f0f0f;  // + 8 flips the highest of 4 bits
      const uint32_t both = ((low & kBits) ^ kOffset) | ((high & kBits) ^ kOffset) << 4;
      std::memcpy(data + g * 64 + c * 4, &both, 4);
    }
  std::memset(data + whole * 64, 0, static_cast<size_t>((k_groups(k) - whole) * 64));
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = whole * 4; i < k; ++i) {
      const uint8_t code = static_cast<uint8_t>((q[c * stride_n + i * stride_k] + 8) & 15);
      data[i / 4 * 64 + c % 16 * 4 + (i & 3)] |= static_cast<uint8_t>(c < 16 ? code : code << 4);
    }
}

void unpack_panel(const uint8_t* data, int64_t channels, int64_t k, int8_t* q) {
  for (int64_t c = 0; c < channels; ++c) {
    const uint8_t* from = data + c % 16 * 4;
    const int shift = c < 16 ? 0 : 4;
    int64_t i = 0;
    for (; i + 4 <= k; i += 4) {
      uint32_t word;
      std::memcpy(&word, from + i * 16, 4);
      for (int j = 0; j < 4; ++j) q[c * k + i + j] = static_cast<int8_t>((word >> (8 * j + shift) & 15) - 8);
    }
    for (; i < k; ++i) q[c * k + i] = static_cast<int8_t>((from[i / 4 * 64 + (i & 3)] >> shift & 15) - 8);
  }
}

void code_terms(const int8_t* row, int64_t k, int64_t group_size, bool affine, Int4Term* terms, int64_t term_stride) {
  for_each_group(k, group_size, [&](int64_t first, int64_t last, int64_t, int64_t term) {
    int32_t sum = 0;
    for (int64_t i = first; i < last; ++i) sum += row[i];
    if (affine)
      terms[term * term_stride].sum = static_cast<float>(sum);
    else
      terms[term * term_stride].start = -8 * sum;
  });
}

void float_terms(const float* row, int64_t k, int64_t group_size, Int4Term* terms, int64_t term_stride) {
  for_each_group(k, group_size, [&](int64_t first, int64_t last, int64_t, int64_t term) {
    F32 sums = F32::set1(0);
    int64_t i = first;
    for (; i + 16 <= last; i += 16) sums = sums + F32::load(row + i);
    if (i < last) sums = sums + F32::load(row + i, last - i);
    float lanes[16];
    sums.store(lanes);
    for (int width = 8; width > 0; width /= 2)
      for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    terms[term * term_stride].sum = lanes[0];
  });
}

template <typename S>
inline void widen(const S* x, int64_t k, float* row) {
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) F32::load(x + i).store(row + i);
  if (i < k) F32::load(x + i, k - i).store(row + i, k - i);
  for (i = k; i & 3; ++i) row[i] = 0;
}

void widen_row(const void* x, Element type, int64_t k, float* row) {
  switch (type) {
    case Element::bf16: return widen(static_cast<const BFloat16*>(x), k, row);
    case Element::f16: return widen(static_cast<const Half*>(x), k, row);
    default: return widen(static_cast<const float*>(x), k, row);
  }
}

constexpr Int4Kernels kKernels = {kIsa,       kTileRows, kFloatTileRows, pack_panel, unpack_panel,
                                  code_terms, widen_row, float_terms,    multiply,   multiply_float};
