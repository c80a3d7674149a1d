// The int8 GEMM core that the linear, matrix-multiply and convolution ops share: activation codes times packed weights,
// exact in int32, with the float epilogue fused. Torch-free; one table of functions per instruction-set path.
#pragma once

#include <cstdint>

#include "cpu/common/activation.h"
#include "cpu/common/isa.h"

namespace qkernels {

// Packed weights, in the same layout for every path. [N, K] is cut into panels of 32 output channels. A panel holds,
// for each 4 consecutive k, the 4 bytes of channel 0, of channel 1, … of channel 31. So one 64-byte load gives the
// operands of 16 channels to a 4-way dot product, and a panel is one forward stream:
//
//   data[panel][k / 4][channel % 32][k % 4]        missing channels and k are zeros
constexpr int kPanel = 32;
constexpr int kPackedPanels = 4;   // how many panels are packed at once: rows of b are then read in whole cache lines
constexpr int64_t kMaxK = 131071;  // 128 * 128 * kMaxK < 2^31: no int8 dot product of this length overflows int32

inline int64_t k_groups(int64_t k) { return (k + 3) / 4; }
inline int64_t panels(int64_t n) { return (n + kPanel - 1) / kPanel; }
inline int64_t panel_bytes(int64_t k) { return k_groups(k) * kPanel * 4; }

enum class Element : int { f32, bf16, f16, i32, i8 };

// How a row of floats becomes codes q = clamp(round_half_even(x * inverse) + zero_point, low, high).
struct RowQparams {
  bool dynamic;  // scale and inverse come from each row: scale = amax / half
  float scale, inverse, half;
  float zero_point, low, high;
};

// Where the sums of one panel of output channels go:
//   out = activation(((acc - zero_point * colsum) * scale_b) * scale_a + bias)
// Per-channel pointers start at the panel's first channel and hold `channels` values, per-row ones start at row 0.
struct PanelOutput {
  void* out;
  Element type;  // i32 stores the exact sums and reads no scale
  int64_t row_stride;
  int64_t channels;
  const int32_t* colsum;
  const float* scale_b;
  const float* bias;  // may be null
  const float* scale_a;
  int64_t scale_a_step;       // 0: one scale for all rows
  const int32_t* zero_point;  // may be null
  int64_t zero_point_step;
  bool wide;  // acc - zero_point * colsum may leave int32
  Activation activation;
  float out_inverse, out_zero_point;  // i8 stores round(out * out_inverse) + out_zero_point
};

// Activation codes are XORed with `flip`. It is 0x80 where the dot-product instruction takes unsigned bytes. This adds
// 128 * colsum to every sum, which the epilogue subtracts, modulo 2^32. A row is read up to a multiple of 4 codes;
// those beyond K are multiplied by zero weights.
struct Int8Kernels {
  Isa isa;
  uint8_t flip;
  int tile_rows;
  int unpacked_rows;  // up to so many rows, multiplying by unpacked weights is cheaper than packing
  void (*copy_codes)(const int8_t* codes, int64_t stride, int64_t k, uint8_t flip, uint8_t* row);
  // Returns the row's scale: NaN where the row holds a NaN (or, for a dynamic scale, an infinity).
  float (*quantize_row)(const void* x, Element type, int64_t k, const RowQparams& qparams, uint8_t flip, uint8_t* row);
  // At most kPackedPanels panels.
  void (*pack_panels)(const int8_t* b, int64_t stride_n, int64_t stride_k, int64_t channels, int64_t k, int8_t* data,
                      int32_t* colsum);
  void (*multiply)(const uint8_t* rows, int64_t row_stride, int64_t m, const int8_t* panel, int64_t k,
                   const PanelOutput& output);
  // The same for weights that are not packed. b is [channels, K] with K contiguous, and rows hold codes that are not
  // flipped.
  void (*multiply_unpacked)(const int8_t* rows, int64_t row_stride, int64_t m, const int8_t* b, int64_t stride_n,
                            int64_t k, const PanelOutput& output);
};

// The kernels of the best path that active_isa() allows.
const Int8Kernels& int8_kernels();

}  // namespace qkernels
