// Packing of convolution weights.
#include <algorithm>
#include <vector>

#include "cpu/int8_conv/conv_layout.h"
#include "cpu/int8_conv/convolve.h"
#include "cpu/int8_conv/depthwise.h"

namespace qkernels {
namespace {

// Calls visit(offset in the packed data, offset in the codes, output channel) for every weight.
template <typename Visit>
void for_each_weight(const ConvGeometry& g, const Visit& visit) {
  const ConvLayout layout(g);
  const int64_t group_in = g.in_channels / g.groups, group_out = g.out_channels / g.groups;
  const int64_t taps = g.kernel.d * g.kernel.h * g.kernel.w, k = group_in * taps;
  // Where the weights of the first output channel of each of a block's groups lie in a panel.
  std::vector<int64_t> places(static_cast<size_t>(layout.block_groups * k));
  for (int64_t c = 0; c < layout.block_in; ++c)
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t run = layout.rows ? tap / g.kernel.w : tap;
      const int64_t i = (layout.rows ? tap % g.kernel.w * layout.block_in : 0) + c;
      places[static_cast<size_t>(c * taps + tap)] = (run * layout.run_groups() + i / 4) * kPanel * 4 + i % 4;
    }
  for (int64_t n = 0; n < g.out_channels; ++n) {
    const int64_t group = n / group_out, block = group / layout.block_groups, c_out = n - block * layout.block_out;
    const int64_t* place = places.data() + group % layout.block_groups * k;
    const int64_t first = (block * layout.block_panels + c_out / kPanel) * layout.bytes_of_panel() + c_out % kPanel * 4;
    for (int64_t i = 0; i < k; ++i) visit(first + place[i], n * k + i, n);
  }
}

}  // namespace

int64_t conv_packed_bytes(const ConvGeometry& g) {
  return is_depthwise(g) ? depthwise_packed_bytes(g) : ConvLayout(g).bytes();
}

void pack_conv(const ConvGeometry& g, const int8_t* codes, int8_t* data, int32_t* colsum) {
  if (is_depthwise(g)) return pack_depthwise(g, codes, data, colsum);
  std::fill_n(data, conv_packed_bytes(g), int8_t{0});
  std::fill(colsum, colsum + g.out_channels, 0);
  for_each_weight(g, [&](int64_t packed, int64_t plain, int64_t n) {
    data[packed] = codes[plain];
    colsum[n] += codes[plain];
  });
}

void unpack_conv(const ConvGeometry& g, const int8_t* data, int8_t* codes) {
  if (is_depthwise(g)) return unpack_depthwise(g, data, codes);
  for_each_weight(g, [&](int64_t packed, int64_t plain, int64_t) { codes[plain] = data[packed]; });
}

}  // namespace qkernels
