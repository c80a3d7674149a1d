// Products of codes and packed weights by the tiles of AMX, which the amx path has in addition to the avx512vnni path's
// code. 16 rows of 64 codes times 16 channels take 16 cycles, as long as a tile has 16 rows or 64 codes.
#pragma once

#include "cpu/common/amx.h"

#ifdef QK_HAS_AMX
#include <algorithm>
#include <cstring>

#include "cpu/int8_gemm/int8_gemm.h"

namespace qkernels {

constexpr int kAmxRows = 16, kAmxGroups = 16;  // of a tile of codes: rows, and groups of 4 codes

// How a run of codes is cut into tiles: equally, and where they do not divide it, with zero weights behind its end.
struct AmxRun {
  int64_t groups, tiles, last;  // groups of 4 codes of a tile, and of those of the last that the run has

  explicit AmxRun(int64_t run_groups)
      : groups(), tiles(std::max<int64_t>(1, (run_groups + kAmxGroups - 1) / kAmxGroups)), last() {
    groups = std::max<int64_t>(1, (run_groups + tiles - 1) / tiles);
    last = run_groups - (tiles - 1) * groups;
  }
  // Whether the weights of the last tile need a copy that ends with zeros.
  bool padded() const { return last != groups; }
  int64_t tile_bytes() const { return groups * kPanel * 4; }
  void pad(const int8_t* last_weights, int8_t* copy) const {
    std::memcpy(copy, last_weights, static_cast<size_t>(last * kPanel * 4));
    std::memset(copy + last * kPanel * 4, 0, static_cast<size_t>((groups - last) * kPanel * 4));
  }
};

// Whether `tiles` blocks of rows, of so many steps, take less time than the dot products of `rows` rows with so many
// groups of 4 codes. In cycles for one panel, measured on a Xeon of 2023 (2026-12): 250 set the tiles up, `more` is
// what else tiles need, 50 move a block's sums, and a step takes 44, or 35 where all operands are in the first-level
// cache.
inline bool amx_pays(int64_t tiles, int64_t steps, int64_t rows, int64_t groups, int64_t more = 0) {
  return 250 + more + tiles * (50 + 44 * steps) < rows * groups * 115 / 100;
}

// A tile's place in a row of codes, in bytes, and the weights that it meets.
struct AmxStep {
  int64_t codes;
  const int8_t* weights;
};

// The tiles of this thread: 0 to 3 for sums, 4 and 5 for codes, 6 and 7 for weights.
class AmxTiles {
 public:
  explicit AmxTiles(const AmxRun& run) : groups_(run.groups) {}
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
  ~AmxTiles() { tile_release(); }

  void set_rows(int64_t rows) {
    if (rows == rows_) return;
    rows_ = rows;
    TileConfig config;
    for (int t = 0; t < 8; ++t) {
      config.rows[t] = static_cast<uint8_t>(t < 6 ? rows : groups_);
      config.row_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? groups_ * 4 : 64);
    }
    tile_config(config);
  }

 private:
  int64_t groups_, rows_ = 0;
};

// What tile_dot does for signed codes and unsigned weights.
template <int kSums, int kCodes, int kWeights>
inline void tile_dot_signed() {
  __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kCodes), "i"(kWeights));
}

template <bool kSigned, int kSums, int kCodes, int kWeights>
inline void tile_dot_of() {
  if constexpr (kSigned)
    tile_dot_signed<kSums, kCodes, kWeights>();
  else
    tile_dot<kSums, kCodes, kWeights>();
}

// Dot products of kBlocks blocks of rows, which begin at rows[block] and are row_step bytes apart, with 16 * kHalves
// channels: sums[block][16][32], which begin at start[32]. kSigned: codes are signed and weights are not.
template <int kBlocks, int kHalves, bool kSigned = false>
inline void multiply_tiles(const uint8_t* const* rows, int64_t row_step, const AmxStep* steps, int64_t n,
                           const int32_t* start, int32_t* sums) {
  constexpr bool kBoth = kHalves == 2, kTwo = kBlocks == 2;
  tile_load<0>(start, 0);
  if constexpr (kBoth) tile_load<1>(start + 16, 0);
  if constexpr (kTwo) tile_load<2>(start, 0);
  if constexpr (kTwo && kBoth) tile_load<3>(start + 16, 0);
  for (const AmxStep* step = steps; step < steps + n; ++step) {
    tile_load<6>(step->weights, kPanel * 4);
    tile_load<4>(rows[0] + step->codes, row_step);
    tile_dot_of<kSigned, 0, 4, 6>();
    if constexpr (kBoth) tile_load<7>(step->weights + 64, kPanel * 4);
    if constexpr (kBoth) tile_dot_of<kSigned, 1, 4, 7>();
    if constexpr (kTwo) tile_load<5>(rows[1] + step->codes, row_step);
    if constexpr (kTwo) tile_dot_of<kSigned, 2, 5, 6>();
    if constexpr (kTwo && kBoth) tile_dot_of<kSigned, 3, 5, 7>();
  }
  constexpr int64_t kStep = kPanel * sizeof(int32_t);
  tile_store<0>(sums, kStep);
  if constexpr (kBoth) tile_store<1>(sums + 16, kStep);
  if constexpr (kTwo) tile_store<2>(sums + kAmxRows * kPanel, kStep);
  if constexpr (kTwo && kBoth) tile_store<3>(sums + kAmxRows * kPanel + 16, kStep);
}

template <bool kSigned = false>
inline void multiply_tiles(int64_t blocks, bool both, const uint8_t* const* rows, int64_t row_step,
                           const AmxStep* steps, int64_t n, const int32_t* start, int32_t* sums) {
  if (both)
    (blocks == 2 ? multiply_tiles<2, 2, kSigned> : multiply_tiles<1, 2, kSigned>)(rows, row_step, steps, n, start,
                                                                                  sums);
  else
    (blocks == 2 ? multiply_tiles<2, 1, kSigned> : multiply_tiles<1, 1, kSigned>)(rows, row_step, steps, n, start,
                                                                                  sums);
}

}  // namespace qkernels
#endif
