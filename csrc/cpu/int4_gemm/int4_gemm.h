// The int4 GEMM core of the linear op: activations, as int8 codes or floats, times packed weights of 2 to 4 bits with a
// scale for each group. Torch-free; one table of functions per instruction-set path.
#pragma once

#include <cstdint>

#include "cpu/int8_gemm/int8_gemm.h"

namespace qkernels {

// Packed weights, in the same layout for every path. [N, K] is cut into panels of 32 output channels (kPanel). A panel
// holds 64 bytes for each 4 consecutive k. Their low bits are channels 0 to 15, and their high bits channels 16 to 31.
// So one load and two masks give two operands of 4-way dot products, with 16 channels each:
//
//   data[panel][k / 4][channel % 16][k % 4] = (code of channel + 8) | (code of channel + 16, + 8) << 4
//
// Codes of 2 and 3 bits have one block for each 8 consecutive k. Its first 64 bytes hold the low two bits of a code of
// 2 bits plus 2, or of 3 bits plus 4. They are two sets of bytes as above, one shifted onto the other:
//
//   data[panel][k / 8][channel % 16 * 4 + k % 4] = code of (channel, k) | (channel, k + 4) << 2 |
//                                                  (channel + 16, k) << 4 | (channel + 16, k + 4) << 6
//
// 32 bytes with the highest bits of 3-bit codes follow: byte i holds those of byte i, in bits 0, 2, 4 and 6, and those
// of byte 32 + i, in bits 1, 3, 5 and 7.
//
// Missing channels and k are zeros. Scales, zero points and minima are [panel][group][32].
constexpr int64_t kBlock = 8;  // k of a block
inline int64_t blocks_of(int64_t k) { return (k + kBlock - 1) / kBlock; }
inline int64_t block_bytes(int bits) { return bits * 32; }
inline int64_t int4_panel_bytes(int64_t k, int bits) {
  return bits == 4 ? k_groups(k) * 64 : blocks_of(k) * block_bytes(bits);
}
inline int32_t code_offset(int bits) { return 1 << (bits - 1); }  // what is added to a code that is stored

// The most k that one integer sum covers: 16 * 15 * 128 * kMaxGroup < 2^31.
constexpr int64_t kMaxGroup = 32768;

// One panel of weights; the pointers are at its start.
struct Int4Panel {
  const uint8_t* data;
  const void* scale;
  const int8_t* zero_point;  // may be null
  const void* minimum;       // may be null; of scale's type
  Element type;              // of scale and minimum
  int64_t k, group_size;
  int bits;
  bool affine() const { return zero_point || minimum; }
};

inline int64_t sums_per_group(int64_t group_size) { return (group_size + kMaxGroup - 1) / kMaxGroup; }

// Where a panel's results go:
//   out = (y - zero_point * weight_sum) * scale + bias    of codes,    out = y + bias    of floats (scale is null)
struct Int4Output {
  void* out;
  Element type;
  int64_t row_stride, channels;
  const float* bias;        // may be null
  const float* weight_sum;  // of the panel's channels
  const float* scale;
  int64_t scale_step;
  const int32_t* zero_point;  // may be null
  int64_t zero_point_step;
};

// What a group of a row (at most kMaxGroup k) contributes whatever the weights are. Terms lie as [group][term_stride].
// Integer sums of a row of codes begin at `start`, so that they come out as those of the codes, or for affine weights,
// of the codes + 8. Affine weights also need the sum of the row's elements in the group, as a float. Rows are read up
// to a multiple of 8 elements; those of floats beyond K must be zeros.
struct Int4Term {
  int32_t start;
  float sum;
};

struct Int4Kernels {
  Isa isa;
  int tile_rows, float_tile_rows;
  void (*pack_panel)(const int8_t* q, int64_t stride_n, int64_t stride_k, int64_t channels, int64_t k, int bits,
                     uint8_t* data);
  void (*unpack_panel)(const uint8_t* data, int64_t channels, int64_t k, int bits, int8_t* q);
  void (*code_terms)(const int8_t* row, int64_t k, int64_t group_size, int bits, bool affine, Int4Term* terms,
                     int64_t term_stride);
  // Converts a row to fp32, with zeros up to a multiple of 8.
  void (*widen_row)(const void* x, Element type, int64_t k, float* row);
  void (*float_terms)(const void* x, Element type, int64_t k, int64_t group_size, Int4Term* terms, int64_t term_stride);
  void (*multiply)(const int8_t* rows, int64_t row_stride, const Int4Term* terms, int64_t term_stride, int64_t m,
                   const Int4Panel& panel, const Int4Output& output);
  void (*multiply_float)(const float* rows, int64_t row_stride, const Int4Term* terms, int64_t term_stride, int64_t m,
                         const Int4Panel& panel, const Int4Output& output);
  // Rows of bf16 by dot products of pairs, for CPUs with has_bf16_dot(); null on the other paths. swap_pairs makes a
  // row of x: k 1, 0, 3, 2, …, with zeros up to a multiple of 8.
  void (*swap_pairs)(const uint16_t* x, int64_t k, uint16_t* row);
  void (*multiply_bf16)(const uint16_t* rows, int64_t row_stride, const Int4Term* terms, int64_t term_stride, int64_t m,
                        const Int4Panel& panel, const Int4Output& output);
};

// The kernels of the best path that active_isa() allows.
const Int4Kernels& int4_kernels();

}  // namespace qkernels
