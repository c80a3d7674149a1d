// The int8 GEMM kernels of one path, and their table. The compiler vectorizes what is not written with intrinsics.
#include "cpu/int8_gemm/amx.h"
#include "cpu/int8_gemm/epilogue.h"
#include "cpu/int8_gemm/pack.h"
#include "cpu/int8_gemm/rows.h"
#include "cpu/int8_gemm/tile.h"
#include "cpu/int8_gemm/unpacked.h"

namespace qkernels::QK_NAMESPACE {
namespace {

using Tile = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, int32_t*);

template <int... MR>
constexpr std::array<Tile, sizeof...(MR)> make_tiles(std::integer_sequence<int, MR...>) {
  return {tile<MR + 1>...};
}
constexpr auto kTiles = make_tiles(std::make_integer_sequence<int, kTileRows>());

void multiply(const uint8_t* rows, int64_t row_stride, int64_t m, const int8_t* panel, int64_t k,
              const PanelOutput& output) {
  const ChannelValues channels(output);
  alignas(64) int32_t sums[kTileRows * kPanel];
  // Blocks of equal height: 16 rows run as 8 + 8, not as 12 + 4.
  const int64_t blocks = (m + kTileRows - 1) / kTileRows;
  for (int64_t i = 0, row = 0; i < blocks; ++i) {
    const int64_t height = (m - row) / (blocks - i);
    kTiles[height - 1](rows + row * row_stride, row_stride, panel, k_groups(k), sums);
#if QK_PATH != QK_PATH_SCALAR
    // The next panel, which as a rule follows in memory: weights of 1 MiB from the third-level cache times 32 rows took
    // 264 us without this and 230 with it. With fewer rows, weights that are in the second-level cache lose 5 % by it.
    if (blocks > 2) {
      const int64_t bytes = panel_bytes(k);
      for (int64_t at = (bytes * i / blocks) & ~int64_t{63}; at < bytes * (i + 1) / blocks; at += 64)
        _mm_prefetch(reinterpret_cast<const char*>(panel + bytes + at), _MM_HINT_T1);
    }
#endif
    finish(sums, height, row, kFlip, channels, output);
    row += height;
  }
}

constexpr Int8Kernels kKernels = {kIsa,         kFlip,       kTileRows, kUnpackedRows,    copy_codes,
                                  quantize_row, pack_panels, multiply,  multiply_unpacked};

#if QK_PATH == QK_PATH_AVX512VNNI && defined(QK_HAS_AMX)
// The same by tiles of equal height; the last one overlaps the one before it, whose results it gives once more.
void multiply_amx(const uint8_t* rows, int64_t row_stride, int64_t m, const int8_t* panel, int64_t k,
                  const PanelOutput& output) {
  const AmxRun run(k_groups(k));
  const int64_t count = (m + kAmxRows - 1) / kAmxRows, height = (m + count - 1) / count;
  if (!amx_pays(count, run.tiles, m, k_groups(k))) return multiply(rows, row_stride, m, panel, k, output);
  const ChannelValues channels(output);
  std::vector<AmxStep> steps(static_cast<size_t>(run.tiles));
  for (int64_t t = 0; t < run.tiles; ++t)
    steps[static_cast<size_t>(t)] = {t * run.groups * 4, panel + t * run.tile_bytes()};
  alignas(64) int8_t padded[kAmxGroups * kPanel * 4];
  if (run.padded()) {
    run.pad(steps.back().weights, padded);
    steps.back().weights = padded;
  }
  AmxTiles tiles(run);
  tiles.set_rows(height);
  alignas(64) const int32_t zeros[kPanel] = {};
  alignas(64) int32_t sums[2 * kAmxRows * kPanel];
  for (int64_t i = 0; i < count; i += 2) {
    const int64_t blocks = std::min<int64_t>(2, count - i);
    const int64_t first[2] = {std::min(i * height, m - height), std::min((i + 1) * height, m - height)};
    const uint8_t* const at[2] = {rows + first[0] * row_stride, rows + first[1] * row_stride};
    multiply_tiles(blocks, output.channels > 16, at, row_stride, steps.data(), run.tiles, zeros, sums);
    for (int64_t b = 0; b < blocks; ++b)
      finish(sums + b * kAmxRows * kPanel, height, first[b], kFlip, channels, output);
  }
}

constexpr Int8Kernels kAmxKernels = {Isa::amx,     kFlip,       2 * kAmxRows, kUnpackedRows,    copy_codes,
                                     quantize_row, pack_panels, multiply_amx, multiply_unpacked};
#endif

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
