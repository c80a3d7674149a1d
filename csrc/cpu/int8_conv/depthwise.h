// Convolutions of images of codes with one filter per channel: groups == in_channels == out_channels.
//
// The packed weights, the same for every instruction-set path, stand as the kernels multiply them: a product adds up 4
// taps. It takes 4 rows of a kernel's column; its rows are those of all its depths one after the other, and missing
// ones have weight 0. If a single row is left, it takes 4 neighbouring taps of that row. So there are, in this order,
//
//   [row / 4][column] products, and where rows % 4 == 1 for the last row [column / 4].
//
// Channels form blocks of 64, the last of 64, 32 or 16 with zeros behind the last channel. A block is
//
//   [product][channel / 4 % 4][channel / 16][channel % 4][tap],
//
// the order in which unpacking 4 rows of bytes leaves them.
#pragma once

#include "cpu/common/team.h"
#include "cpu/int8_conv/int8_conv.h"

namespace qkernels {

int64_t depthwise_packed_bytes(const ConvGeometry& g);

// codes: [channels][kernel.d][kernel.h][kernel.w]. colsum: the sum of each channel's codes.
void pack_depthwise(const ConvGeometry& g, const int8_t* codes, int8_t* data, int32_t* colsum);
void unpack_depthwise(const ConvGeometry& g, const int8_t* data, int8_t* codes);

// The sums are exact in int32 for kernels of up to 65536 taps. The residual must not overlap the outputs.
void convolve_depthwise(const ConvGeometry& g, const CodeImage& x, const int8_t* data, const ConvOutput& output,
                        Team& team);

}  // namespace qkernels
