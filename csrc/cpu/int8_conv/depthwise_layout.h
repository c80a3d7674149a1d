// How a depthwise kernel's taps are taken 4 at a time (depthwise.h draws the packed weights), and where the codes under
// them lie.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/int8_conv/int8_conv.h"

namespace qkernels {

constexpr int64_t kBlockChannels = 64;

struct DepthwiseTaps {
  bool turned;                    // the taps of a single row stand in place of rows
  int64_t rows, columns, groups;  // a group is 4 rows

  explicit DepthwiseTaps(Size3 kernel)
      : turned(kernel.d * kernel.h == 1),
        rows(turned ? std::min<int64_t>(4, kernel.w) : kernel.d * kernel.h),
        columns(turned ? (kernel.w + 3) / 4 : kernel.w),
        groups((rows + 3) / 4) {}

  int64_t products() const { return groups * columns; }  // of an output
  // Bytes of the packed weights in front of the block that begins at `channel`.
  int64_t block_offset(int64_t channel) const { return channel * products() * 4; }
};

// Channels of the block that begins at `channel`, with those that fill it up.
inline int64_t block_width(int64_t channels, int64_t channel) {
  const int64_t left = channels - channel;
  return left > 32 ? 64 : left > 16 ? 32 : 16;
}

// What all rows of outputs have in common. Pixels are counted from the first that a row's first output reads.
struct DepthwiseRow {
  DepthwiseTaps taps;
  int64_t outputs, stride;  // pixels from one output to the next
  int64_t dilation;         // pixels from one column to the next
  int64_t last;             // the last pixel that the last output reads
  int64_t pixel_bytes;
  std::vector<int64_t> row_bytes;  // from the first row to each of groups * 4; rows that do not exist are the first
  int64_t row_pixels[4] = {};      // from a column's pixel to those of its rows, which only turned kernels tell apart

  DepthwiseRow(const ConvGeometry& g, const CodeImage& x)
      : taps(g.kernel),
        outputs(g.out.w),
        stride(g.stride.w),
        dilation(g.dilation.w * (taps.turned ? 4 : 1)),
        last((g.out.w - 1) * g.stride.w + (g.kernel.w - 1) * g.dilation.w),
        pixel_bytes(x.stride_w),
        row_bytes(static_cast<size_t>(taps.groups * 4)) {
    for (int64_t r = 0; r < taps.rows; ++r)
      if (taps.turned)
        row_pixels[r] = r * g.dilation.w;
      else
        row_bytes[static_cast<size_t>(r)] =
            r / g.kernel.h * g.dilation.d * x.stride_d + r % g.kernel.h * g.dilation.h * x.stride_h;
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
