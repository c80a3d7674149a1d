// The convolution tile of the scalar path.
#include "cpu/common/vec.h"
#include "cpu/int8_conv/conv_work.h"
#include "cpu/int8_gemm/int8_gemm.h"

namespace qkernels::QK_NAMESPACE {
namespace {

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
