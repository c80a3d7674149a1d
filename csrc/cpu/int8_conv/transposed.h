// Transposed convolutions of images of codes.
#pragma once

#include "cpu/common/team.h"
#include "cpu/int8_conv/int8_conv.h"

namespace qkernels {

// The geometry here is torch's of a transposed convolution: an input pixel i meets output i * stride - padding +
// k * dilation through tap k. `out` already includes torch's output_padding.
//
// The outputs fall into stride.d * stride.h * stride.w classes by their positions modulo the stride. Those of one class
// see the same taps, so that they are an ordinary convolution at stride 1. Packed weights are those of the classes, one
// after the other, and so are the sums: colsum is [class][C_out] in ConvOutput too.
int64_t transposed_classes(const ConvGeometry& g);
int64_t transposed_packed_bytes(const ConvGeometry& g);

// codes: [C_in][C_out / groups][kd][kh][kw].
void pack_transposed(const ConvGeometry& g, const int8_t* codes, int8_t* data, int32_t* colsum);
void unpack_transposed(const ConvGeometry& g, const int8_t* data, int8_t* codes);

// How far the taps reach beyond an image of this size.
struct Borders {
  Size3 before, after;
};
Borders transposed_borders(const ConvGeometry& g, Size3 in);

void convolve_transposed(const ConvGeometry& g, const CodeImage& x, const int8_t* data, const ConvOutput& output,
                         Team& team);

}  // namespace qkernels
