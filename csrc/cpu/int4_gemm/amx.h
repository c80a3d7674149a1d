// The int4 GEMM of the amx path: a group's weights become bytes once, and all rows meet them in tiles.
#include "cpu/int4_gemm/groups.h"
#include "cpu/int8_gemm/amx.h"

namespace qkernels::QK_NAMESPACE {
namespace {

#ifdef QK_HAS_AMX
// The packed weights of `groups` times 4 k, as packed int8 weights of 0 to 15 are.
inline void widen_weights(const uint8_t* packed, int64_t groups, int8_t* weights) {
  const __m512i low_bits = _mm512_set1_epi8(0x0f);
  for (int64_t g = 0; g < groups; ++g, packed += 64, weights += kPanel * 4) {
    const __m512i both = _mm512_loadu_si512(packed);
    _mm512_store_si512(weights, _mm512_and_si512(both, low_bits));
    _mm512_store_si512(weights + 64, _mm512_and_si512(_mm512_srli_epi16(both, 4), low_bits));
  }
}

// Adds the products of all rows to y, whose blocks of `height` rows begin where the rows' blocks do.
template <bool kAffine>
void add_products(const int8_t* rows, int64_t row_stride, const Int4Term* all_terms, int64_t term_stride,
                  const std::vector<int64_t>& blocks, int64_t height, const Int4Panel& panel, const AmxRun& run,
                  float* y) {
  constexpr int64_t kLine = 64;
  std::vector<int8_t> memory(static_cast<size_t>(run.tiles * run.tile_bytes() + kLine));  // zeros behind the end
  int8_t* weights = memory.data() + (kLine - reinterpret_cast<uintptr_t>(memory.data()) % kLine);
  std::vector<AmxStep> steps(static_cast<size_t>(run.tiles));
  alignas(64) const int32_t zeros[kPanel] = {};
  alignas(64) int32_t sums[2 * kAmxRows * kPanel];
  AmxTiles tiles(run);
  tiles.set_rows(height);
  const int64_t count = static_cast<int64_t>(blocks.size());
  for_each_group(panel.k, panel.group_size, [&](int64_t first, int64_t last, int64_t group, int64_t term) {
    const GroupValues values(panel, group, kAffine);
    const Int4Term* terms = all_terms + term * term_stride;
    widen_weights(panel.data + first * 16, k_groups(last - first), weights);
    for (int64_t t = 0; t < run.tiles; ++t)
      steps[static_cast<size_t>(t)] = {first + t * run.groups * 4, weights + t * run.tile_bytes()};
    for (int64_t i = 0; i < count; i += 2) {
      const int64_t together = std::min<int64_t>(2, count - i);
      const uint8_t* at[2];
      for (int64_t b = 0; b < together; ++b)
        at[b] = reinterpret_cast<const uint8_t*>(rows) + blocks[static_cast<size_t>(i + b)] * row_stride;
      multiply_tiles<true>(together, true, at, row_stride, steps.data(), run.tiles, zeros, sums);
      for (int64_t b = 0; b < together; ++b)
        for (int64_t r = 0; r < height; ++r) {
          const Int4Term of_row = terms[blocks[static_cast<size_t>(i + b)] + r];
          const __m512i start = _mm512_set1_epi32(of_row.start);
          for (int h = 0; h < 2; ++h) {
            const __m512i dot = _mm512_load_si512(sums + (b * kAmxRows + r) * kPanel + h * 16);
            add_group<kAffine>(values, h, of_row, F32{_mm512_cvtepi32_ps(_mm512_add_epi32(dot, start))},
                               y + ((i + b) * height + r) * kPanel + h * 16);
          }
        }
    }
  });
}
#endif

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
