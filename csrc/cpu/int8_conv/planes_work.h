// What the 1x1 convolution from planes to planes hands to the kernel of a path.
#pragma once

#include <vector>

#include "cpu/int8_conv/int8_conv.h"

namespace qkernels {

struct PlanesWork {
  const int8_t* data;
  int64_t panel_bytes, groups;  // of 4 input channels
  int64_t in_channels, out_channels, x_stride_c, out_stride_c;
  Quantizer quantizer;
  float in_scale;
  std::vector<int32_t> start;  // sums begin there. Of each output channel, and of more up to whole tiles
  std::vector<float> scale, bias;
};

// Some pixels of an image, all channels. `codes` has room for them in whole vectors. Returns whether x holds a NaN.
using ConvolvePixels = bool (*)(const PlanesWork&, const float* x, int64_t pixels, uint8_t* codes, float* out);

}  // namespace qkernels
