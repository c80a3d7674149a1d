// Depthwise convolution: cuts the work into rows of outputs of one block of channels, which the kernels of the
// instruction-set paths compute.
#include "cpu/int8_conv/depthwise.h"

#include "cpu/common/int8_ops.h"

#define QK_BODY "cpu/int8_conv/depthwise_kernels.h"
#define QK_USES_VNNI
#include "cpu/common/foreach_isa.h"

namespace qkernels {

void convolve_depthwise(const ConvGeometry& g, const CodeImage& x, const int8_t* data, const ConvOutput& output) {
  const int64_t blocks = (g.out_channels + kBlockChannels - 1) / kBlockChannels;
  const int64_t count = x.batch * g.out.d * blocks * g.out.h;
  if (count == 0 || g.out.w == 0) return;
  const DepthwiseTaps taps(g.kernel);
  const DepthwiseRow row(g, x, taps);
  const auto convolve = QK_OF_ACTIVE_ISA(convolve_rows);
  const uint8_t* first = x.data - g.padding.d * x.stride_d - g.padding.h * x.stride_h - g.padding.w * x.stride_w;
  // A product of 4 taps takes as long as 16 multiply-accumulates of a GEMM, and so does an epilogue.
  const int64_t work = g.out.w * block_width(g.out_channels, 0) * 16 * (1 + taps.products());
  torch::stable::parallel_for(0, count, grain(kMultiplyGrain, work), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t h = begin % g.out.h, c = begin / g.out.h % blocks * kBlockChannels;
      const int64_t plane = begin / (g.out.h * blocks), n = plane / g.out.d, d = plane % g.out.d;
      const int64_t rows = std::min(end - begin, g.out.h - h), row_step = g.stride.h * x.stride_h;
      const uint8_t* codes = first + n * x.stride_n + d * g.stride.d * x.stride_d + h * row_step + c;
      convolve(row, {codes, row_step, rows, data + taps.block_offset(c), std::min(kBlockChannels, g.out_channels - c),
                     block_width(g.out_channels, c), moved(plane_of(output, n, d), h, c)});
      begin += rows;
    }
  });
}

}  // namespace qkernels
