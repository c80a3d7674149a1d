// Depthwise convolution: cuts the work into rows of outputs of one block of channels, which the kernels of the
// instruction-set paths compute.
#include "cpu/int8_conv/depthwise.h"

#include "cpu/common/int8_ops.h"
#include "cpu/int8_conv/convolve.h"

#define QK_BODY "cpu/int8_conv/depthwise_kernels.h"
#define QK_USES_VNNI
#include "cpu/common/foreach_isa.h"

namespace qkernels {

void convolve_depthwise(const ConvGeometry& g, const CodeImage& x, const int8_t* data, const ConvOutput& output,
                        Team& team) {
  const int64_t blocks = (g.out_channels + kBlockChannels - 1) / kBlockChannels;
  const int64_t count = x.batch * g.out.d * blocks * g.out.h;
  if (count == 0 || g.out.w == 0) return;
  const DepthwiseTaps taps(g.kernel);
  const DepthwiseRow row(g, x, taps);
  const auto convolve = QK_OF_ACTIVE_ISA(convolve_rows);
  const uint8_t* first = x.data - g.padding.d * x.stride_d - g.padding.h * x.stride_h - g.padding.w * x.stride_w;
  // A product of 4 taps takes as long as 16 multiply-accumulates of a GEMM, and so does an epilogue.
  const int64_t work = g.out.w * block_width(g.out_channels, 0) * 16 * (1 + taps.products());
  // As the 1x1 convolution in front shared them out: rows in bands, one for each thread, or all rows of some blocks of
  // channels. In a band the rows of a block follow each other.
  const bool by_rows = by_pixels(g.in_channels, x.batch * x.size.d * x.size.h * x.size.w);
  const int64_t band = by_rows ? (g.out.h + team.threads() - 1) / team.threads() : g.out.h;
  team.parallel_for(count, grain(kMultiplyGrain, work), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t plane = begin / (g.out.h * blocks), n = plane / g.out.d, d = plane % g.out.d;
      const int64_t first_row = begin % (g.out.h * blocks) / (band * blocks) * band;
      const int64_t band_rows = std::min(band, g.out.h - first_row);
      const int64_t at = begin % (g.out.h * blocks) - first_row * blocks;
      const int64_t h = first_row + at % band_rows, c = at / band_rows * kBlockChannels;
      const int64_t rows = std::min(end - begin, band_rows - at % band_rows), row_step = g.stride.h * x.stride_h;
      const uint8_t* codes = first + n * x.stride_n + d * g.stride.d * x.stride_d + h * row_step + c;
      convolve(row, {codes, row_step, rows, data + taps.block_offset(c), std::min(kBlockChannels, g.out_channels - c),
                     block_width(g.out_channels, c), moved(plane_of(output, n, d), h, c)});
      begin += rows;
    }
  });
}

}  // namespace qkernels
