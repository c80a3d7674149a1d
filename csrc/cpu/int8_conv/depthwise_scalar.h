// Depthwise convolution on the scalar path.
#include "cpu/int8_conv/depthwise_epilogue.h"
#include "cpu/int8_conv/depthwise_layout.h"

namespace qkernels::QK_NAMESPACE {
namespace {

constexpr Isa kDepthwiseIsa = Isa::scalar;

void convolve_rows(const DepthwiseRow& row, const DepthwiseTask& task) {
  const DepthwiseTaps& taps = row.taps;
  const int64_t width = task.width;
  for (int64_t h = 0; h < task.rows; ++h) {
    const uint8_t* codes = task.codes + h * task.row_step;
    const ConvOutput o = moved(task.output, h, 0);
    for (int64_t x = 0; x < row.outputs; ++x) {
      int32_t sums[kBlockChannels];
      for (int64_t c = 0; c < task.channels; ++c) sums[c] = -(o.in_zero_point + 128) * o.colsum[c];
      const int8_t* w = task.weights;
      for (int64_t i = 0; i < taps.products(); ++i) {
        const uint8_t* rows[4];
        for (int64_t r = 0; r < 4; ++r) {
          const int64_t pixel =
              std::min(row.last, x * row.stride + i % taps.columns * row.dilation + row.row_pixels[r]);
          rows[r] = codes + row.row_bytes[static_cast<size_t>(i / taps.columns * 4 + r)] + pixel * row.pixel_bytes;
        }
        for (int64_t place = 0; place < width; ++place, w += 4) {
          const int64_t lanes = width / 16, c = place / 4 % lanes * 16 + place / (4 * lanes) * 4 + place % 4;
          if (c < task.channels)
            for (int64_t r = 0; r < 4; ++r) sums[c] += rows[r][c] * w[r];
        }
      }
      finish_row(sums, width, 1, x, task.channels, o);
    }
  }
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
