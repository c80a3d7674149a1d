// Depthwise 3x3 convolution in registers: weights, the columns of an output and its sums fill 28 of the 32 that only
// the AVX-512 VNNI path has.
#include "cpu/int8_conv/depthwise_block.h"

namespace qkernels::QK_NAMESPACE {
namespace {

inline bool fits_registers(const DepthwiseRow& row) {
  return row.taps.rows == 3 && row.taps.columns == 3 && row.dilation == 1 && row.stride <= 2;
}

// Calls f(output, sums) for the outputs of a row, each of which is one of every part.
template <int Width, int Stride, typename F>
inline void sum_in_registers(const DepthwiseRow& row, const uint8_t* codes, const Parts<Width>& parts,
                             const Weights (&w)[3][4], const BlockValues& values, F f) {
  const uint8_t* rows[3];
  for (int r = 0; r < 3; ++r) rows[r] = codes + row.row_bytes[static_cast<size_t>(r)];
  const auto next_column = [&](Interleaved(&v)[4]) QK_INLINE {
    Codes of_row[4];
    for (int r = 0; r < 3; ++r) {
      of_row[r] = load_codes<Width>(rows[r], parts.bytes);
      rows[r] += row.pixel_bytes;
    }
    of_row[3] = of_row[0];  // has weight 0
    interleave(of_row, v);
  };
  Interleaved v[3][4];
  for (int k = 0; k < 3 - Stride; ++k) next_column(v[k]);
  for (int64_t output = 0; output < parts.outputs; ++output) {
    for (int k = 3 - Stride; k < 3; ++k) next_column(v[k]);
    Sums sums[4];
    for (int q = 0; q < 4; ++q) {
      sums[q] = load_sums(values.start + q * kLanes * 4);
      for (int k = 0; k < 3; ++k) sums[q] = multiply_add(sums[q], v[k][q], w[k][q]);
    }
    f(output, sums);
    for (int k = 0; k < 3 - Stride; ++k)
      for (int q = 0; q < 4; ++q) v[k][q] = v[k + Stride][q];
  }
}

template <int Width>
void convolve_in_registers(const DepthwiseRow& row, const DepthwiseTask& task, const Parts<Width>& parts,
                           const BlockValues& values, const CodeRule& rule) {
  Weights w[3][4];
  for (int k = 0; k < 3; ++k)
    for (int q = 0; q < 4; ++q) w[k][q] = load_weights<Width>(task.weights + (k * 4 + q) * task.width);
  const uint8_t* codes = task.codes;
  uint8_t* to = task.output.codes.data;
  const int64_t pixel_step = task.output.codes.stride_w;
  for (int64_t h = 0; h < task.rows; ++h, codes += task.row_step, to += task.output.codes.stride_h) {
    const auto store = [&](int64_t output, const Sums(&sums)[4]) QK_INLINE {
      store_codes(to, pixel_step, parts, output, task.channels, rule(sums, values.scale, values.bias));
    };
    if (row.stride == 1)
      sum_in_registers<Width, 1>(row, codes, parts, w, values, store);
    else
      sum_in_registers<Width, 2>(row, codes, parts, w, values, store);
  }
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
