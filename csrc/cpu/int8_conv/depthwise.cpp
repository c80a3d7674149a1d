// Depthwise convolution: cuts the work into rows of outputs of one block of channels, which the kernels of the
// instruction-set paths compute.
#include "cpu/int8_conv/depthwise.h"

#include "cpu/common/int8_ops.h"

#define QK_BODY "cpu/int8_conv/depthwise_kernels.h"
#define QK_USES_VNNI
#include "cpu/common/foreach_isa.h"

namespace qkernels {
namespace {

// The outputs from (n, d, h) and channel c on.
ConvOutput at(ConvOutput o, int64_t n, int64_t d, int64_t h, int64_t c) {
  o.colsum += c;
  o.scale += c;
  if (o.bias) o.bias += c;
  const int64_t residual = n * o.residual_n + d * o.residual_d + h * o.residual_h + c;
  if (o.residual) o.residual += residual;
  if (o.residual_codes) o.residual_codes += residual;
  if (o.floats) o.floats += n * o.floats_n + c * o.floats_c + d * o.floats_d + h * o.floats_h;
  if (o.codes.data) o.codes.data += n * o.codes.stride_n + d * o.codes.stride_d + h * o.codes.stride_h + c;
  return o;
}

}  // namespace

void convolve_depthwise(const ConvGeometry& g, const CodeImage& x, const int8_t* data, const ConvOutput& output) {
  const int64_t blocks = (g.out_channels + kBlockChannels - 1) / kBlockChannels;
  const int64_t tasks = x.batch * g.out.d * g.out.h * blocks;
  if (tasks == 0 || g.out.w == 0) return;
  const DepthwiseRow row(g, x);
  const auto convolve = QK_OF_ACTIVE_ISA(convolve_row);
  record_isa(QK_OF_ACTIVE_ISA(kDepthwiseIsa));
  const uint8_t* first = x.data - g.padding.d * x.stride_d - g.padding.h * x.stride_h - g.padding.w * x.stride_w;
  // A product of 4 taps takes as long as 16 multiply-accumulates of a GEMM, and so does an epilogue.
  const int64_t work = g.out.w * block_width(g.out_channels, 0) * 16 * (1 + row.taps.products());
  torch::stable::parallel_for(0, tasks, grain(kMultiplyGrain, work), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      // Neighbouring tasks are rows of one block, so that weights and rows of codes stay in the first-level cache.
      const int64_t h = task % g.out.h, c = task / g.out.h % blocks * kBlockChannels;
      const int64_t plane = task / (g.out.h * blocks), n = plane / g.out.d, d = plane % g.out.d;
      const uint8_t* codes = first + n * x.stride_n + d * g.stride.d * x.stride_d + h * g.stride.h * x.stride_h + c;
      convolve(row, codes, data + row.taps.block_offset(c), std::min(kBlockChannels, g.out_channels - c),
               at(output, n, d, h, c));
    }
  });
}

}  // namespace qkernels
