// Reductions per channel. They give the same bits whatever the number of threads: x is cut into fixed pieces, whose
// results are added up in order.
#ifndef QK_REDUCE
#define QK_REDUCE

#include "cpu/common/sweep.h"

namespace qkernels::QK_NAMESPACE {

constexpr int64_t kPiece = 16384;  // elements of a run that one partial result covers
constexpr int64_t kRows = 256;     // rows of short runs that one partial result covers
constexpr int64_t kTile = 64;      // columns of a row that are kept in registers at a time

// Calls f as for_each_16 does. f sums in fp32, and add() adds its sums to totals in fp64. add() is called after at most
// 64 vectors, and once more after a rest of less than a vector. So the result is right to the last bits of fp32, at no
// cost.
template <typename F, typename G>
inline void for_each_16_summed(int64_t n, F f, G add) {
  int64_t i = 0;
  while (i + 16 <= n) {
    const int64_t stop = std::min(i + 64 * 16, n);
    for (; i + 16 <= stop; i += 16) f(i);
    add();
  }
  if (i < n) {
    f(i, n - i);
    add();
  }
}

// Op has a type Partial, with `identity` and `merge`. `piece(at, n, channel)` reduces n elements of a run.
// `column(at, row, rows, n, lanes)` reduces up to 16 adjacent columns, over rows that lie `row` elements apart.
// `result(channel, partial)` is called once for each channel.
template <typename Op>
void reduce_channels(const IndexedRuns& runs, int64_t numel, const Op& op) {
  using Partial = typename Op::Partial;
  const int64_t row = runs.period * runs.inner;
  if (runs.inner >= kShortRun || runs.channels == 1) {
    const int64_t pieces = (runs.inner + kPiece - 1) / kPiece;
    const int64_t items = runs.count * pieces;
    std::vector<Partial> partial(items);
    const int64_t grain = std::max<int64_t>(1, kGrain / std::min(runs.inner, kPiece));
    torch::stable::parallel_for(0, items, grain, [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) {
        const int64_t run = item / pieces, from = item % pieces * kPiece;
        partial[item] =
            op.piece(run * runs.inner + from, std::min(kPiece, runs.inner - from), runs.channel(run % runs.period));
      }
    });
    std::vector<Partial> total(runs.channels, Op::identity());
    int64_t in_period = 0;
    for (int64_t run = 0; run < runs.count; ++run) {
      Partial& sum = total[runs.channel(in_period)];
      for (int64_t i = 0; i < pieces; ++i) Op::merge(sum, partial[run * pieces + i]);
      if (++in_period == runs.period) in_period = 0;
    }
    for (int64_t c = 0; c < runs.channels; ++c) op.result(c, total[c]);
    return;
  }
  // Short runs. A row here is one period. A task takes the runs of a tile in each row of a block of rows, and reduces
  // them column by column.
  const int64_t rows = numel / row;
  const int64_t blocks = (rows + kRows - 1) / kRows;
  const int64_t tile_runs = kTile / runs.inner;
  const int64_t tiles = (runs.period + tile_runs - 1) / tile_runs;
  std::vector<Partial> partial(blocks * runs.period);
  const int64_t grain = std::max<int64_t>(1, kGrain / (std::min(rows, kRows) * kTile));
  torch::stable::parallel_for(0, blocks * tiles, grain, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t block = item / tiles, run = item % tiles * tile_runs;
      const int64_t whole_runs = std::min(tile_runs, runs.period - run);
      const int64_t height = std::min(kRows, rows - block * kRows);
      const int64_t columns = whole_runs * runs.inner;
      Partial lanes[kTile];
      for (int64_t column = 0; column < columns; column += 16)
        op.column(block * kRows * row + run * runs.inner + column, row, height, std::min<int64_t>(16, columns - column),
                  lanes + column);
      for (int64_t r = 0; r < whole_runs; ++r) {
        Partial sum = lanes[r * runs.inner];
        for (int64_t i = 1; i < runs.inner; ++i) Op::merge(sum, lanes[r * runs.inner + i]);
        partial[block * runs.period + run + r] = sum;
      }
    }
  });
  std::vector<Partial> total(runs.channels, Op::identity());
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t run = 0; run < runs.period; ++run)
      Op::merge(total[runs.channel(run)], partial[block * runs.period + run]);
  for (int64_t c = 0; c < runs.channels; ++c) op.result(c, total[c]);
}

}  // namespace qkernels::QK_NAMESPACE

#endif
