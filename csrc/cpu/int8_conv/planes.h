// 1x1 convolutions from planes of floats to planes of floats, which never become pixels of neighbouring channels.
#pragma once

#include "cpu/common/team.h"
#include "cpu/int8_conv/int8_conv.h"

namespace qkernels {

// Floats whose pixels are neighbours within a channel.
struct Planes {
  const float* data;
  int64_t batch, pixels;
  int64_t stride_n, stride_c;  // elements
};

// Whether there is a kernel for it. The output's pixels must be neighbours too.
bool takes_planes(const ConvGeometry& g, const ConvOutput& o);

// Quantizes x with `q`, convolves with weights of pack_conv, and gives o.floats. Returns whether x holds a NaN.
bool convolve_planes(const ConvGeometry& g, const Planes& x, const Quantizer& q, const int8_t* data,
                     const ConvOutput& o, Team& team);

}  // namespace qkernels
