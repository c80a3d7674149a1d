// Convolutions of images of codes: the walk, and its division among threads.
#include "cpu/int8_conv/convolve.h"

#include <array>
#include <vector>

#include "cpu/common/int8_ops.h"
#include "cpu/int8_conv/conv_layout.h"
#include "cpu/int8_conv/conv_work.h"

namespace qkernels {
namespace {

// A dimension of the output: its size and its strides in x, floats, codes and residual.
struct Dim {
  int64_t size;
  std::array<int64_t, 4> strides;
};

// Merges neighbouring dimensions that are evenly spaced in every operand. So the images of a linear layer, and the rows
// of a 1x1 convolution without borders, become one long row.
void set_walk(ConvWork& work, std::vector<Dim> dims) {
  std::vector<Dim> merged;
  for (const Dim& dim : dims) {
    if (dim.size == 1) continue;
    const auto continues = [&] {
      for (size_t i = 0; i < dim.strides.size(); ++i)
        if (merged.back().strides[i] != dim.size * dim.strides[i]) return false;
      return true;
    };
    if (!merged.empty() && continues())
      merged.back() = {merged.back().size * dim.size, dim.strides};
    else
      merged.push_back(dim);
  }
  merged.insert(merged.begin(), 4 - merged.size(), Dim{1, {}});
  WalkStrides* const operands[] = {&work.x_strides, &work.floats, &work.codes, &work.residual};
  for (size_t i = 0; i < 4; ++i) {
    for (size_t d = 0; d < 3; ++d) operands[i]->outer[d] = merged[d].strides[i];
    operands[i]->w = merged[3].strides[i];
  }
  for (size_t d = 0; d < 3; ++d) work.outer[d] = merged[d].size;
  work.width = merged[3].size;
}

}  // namespace

void convolve(const ConvGeometry& g, const CodeImage& x, const int8_t* data, const ConvOutput& o) {
  const ConvLayout layout(g);
  const int64_t panels = layout.blocks * layout.block_panels;
  if (x.batch * g.out.d * g.out.h * g.out.w * panels == 0) return;

  ConvWork work{};
  set_walk(work, {{x.batch, {x.stride_n, o.floats_n, o.codes.stride_n, o.residual_n}},
                  {g.out.d, {g.stride.d * x.stride_d, o.floats_d, o.codes.stride_d, o.residual_d}},
                  {g.out.h, {g.stride.h * x.stride_h, o.floats_h, o.codes.stride_h, o.residual_h}},
                  {g.out.w, {g.stride.w * x.stride_w, o.floats_w, o.codes.stride_w, o.residual_w}}});
  work.x = x.data - g.padding.d * x.stride_d - g.padding.h * x.stride_h - g.padding.w * x.stride_w;

  // A kernel row is one run if its pixels are neighbours in x.
  const bool rows = layout.rows && (g.kernel.w == 1 || (g.dilation.w == 1 && x.stride_w == g.in_channels));
  const int64_t kernel_w = rows ? 1 : g.kernel.w;
  std::vector<int64_t> offsets;
  for (int64_t i = 0; i < g.kernel.d; ++i)
    for (int64_t j = 0; j < g.kernel.h; ++j)
      for (int64_t k = 0; k < kernel_w; ++k)
        offsets.push_back(i * g.dilation.d * x.stride_d + j * g.dilation.h * x.stride_h +
                          k * g.dilation.w * x.stride_w);
  work.offsets = offsets.data();
  work.runs = static_cast<int64_t>(offsets.size());
  work.run = rows ? layout.run : layout.block_in;
  work.packed_runs = layout.runs;
  work.packed_run = layout.run;
  work.gather = work.runs != layout.runs && layout.block_in % 4 != 0;
  work.run_groups = work.gather ? layout.k() / 4 : k_groups(work.run);

  work.data = data;
  work.panel_bytes = layout.bytes_of_panel();
  work.block_panels = layout.block_panels;
  work.block_in = layout.block_in;
  work.block_out = layout.block_out;
  work.out_channels = g.out_channels;
  work.output = &o;
  const int64_t k = g.in_channels / g.groups * g.kernel.d * g.kernel.h * g.kernel.w;
  work.wide = is_wide(std::abs(o.in_zero_point), k);

  const ConvKernels& kernels = conv_kernels();
  record_isa(kernels.isa);
  const int64_t pairs = (work.segments() + 1) / 2;
  const int64_t work_of_pair = work.panel_bytes * panels * 2 * kSegment;
  torch::stable::parallel_for(0, pairs, grain(kMultiplyGrain, work_of_pair), [&](int64_t begin, int64_t end) {
    kernels.convolve(work, 2 * begin, std::min(2 * end, work.segments()), 0, panels);
  });
}

}  // namespace qkernels
