// The loops of the steps that are no convolutions; one table of functions per instruction-set path.
#pragma once

#include <cstdint>

#include "cpu/int8_conv/int8_conv.h"

namespace qkernels {

// Consecutive floats, or consecutive codes with what they mean.
struct Operand {
  const float* floats;   // or, where it is null:
  const uint8_t* codes;  // bytes code + 128
  Quantizer quantizer;
};

enum class Combination { none, add, sub, subtracted, mul, affine };

// v = first(a ∘ b), stored as floats, as codes, or both. subtracted: v = first(b - a). affine: v = first(a * b +
// shift).
struct Pointwise {
  Combination kind;
  Operand a, b;
  const float* shift;
  ActivationStep first;
  float* floats;
  uint8_t* codes;
  Quantizer quantizer;
};

// v = (x - mean) * rstd * weight + bias, where the mean is 0 if not `centered`, and rstd = 1 / sqrt(the mean of
// (x - mean)² + eps).
struct Norm {
  bool centered;
  float eps;
  const float *weight, *bias;  // may be null
};

// The pixels under a window of a pool: counts of pixels, and their strides in elements.
struct Window {
  int64_t d, h, w;
  int64_t stride_d, stride_h, stride_w;
};

// Of the 8 pixels around a point: how far apart they are in elements, and the shares of the farther ones.
struct Blend {
  int64_t offset_d, offset_h, offset_w;
  float share_d, share_h, share_w;
};

struct ProgramKernels {
  // n floats become codes. Returns whether one is a NaN.
  bool (*quantize)(const float* x, int64_t n, const Quantizer& q, uint8_t* codes);
  // The same for pixels whose channels lie `stride_c` floats apart, into pixels of neighbouring channels that lie
  // `stride_w` bytes apart.
  bool (*quantize_planes)(const float* x, int64_t stride_c, int64_t channels, int64_t pixels, const Quantizer& q,
                          uint8_t* codes, int64_t stride_w);
  void (*pointwise)(const Pointwise& p, int64_t n);
  // A row of n values, normalized, as floats, as codes, or both. Returns whether a result is a NaN.
  bool (*normalize)(const Norm& norm, const Operand& x, int64_t n, const Quantizer& q, float* floats, uint8_t* codes);
  // Of pixels' neighbouring channels to planes: out[c * stride_c + i] = x[i * stride_w + c].
  void (*to_planes)(const Operand& x, int64_t stride_w, int64_t channels, int64_t pixels, float* out, int64_t stride_c);
  void (*bytes_to_planes)(const uint8_t* x, int64_t stride_w, int64_t channels, int64_t pixels, uint8_t* out,
                          int64_t stride_c);
  // The maximum under a window for each channel. `lowest` is what nothing lies under.
  void (*max_codes)(const uint8_t* x, const Window& window, int64_t channels, uint8_t lowest, uint8_t* out);
  void (*max_floats)(const float* x, const Window& window, int64_t channels, float* out);
  // The sum under a window for each channel, divided by the divisors one after the other. In the order of the pixels;
  // `by_rows`: row by row.
  void (*average)(const Operand& x, const Window& window, bool by_rows, int64_t channels, const float (&divisors)[3],
                  float* out);
  // Their mean for each channel, weighted along the width, then the height, then the depth.
  void (*blend)(const Operand& x, const Blend& blend, int64_t channels, float* out);
  // out[j * groups + i] = x[i * (channels / groups) + j] for one pixel, of elements of 1 or 4 bytes.
  void (*shuffle)(const void* x, int64_t element, int64_t groups, int64_t channels, void* out);
  bool (*all_finite)(const float* x, int64_t n);
  bool (*any_nan)(const float* x, int64_t n);
};

// The kernels of the best path that active_isa() allows.
const ProgramKernels& program_kernels();

}  // namespace qkernels
