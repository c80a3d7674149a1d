// Depthwise convolution of one row of outputs, for one path.
#include "cpu/int8_conv/depthwise_epilogue.h"
#include "cpu/int8_conv/depthwise_layout.h"

namespace qkernels::QK_NAMESPACE {
namespace {

constexpr Isa kDepthwiseIsa = static_cast<Isa>(QK_PATH);

void convolve_row(const DepthwiseRow& row, const uint8_t* codes, const int8_t* weights, int64_t channels,
                  const ConvOutput& o) {
  const DepthwiseTaps& taps = row.taps;
  const int64_t width = block_width(channels, 0), lanes = width / 16;
  int32_t sums[kBlockChannels];
  for (int64_t x = 0; x < row.outputs; ++x) {
    for (int64_t c = 0; c < channels; ++c) sums[c] = -(o.in_zero_point + 128) * o.colsum[c];
    const int8_t* w = weights;
    for (int64_t g = 0; g < taps.groups; ++g)
      for (int64_t k = 0; k < taps.columns; ++k) {
        const uint8_t* rows[4];
        for (int64_t r = 0; r < 4; ++r) {
          const int64_t pixel = std::min(row.last, x * row.stride + k * row.dilation + row.row_pixels[r]);
          rows[r] = codes + row.row_bytes[static_cast<size_t>(g * 4 + r)] + pixel * row.pixel_bytes;
        }
        for (int64_t q = 0; q < 4; ++q)
          for (int64_t lane = 0; lane < lanes; ++lane)
            for (int64_t i = 0; i < 4; ++i, w += 4) {
              const int64_t c = lane * 16 + q * 4 + i;
              if (c < channels)
                sums[c] += rows[0][c] * w[0] + rows[1][c] * w[1] + rows[2][c] * w[2] + rows[3][c] * w[3];
            }
      }
    finish_row(sums, width, 1, x, channels, o);
  }
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
