// The dot products of one or two segments of pixels with one panel.
#ifndef QK_CONV_TILE
#define QK_CONV_TILE

#include "cpu/common/vec.h"
#include "cpu/int8_conv/conv_work.h"
#include "cpu/int8_gemm/int8_gemm.h"

namespace qkernels::QK_NAMESPACE {
namespace {

// sums[pixel][32], which begin at start[32]. They wrap around, so that they are exact if the result fits.
struct TileInput {
  const uint8_t* pixels[2];  // the first pixel of each segment
  int64_t step;              // bytes from pixel to pixel
  const int64_t* offsets;    // of the runs
  int64_t runs, run_groups;
};

template <int H, int Segments>
void conv_tile(const TileInput& in, const int8_t* weights, const int32_t* start, int32_t* sums) {
  for (int s = 0; s < Segments; ++s)
    for (int i = 0; i < H; ++i, sums += kPanel) {
      uint32_t total[kPanel];
      for (int c = 0; c < kPanel; ++c) total[c] = static_cast<uint32_t>(start[c]);
      const int8_t* w = weights;
      for (int64_t r = 0; r < in.runs; ++r) {
        const uint8_t* codes = in.pixels[s] + i * in.step + in.offsets[r];
        for (int64_t g = 0; g < in.run_groups; ++g, codes += 4, w += kPanel * 4)
          for (int c = 0; c < kPanel; ++c)
            total[c] += static_cast<uint32_t>(codes[0] * w[c * 4] + codes[1] * w[c * 4 + 1] + codes[2] * w[c * 4 + 2] +
                                              codes[3] * w[c * 4 + 3]);
      }
      std::memcpy(sums, total, sizeof total);
    }
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE

#endif
