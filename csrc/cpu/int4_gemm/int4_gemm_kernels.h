// The int4 GEMM kernels of one path, and their table.
#include "cpu/int4_gemm/epilogue.h"
#include "cpu/int4_gemm/pack.h"
#include "cpu/int4_gemm/rows.h"
#include "cpu/int4_gemm/tile.h"
#if QK_PATH == QK_PATH_AVX512VNNI
#include "cpu/int4_gemm/amx.h"
#endif

namespace qkernels::QK_NAMESPACE {
namespace {

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
#if QK_PATH == QK_PATH_AVX512VNNI
template <bool kAffine, int... MR>
constexpr std::array<Tile<uint16_t>, sizeof...(MR)> make_bf16_tiles(std::integer_sequence<int, MR...>) {
  return {bf16_tile<kAffine, MR + 1>...};
}
template <int kBits, bool kAffine, int... MR>
constexpr std::array<Tile<int8_t>, sizeof...(MR)> make_low_bit_tiles(std::integer_sequence<int, MR...>) {
  return {low_bit_tile<kBits, kAffine, MR + 1>...};
}
template <typename X, int kBits, bool kAffine, int... MR>
constexpr std::array<Tile<X>, sizeof...(MR)> make_low_bit_float_tiles(std::integer_sequence<int, MR...>) {
  return {low_bit_float_tile<kBits, kAffine, MR + 1, X>...};
}
#endif
using TileRows = std::make_integer_sequence<int, kTileRows>;
using FloatTileRows = std::make_integer_sequence<int, kFloatTileRows>;
constexpr std::array<Tile<int8_t>, kTileRows> kTiles[2] = {make_tiles<false>(TileRows()), make_tiles<true>(TileRows())};
constexpr std::array<Tile<float>, kFloatTileRows> kFloatTiles[2] = {make_float_tiles<false>(FloatTileRows()),
                                                                    make_float_tiles<true>(FloatTileRows())};

template <typename X, typename Tiles>
inline void multiply_by(const Tiles& tiles, const X* rows, int64_t row_stride, const Int4Term* terms,
                        int64_t term_stride, int64_t m, const Int4Panel& panel, const Int4Output& output) {
  alignas(64) float y[std::tuple_size_v<Tiles> * kPanel];
  const int64_t most = tiles.size(), blocks = (m + most - 1) / most;
  for (int64_t i = 0, row = 0; i < blocks; ++i) {  // blocks of equal height
    const int64_t height = (m - row) / (blocks - i);
    std::memset(y, 0, static_cast<size_t>(height) * kPanel * sizeof(float));
    tiles[static_cast<size_t>(height) - 1](rows + row * row_stride, row_stride, terms + row, term_stride, panel, y);
    finish(y, height, row, output);
    row += height;
  }
}

#if QK_PATH == QK_PATH_AVX512VNNI
constexpr std::array<Tile<int8_t>, kTileRows> kLowBitTiles[2][2] = {
    {make_low_bit_tiles<2, false>(TileRows()), make_low_bit_tiles<2, true>(TileRows())},
    {make_low_bit_tiles<3, false>(TileRows()), make_low_bit_tiles<3, true>(TileRows())}};
template <typename X>
constexpr std::array<Tile<X>, kFloatTileRows> kLowBitFloatTiles[2][2] = {
    {make_low_bit_float_tiles<X, 2, false>(FloatTileRows()), make_low_bit_float_tiles<X, 2, true>(FloatTileRows())},
    {make_low_bit_float_tiles<X, 3, false>(FloatTileRows()), make_low_bit_float_tiles<X, 3, true>(FloatTileRows())}};
#endif

void multiply(const int8_t* rows, int64_t row_stride, const Int4Term* terms, int64_t term_stride, int64_t m,
              const Int4Panel& panel, const Int4Output& output) {
#if QK_PATH == QK_PATH_AVX512VNNI
  const auto& tiles = panel.bits == 4 ? kTiles[panel.affine()] : kLowBitTiles[panel.bits - 2][panel.affine()];
#else
  const auto& tiles = kTiles[panel.affine()];
#endif
#if QK_PATH == QK_PATH_SCALAR
  std::vector<uint8_t> memory;
  multiply_by(tiles, rows, row_stride, terms, term_stride, m, in_int4(panel, 0, memory), output);
#else
  multiply_by(tiles, rows, row_stride, terms, term_stride, m, panel, output);
#endif
}

void multiply_float(const float* rows, int64_t row_stride, const Int4Term* terms, int64_t term_stride, int64_t m,
                    const Int4Panel& panel, const Int4Output& output) {
#if QK_PATH == QK_PATH_AVX512VNNI
  const auto& tiles =
      panel.bits == 4 ? kFloatTiles[panel.affine()] : kLowBitFloatTiles<float>[panel.bits - 2][panel.affine()];
#else
  const auto& tiles = kFloatTiles[panel.affine()];
#endif
#if QK_PATH == QK_PATH_SCALAR
  std::vector<uint8_t> memory;
  multiply_by(tiles, rows, row_stride, terms, term_stride, m, in_int4(panel, 8 - code_offset(panel.bits), memory),
              output);
#else
  multiply_by(tiles, rows, row_stride, terms, term_stride, m, panel, output);
#endif
}

#if QK_PATH == QK_PATH_AVX512VNNI
constexpr std::array<Tile<uint16_t>, kFloatTileRows> kBf16Tiles[2] = {make_bf16_tiles<false>(FloatTileRows()),
                                                                      make_bf16_tiles<true>(FloatTileRows())};

void multiply_bf16(const uint16_t* rows, int64_t row_stride, const Int4Term* terms, int64_t term_stride, int64_t m,
                   const Int4Panel& panel, const Int4Output& output) {
  const auto& tiles =
      panel.bits == 4 ? kBf16Tiles[panel.affine()] : kLowBitFloatTiles<uint16_t>[panel.bits - 2][panel.affine()];
  multiply_by(tiles, rows, row_stride, terms, term_stride, m, panel, output);
}
#else
constexpr std::nullptr_t swap_pairs = nullptr, multiply_bf16 = nullptr;
#endif

constexpr Int4Kernels kKernels = {kIsa,      kTileRows,   kFloatTileRows, pack_panel,     unpack_panel, code_terms,
                                  widen_row, float_terms, multiply,       multiply_float, swap_pairs,   multiply_bf16};

#if QK_PATH == QK_PATH_AVX512VNNI && defined(QK_HAS_AMX)
// Whether tiles take less time: for a panel, widening 4 k of its weights takes 6 cycles, and scaling a block's sums at
// each group as long as 4 steps.
inline bool tiles_pay(int64_t blocks, const AmxRun& run, int64_t m, const Int4Panel& panel) {
  const int64_t steps = panel.k / panel.group_size * (run.tiles + 4), groups = k_groups(panel.k);
  return amx_pays(blocks, steps, m, groups, 6 * groups);
}

// By tiles of equal height; the last one overlaps the one before it, whose results it gives once more.
void multiply_amx(const int8_t* rows, int64_t row_stride, const Int4Term* terms, int64_t term_stride, int64_t m,
                  const Int4Panel& panel, const Int4Output& output) {
  const AmxRun run(k_groups(panel.group_size));
  const int64_t count = (m + kAmxRows - 1) / kAmxRows, height = (m + count - 1) / count;
  if (panel.k == 0 || panel.group_size > kMaxGroup || !tiles_pay(count, run, m, panel))
    return multiply(rows, row_stride, terms, term_stride, m, panel, output);
  std::vector<uint8_t> memory;
  std::vector<int64_t> blocks;
  for (int64_t i = 0; i < count; ++i) blocks.push_back(std::min(i * height, m - height));
  std::vector<float> y(static_cast<size_t>(count * height * kPanel));
  (panel.affine() ? add_products<true> : add_products<false>)(rows, row_stride, terms, term_stride, blocks, height,
                                                              in_int4(panel, 0, memory), run, y.data());
  for (int64_t i = 0; i < count; ++i)
    finish(y.data() + i * height * kPanel, height, blocks[static_cast<size_t>(i)], output);
}

constexpr Int4Kernels kAmxKernels = {Isa::amx,     2 * kAmxRows,   kFloatTileRows, pack_panel,
                                     unpack_panel, code_terms,     widen_row,      float_terms,
                                     multiply_amx, multiply_float, swap_pairs,     multiply_bf16};
#endif

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
