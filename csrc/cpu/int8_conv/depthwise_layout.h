// How a depthwise kernel's taps are taken 4 at a time (depthwise.h draws the packed weights), and where the codes under
// them lie.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/int8_conv/int8_conv.h"

namespace qkernels {

constexpr int64_t kBlockChannels = 64;

struct DepthwiseTaps {
  int64_t rows, columns;
  int64_t groups;  // of 2 to 4 rows
  bool single;     // the last row is left alone

  explicit DepthwiseTaps(Size3 kernel)
      : rows(kernel.d * kernel.h), columns(kernel.w), groups((rows + 2) / 4), single(rows % 4 == 1) {}

  int64_t products_of_single() const { return single ? (columns + 3) / 4 : 0; }
  int64_t products() const { return groups * columns + products_of_single(); }
  // Bytes of the packed weights in front of the block that begins at `channel`.
  int64_t block_offset(int64_t channel) const { return channel * products() * 4; }
};

// Channels of the block that begins at `channel`, with those that fill it up.
inline int64_t block_width(int64_t channels, int64_t channel) {
  const int64_t left = channels - channel;
  return left > 32 ? 64 : left > 16 ? 32 : 16;
}

// Products whose taps lie in the same 4 rows. Offsets are from the first code that the first output reads.
struct DepthwiseGroup {
  int64_t row_bytes[4] = {};   // to the rows; those that do not exist are the first
  int64_t row_pixels[4] = {};  // what the pixels of a single row are ahead of the product's
  int64_t products, dilation;  // pixels from one product to the next
};

// What all rows of outputs have in common.
struct DepthwiseRow {
  int64_t outputs, stride;  // pixels from one output to the next
  int64_t last;             // the last pixel that the last output reads
  int64_t pixel_bytes;
  int64_t products;
  std::vector<DepthwiseGroup> groups;

  DepthwiseRow(const ConvGeometry& g, const CodeImage& x, const DepthwiseTaps& taps)
      : outputs(g.out.w),
        stride(g.stride.w),
        last((g.out.w - 1) * g.stride.w + (g.kernel.w - 1) * g.dilation.w),
        pixel_bytes(x.stride_w),
        products(taps.products()) {
    groups.reserve(static_cast<size_t>(taps.groups + 1));
    const auto row_bytes = [&](int64_t row) {
      return row / g.kernel.h * g.dilation.d * x.stride_d + row % g.kernel.h * g.dilation.h * x.stride_h;
    };
    for (int64_t row = 0; row < taps.groups * 4; row += 4) {
      DepthwiseGroup group;
      for (int64_t r = 0; r < 4; ++r) group.row_bytes[r] = row_bytes(row + r < taps.rows ? row + r : row);
      group.products = taps.columns;
      group.dilation = g.dilation.w;
      groups.push_back(group);
    }
    if (!taps.single) return;
    DepthwiseGroup group;
    for (int64_t r = 0; r < 4; ++r) {
      group.row_bytes[r] = row_bytes(taps.rows - 1);
      group.row_pixels[r] = r * g.dilation.w;
    }
    group.products = taps.products_of_single();
    group.dilation = 4 * g.dilation.w;
    groups.push_back(group);
  }
};

// Some rows of outputs that lie one below the other, of one block of channels.
struct DepthwiseTask {
  const uint8_t* codes;  // the first that the first row's first output reads
  int64_t row_step;      // bytes, from row to row
  int64_t rows;
  const int8_t* weights;
  int64_t channels, width;  // width: with those that fill the block up
  ConvOutput output;        // of the first row and channel
};

// The outputs `rows` below and `channels` beyond.
inline ConvOutput moved(ConvOutput o, int64_t rows, int64_t channels) {
  o.colsum += channels;
  o.scale += channels;
  if (o.bias) o.bias += channels;
  if (o.residual) o.residual += rows * o.residual_h + channels;
  if (o.residual_codes) o.residual_codes += rows * o.residual_h + channels;
  if (o.floats) o.floats += rows * o.floats_h + channels * o.floats_c;
  if (o.codes.data) o.codes.data += rows * o.codes.stride_h + channels;
  return o;
}

// The outputs of image n at depth d.
inline ConvOutput plane_of(ConvOutput o, int64_t n, int64_t d) {
  if (o.residual) o.residual += n * o.residual_n + d * o.residual_d;
  if (o.residual_codes) o.residual_codes += n * o.residual_n + d * o.residual_d;
  if (o.floats) o.floats += n * o.floats_n + d * o.floats_d;
  if (o.codes.data) o.codes.data += n * o.codes.stride_n + d * o.codes.stride_d;
  return o;
}

}  // namespace qkernels
