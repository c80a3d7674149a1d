// What a convolution's kernels are given: one walk over output pixels for every kind of convolution.
#pragma once

#include <cstdint>

#include "cpu/int8_conv/int8_conv.h"

namespace qkernels {

// A row of output pixels is cut into segments of equal width, up to so many pixels. So all rows of 7, 14, 28, 56 and
// 112 pixels consist of full segments. A tile is one segment, or two of equal width: 14 pixels times 32 channels fill
// 28 of 32 registers with sums. On the amx path segments are as wide as its tiles.
constexpr int kSegment = 7;

// Offsets into what a walk reads and writes: the codes x and the outputs, in bytes or elements.
struct Offsets {
  int64_t x, floats, codes, residual;

  Offsets operator+(const Offsets& o) const {
    return {x + o.x, floats + o.floats, codes + o.codes, residual + o.residual};
  }
  bool operator==(const Offsets& o) const {
    return x == o.x && floats == o.floats && codes == o.codes && residual == o.residual;
  }
  Offsets operator*(int64_t n) const { return {x * n, floats * n, codes * n, residual * n}; }
};

struct ConvWork {
  // Output pixels: rows are counted by three numbers (image, depth and height, as far as they differ), the last one
  // fastest, and pixels of a row by w.
  int64_t outer[3], width;
  Offsets outer_steps[3], step;
  int64_t segment;  // the most pixels of a segment

  // Output pixel p reads, for each run r, the codes from x + p + offsets[r] on.
  const uint8_t* x;
  const int64_t* offsets;
  int64_t runs, run, run_groups, first_half;  // first_half: as in TileInput
  // Where several runs are one run of packed K and do not begin at multiples of 4 codes there, a pixel's runs are first
  // copied together.
  bool gather;
  int64_t packed_runs, packed_run;

  const int8_t* data;
  int64_t panel_bytes, panels, block_panels, block_in, block_out, out_channels;

  const ConvOutput* output;
  bool wide;  // acc - zero_point * colsum may leave int32

  int64_t rows() const { return outer[0] * outer[1] * outer[2]; }
  int64_t segments_of_row() const { return (width + segment - 1) / segment; }
  int64_t segments() const { return rows() * segments_of_row(); }
};

// What a tile reads: H pixels of each segment. It gives sums[pixel][32], which begin at start[32] and wrap around, so
// that they are exact if the result fits; those of channels that the panel does not have may be left as they are.
struct TileInput {
  const uint8_t* pixels[2];  // the first pixel of each segment
  int64_t step;              // bytes from pixel to pixel
  const int64_t* offsets;    // of the runs
  int64_t runs, run_groups;
  // If not 0, the panel's first 16 channels have weights for so many groups of 4 codes of a run, the others for the
  // rest.
  int64_t first_half;
  int64_t channels;       // of the panel
  const int32_t* colsum;  // of its weights, by channel
};

// Computes the segments and panels with these numbers.
using Convolve = void (*)(const ConvWork& work, int64_t first_segment, int64_t last_segment, int64_t first_panel,
                          int64_t last_panel);

// Sets the width of segments, and gives the kernel that takes them.
Convolve choose_convolve(ConvWork& work);

}  // namespace qkernels
