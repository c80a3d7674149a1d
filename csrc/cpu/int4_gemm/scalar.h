// The int4 GEMM tiles of the scalar path.
#include "cpu/int4_gemm/groups.h"

namespace qkernels::QK_NAMESPACE {
namespace {

constexpr Isa kIsa = Isa::scalar;
constexpr int kTileRows = 4;
constexpr int kFloatTileRows = 4;

// Adds the products of MR rows of codes and one panel to y[MR][32].
template <bool kAffine, int MR>
void tile(const int8_t* a, int64_t stride, const Int4Term* terms, int64_t term_stride, const Int4Panel& panel,
          float* y) {
  for_each_group(panel.k, panel.group_size, [&](int64_t first, int64_t last, int64_t group, int64_t term) {
    int32_t sums[MR][kPanel];
    for (int r = 0; r < MR; ++r)
      for (int c = 0; c < kPanel; ++c) sums[r][c] = terms[term * term_stride + r].start;
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

// The same for rows of floats.
template <bool kAffine, int MR>
void float_tile(const float* a, int64_t stride, const Int4Term* terms, int64_t term_stride, const Int4Panel& panel,
                float* y) {
  const int32_t lowest = kAffine ? 0 : -8;
  for_each_group(panel.k, panel.group_size, [&](int64_t first, int64_t last, int64_t group, int64_t term) {
    alignas(32) float sums[MR][kPanel] = {};
    const uint8_t* b = panel.data + first * 16;
    for (int64_t i = first; i < last; i += 4, b += 64) {
      for (int r = 0; r < MR; ++r)
        for (int j = 0; j < 4; ++j) {
          const float x = a[r * stride + i + j];
          for (int c = 0; c < 16; ++c) {
            sums[r][c] += x * static_cast<float>((b[c * 4 + j] & 15) + lowest);
            sums[r][c + 16] += x * static_cast<float>((b[c * 4 + j] >> 4) + lowest);
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

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
