// Depthwise convolution on the scalar path.
#include "cpu/int8_conv/depthwise_output.h"

namespace qkernels::QK_NAMESPACE {
namespace {

// Adds a product of all channels of a block, and returns the weights of the next. Sums may leave int32 on the way.
inline const int8_t* add_product(const uint8_t* const (&rows)[4], const int8_t* weights, int64_t width, int32_t* sums) {
  for (int64_t q = 0; q < 4; ++q)
    for (int64_t c = q * 4; c < width; c += 16)
      for (int64_t i = c; i < c + 4; ++i, weights += 4) {
        const int32_t product =
            rows[0][i] * weights[0] + rows[1][i] * weights[1] + rows[2][i] * weights[2] + rows[3][i] * weights[3];
        sums[i] = static_cast<int32_t>(static_cast<uint32_t>(sums[i]) + static_cast<uint32_t>(product));
      }
  return weights;
}

void convolve_rows(const DepthwiseRow& row, const DepthwiseTask& task) {
  const ChannelValues values(task.output, task.channels);
  for (int64_t h = 0; h < task.rows; ++h) {
    const uint8_t* codes = task.codes + h * task.row_step;
    const ConvOutput o = moved(task.output, h, 0);
    for (int64_t x = 0; x < row.outputs; ++x) {
      int32_t sums[kBlockChannels];
      std::copy(values.start, values.start + kBlockChannels, sums);
      const int8_t* weights = task.weights;
      for (const DepthwiseGroup& group : row.groups)
        for (int64_t k = 0; k < group.products; ++k) {
          const uint8_t* rows[4];
          for (int64_t r = 0; r < 4; ++r) {
            const int64_t pixel = std::min(row.last, x * row.stride + k * group.dilation + group.row_pixels[r]);
            rows[r] = codes + group.row_bytes[r] + pixel * row.pixel_bytes;
          }
          weights = add_product(rows, weights, task.width, sums);
        }
      finish_pixels(sums, kBlockChannels, x, 1, values, o);
    }
  }
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
