// Convolutions of images of codes: the walk, and its division among threads.
#include "cpu/int8_conv/convolve.h"

#include <initializer_list>
#include <vector>

#include "cpu/common/int8_ops.h"
#include "cpu/int8_conv/conv_layout.h"
#include "cpu/int8_conv/conv_work.h"
#include "cpu/int8_conv/depthwise.h"

namespace qkernels {
namespace {

struct Dim {
  int64_t size;
  Offsets step;
};

// Merges neighbouring dimensions that are evenly spaced in every operand. So the images of a linear layer, and the rows
// of a 1x1 convolution without borders, become one long row.
void set_walk(ConvWork& work, std::initializer_list<Dim> dims) {
  std::vector<Dim> merged;
  for (const Dim& dim : dims) {
    if (dim.size == 1) continue;
    const Offsets all = dim.step * dim.size;
    if (!merged.empty() && merged.back().step == all)
      merged.back() = {merged.back().size * dim.size, dim.step};
    else
      merged.push_back(dim);
  }
  merged.insert(merged.begin(), 4 - merged.size(), Dim{1, {}});
  for (size_t d = 0; d < 3; ++d) {
    work.outer[d] = merged[d].size;
    work.outer_steps[d] = merged[d].step;
  }
  work.width = merged[3].size;
  work.step = merged[3].step;
}

// Divides the work among the threads.
void run(ConvWork& work, int64_t x_bytes, Team& team) {
  const Convolve convolve_part = choose_convolve(work);
  // Tiles multiply about 4 times as fast.
  const int64_t least = work.segment > kSegment ? 4 * kMultiplyGrain : kMultiplyGrain;
  const int64_t segments = work.segments(), pairs = (segments + 1) / 2, threads = team.threads();
  const int64_t work_of_pair = work.panel_bytes * 2 * work.segment;  // and one panel
  if (by_pixels(work.panels * work.panel_bytes, x_bytes) || work.panels == 1) {
    team.parallel_for(pairs, grain(least, work_of_pair * work.panels), [&](int64_t begin, int64_t end) {
      convolve_part(work, 2 * begin, std::min(2 * end, segments), 0, work.panels);
    });
    return;
  }
  // Where panels cannot be shared out evenly, parts of the pixels are.
  const int64_t parts = work.panels % threads ? std::min(threads, pairs) : 1;
  team.parallel_for(work.panels * parts, grain(least, work_of_pair * pairs / parts), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t panel = begin / parts, part = begin % parts, whole = part ? 0 : (end - begin) / parts;
      const int64_t last_part = whole ? parts : std::min(parts, part + end - begin);
      convolve_part(work, part * pairs / parts * 2, std::min(last_part * pairs / parts * 2, segments), panel,
                    panel + std::max<int64_t>(whole, 1));
      begin += whole ? whole * parts : last_part - part;
    }
  });
}

}  // namespace

void convolve(const ConvGeometry& g, const CodeImage& x, const int8_t* data, const ConvOutput& o, Team& team) {
  if (is_depthwise(g)) return convolve_depthwise(g, x, data, o, team);
  const ConvLayout layout(g);
  ConvWork work{};
  work.panels = layout.blocks * layout.block_panels;
  if (x.batch * g.out.d * g.out.h * g.out.w * work.panels == 0) return;
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

  work.first_half = work.gather ? 0 : layout.first_half();

  work.data = data;
  work.panel_bytes = layout.bytes_of_panel();
  work.block_panels = layout.block_panels;
  work.block_in = layout.block_in;
  work.block_out = layout.block_out;
  work.out_channels = g.out_channels;
  work.output = &o;
  const int64_t k = g.in_channels / g.groups * g.kernel.d * g.kernel.h * g.kernel.w;
  work.wide = is_wide(std::abs(o.in_zero_point), k);

  run(work, x.batch * x.size.d * x.size.h * x.size.w * g.in_channels, team);
}

}  // namespace qkernels
