// What a convolution's kernels are given: one walk over output pixels for every kind of convolution.
#pragma once

#include <cstdint>

#include "cpu/common/isa.h"
#include "cpu/int8_conv/int8_conv.h"

namespace qkernels {

// A row of output pixels is cut into segments of equal width, up to so many pixels. So all rows of 7, 14, 28, 56 and
// 112 pixels consist of full segments. A tile is one segment, or two of equal width: 14 pixels times 32 channels fill
// 28 of 32 registers with sums.
constexpr int kSegment = 7;

struct WalkStrides {
  int64_t outer[3];
  int64_t w;
};

struct ConvWork {
  // Output pixels: rows are indexed by three numbers (image, depth, height, as far as they differ), pixels of a row by
  // w.
  int64_t outer[3], width;

  // Output pixel p reads, for each run r, the codes from x + p + offsets[r] on. Bytes.
  const uint8_t* x;
  WalkStrides x_strides;
  const int64_t* offsets;
  int64_t runs, run, run_groups;
  bool gather;  // runs do not begin at every 4 codes of packed K: a pixel's runs are first copied together
  int64_t packed_runs, packed_run;  // where `gather`: the runs that lie together in K, and their codes

  const int8_t* data;
  int64_t panel_bytes, block_panels, block_in, block_out, out_channels;

  const ConvOutput* output;
  WalkStrides floats, codes, residual;  // elements
  bool wide;                            // acc - zero_point * colsum may leave int32

  int64_t rows() const { return outer[0] * outer[1] * outer[2]; }
  int64_t segments_of_row() const { return (width + kSegment - 1) / kSegment; }
  int64_t segments() const { return rows() * segments_of_row(); }
};

struct ConvKernels {
  Isa isa;
  // Computes the segments and panels with these numbers.
  void (*convolve)(const ConvWork& work, int64_t first_segment, int64_t last_segment, int64_t first_panel,
                   int64_t last_panel);
};

const ConvKernels& conv_kernels();

}  // namespace qkernels
