// The int8 GEMM kernels of one path, and their table. The compiler vectorizes what is not written with intrinsics.
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

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
