// Packed weights of depthwise convolutions, written and read at one tap at a time.
#include <algorithm>

#include "cpu/int8_conv/depthwise.h"
#include "cpu/int8_conv/depthwise_layout.h"

namespace qkernels {
namespace {

// Calls f(index of the tap among the codes, its place among the packed weights) for all taps of all channels.
template <typename F>
void for_each_tap(const ConvGeometry& g, F f) {
  const DepthwiseTaps taps(g.kernel);
  const int64_t n_taps = g.kernel.d * g.kernel.h * g.kernel.w;
  for (int64_t c = 0; c < g.out_channels; ++c) {
    const int64_t first = c / kBlockChannels * kBlockChannels, width = block_width(g.out_channels, first);
    const int64_t in_block = c - first;
    const int64_t place = (in_block / 4 % 4 * (width / 16) + in_block / 16) * 16 + in_block % 4 * 4;
    for (int64_t t = 0; t < n_taps; ++t) {
      const int64_t row = t / g.kernel.w, column = t % g.kernel.w;
      const bool single = taps.single && row == taps.rows - 1;
      const int64_t product = single ? taps.groups * taps.columns + column / 4 : row / 4 * taps.columns + column;
      const int64_t tap = single ? column % 4 : row % 4;
      f(c * n_taps + t, taps.block_offset(first) + product * width * 4 + place + tap);
    }
  }
}

}  // namespace

int64_t depthwise_packed_bytes(const ConvGeometry& g) {
  if (g.out_channels == 0) return 0;
  const int64_t last = (g.out_channels - 1) / kBlockChannels * kBlockChannels;
  return DepthwiseTaps(g.kernel).block_offset(last + block_width(g.out_channels, last));
}

void pack_depthwise(const ConvGeometry& g, const int8_t* codes, int8_t* data, int32_t* colsum) {
  const int64_t n_taps = g.kernel.d * g.kernel.h * g.kernel.w;
  std::fill_n(data, depthwise_packed_bytes(g), int8_t{0});
  std::fill(colsum, colsum + g.out_channels, 0);
  for_each_tap(g, [&](int64_t tap, int64_t place) {
    data[place] = codes[tap];
    colsum[tap / n_taps] += codes[tap];
  });
}

void unpack_depthwise(const ConvGeometry& g, const int8_t* data, int8_t* codes) {
  for_each_tap(g, [&](int64_t tap, int64_t place) { codes[tap] = data[place]; });
}

}  // namespace qkernels
