// Any int8 convolution, and a linear layer as one with kernel 1, on images of codes.
#pragma once

#include "cpu/common/team.h"
#include "cpu/int8_conv/int8_conv.h"

namespace qkernels {

// One filter per channel, which has kernels of its own (depthwise.h).
inline bool is_depthwise(const ConvGeometry& g) {
  const int64_t taps = g.kernel.d * g.kernel.h * g.kernel.w;
  return g.groups > 1 && g.groups == g.in_channels && g.groups == g.out_channels && taps > 0 && taps <= 65536;
}

// Whether threads share out the pixels of an image, so that all read all of the weights, rather than the output
// channels, so that all read all of the image. Pixels that a thread has written it finds in its caches in the next
// layer too: that is worth some more weights. (MobileNetV2's layers at 14² on 2 cores: 2 to 3 us less of 13 to 27.)
inline bool by_pixels(int64_t weight_bytes, int64_t image_bytes) { return weight_bytes <= 4 * image_bytes; }

// Packed weights depend on the channels, the groups and the kernel alone, and are equal on every path.
int64_t conv_packed_bytes(const ConvGeometry& g);

// codes [C_out][C_in / groups][kd][kh][kw]; colsum [C_out] receives the sum of each output channel's codes.
void pack_conv(const ConvGeometry& g, const int8_t* codes, int8_t* data, int32_t* colsum);
void unpack_conv(const ConvGeometry& g, const int8_t* data, int8_t* codes);

// The border of x must be as wide as the geometry's padding, and behind the image as wide as the output's size needs.
void convolve(const ConvGeometry& g, const CodeImage& x, const int8_t* data, const ConvOutput& output, Team& team);

}  // namespace qkernels
