// Convolutions of images of codes with packed int8 weights, with the epilogue fused: from codes to floats, to codes of
// the next layer, or to both. Everything has three spatial dims; a 2-D image has depth 1, a 1-D one also height 1.
#pragma once

#include <cstdint>

#include "cpu/common/activation.h"

namespace qkernels {

struct Size3 {
  int64_t d, h, w;
};

// Codes as bytes code + 128, for every instruction-set path, with the channels innermost (stride 1). Around each image
// lies a border, as wide as the layers that read the image need, which holds the code of zero. `data` is the first code
// inside the border. Behind the last code 64 bytes can be read.
struct CodeImage {
  uint8_t* data;
  int64_t batch, channels;
  Size3 size;                                      // without the border
  int64_t stride_n, stride_d, stride_h, stride_w;  // bytes
};

// What a value's codes mean: value = (code - zero_point) * scale with codes from low to high. Also how floats become
// codes: q = clamp(round_half_even(x * inverse) + zero_point, low, high), where a NaN becomes the zero point.
struct Quantizer {
  float scale, inverse;
  int32_t zero_point, low, high;
};

// relu; clamp to low…high; leaky_relu with slope `low`; the others read neither.
struct ActivationStep {
  Activation kind = Activation::none;
  float low = 0, high = 0;
};

struct ConvGeometry {
  int64_t in_channels, out_channels, groups;
  Size3 kernel, stride, dilation;
  Size3 padding;  // before the image; behind it lies whatever the output's size needs
  Size3 out;      // the output's size
};

// Where results go. For output channel c:
//   v = ((acc - zero_point * colsum[c]) * scale[c]) * in_scale + bias[c]
//   v = second(first(v) + residual)
// v is stored as float, as a code, or both.
struct ConvOutput {
  const int32_t* colsum;
  const float* scale;
  const float* bias;  // may be null
  float in_scale;     // scale and zero point of the input
  int32_t in_zero_point;
  ActivationStep first, second;

  // The residual, of the output's shape, if one of the pointers is set: floats, or bytes code + 128 of `residual_q`,
  // behind which 64 bytes can be read, as in a CodeImage.
  const float* residual;
  const uint8_t* residual_codes;
  Quantizer residual_q;
  int64_t residual_n, residual_d, residual_h, residual_w;  // strides in elements; that of channels is 1

  float* floats;                                             // may be null
  int64_t floats_n, floats_c, floats_d, floats_h, floats_w;  // strides in elements

  CodeImage codes;  // data may be null; only the inside is written
  Quantizer codes_q;
};

}  // namespace qkernels
