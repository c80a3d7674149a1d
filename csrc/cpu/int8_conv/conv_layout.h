// How the weights of a convolution are packed.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/int8_conv/int8_conv.h"
#include "cpu/int8_gemm/int8_gemm.h"

namespace qkernels {

// An output pixel reads its input in runs of neighbouring codes. With the channels innermost, a whole kernel row is one
// run of kernel.w * C codes. In grouped convolutions a run is one pixel's channels of a block of groups. K consists of
// the runs, each rounded up to 4 codes by zero weights:
//
//   data[block][panel][run][i / 4][channel % 32][i % 4]        missing channels and codes are zeros
//
// A block is as many groups as fit into one panel of 32 output channels, at least one; each group's channels meet zeros
// in the codes of the other groups. For a kernel of one pixel and one group this is the layout of a linear layer.
struct ConvLayout {
  int64_t block_groups;  // groups of a block; the last block may have fewer
  int64_t blocks;
  int64_t block_in, block_out;  // channels of a block
  int64_t block_panels;
  bool rows;          // a run is a kernel row
  int64_t runs, run;  // their number, and the codes of one

  explicit ConvLayout(const ConvGeometry& g) {
    const int64_t group_out = g.out_channels / g.groups;
    block_groups = std::clamp<int64_t>(kPanel / std::max<int64_t>(group_out, 1), 1, g.groups);
    blocks = (g.groups + block_groups - 1) / block_groups;
    block_in = g.in_channels / g.groups * block_groups;
    block_out = group_out * block_groups;
    block_panels = panels(block_out);
    rows = blocks == 1;
    runs = g.kernel.d * g.kernel.h * (rows ? 1 : g.kernel.w);
    run = block_in * (rows ? g.kernel.w : 1);
  }

  // Where a block's groups fall into halves of 16 output channels, and these see different codes: how many groups of 4
  // codes of a run the first half sees. Else 0.
  int64_t first_half() const {
    const int64_t group_out = block_out / block_groups, group_in = block_in / block_groups;
    if (rows || block_out <= 16 || block_panels > 1 || 16 % group_out || 16 / group_out * group_in % 4) return 0;
    return 16 / group_out * group_in / 4;
  }

  int64_t run_groups() const { return k_groups(run); }
  int64_t k() const { return runs * run_groups() * 4; }
  int64_t bytes_of_panel() const { return panel_bytes(k()); }
  int64_t bytes() const { return blocks * block_panels * bytes_of_panel(); }
};

}  // namespace qkernels
