// Depthwise 3x3 convolution in registers: weights, the columns of an output and its sums fill 28 of the 32 that only
// the AVX-512 VNNI path has.
#include "cpu/int8_conv/depthwise_block.h"

#if QK_PATH != QK_PATH_SCALAR
namespace qkernels::QK_NAMESPACE {
namespace {

inline bool fits_registers(const DepthwiseRow& row) {
  const DepthwiseGroup& group = row.groups[0];
  return row.products == 3 && group.products == 3 && group.dilation == 1 && row.stride <= 2;
}

template <int Width, int Stride, typename Sink>
inline void sum_in_registers(const DepthwiseRow& row, const uint8_t* codes, const Parts<Width>& parts,
                             const Weights (&w)[3][4], const BlockValues<Width>& values, Sink& sink) {
  const uint8_t* rows[4];
  for (int r = 0; r < 4; ++r) rows[r] = codes + row.groups[0].row_bytes[r];
  const auto next_column = [&](Interleaved(&v)[4]) QK_INLINE {
    Codes of_row[4];
    for (int r = 0; r < 4; ++r) {
      of_row[r] = load_codes<Width>(rows[r], parts.bytes);
      rows[r] += row.pixel_bytes;
    }
    interleave(of_row, v);
  };
  Interleaved v[3][4];
  for (int k = 0; k < 3 - Stride; ++k) next_column(v[k]);
  for (int64_t output = 0; output < parts.outputs; ++output) {
    for (int k = 3 - Stride; k < 3; ++k) next_column(v[k]);
    Sums sums[4];
    for (int q = 0; q < 4; ++q) {
      sums[q] = load_sums(values.sums_start + q * kLanes * 4);
      for (int k = 0; k < 3; ++k) sums[q] = multiply_add(sums[q], v[k][q], w[k][q]);
    }
    sink(output, sums);
    for (int k = 0; k < 3 - Stride; ++k)
      for (int q = 0; q < 4; ++q) v[k][q] = v[k + Stride][q];
  }
}

template <int Width, typename Sink>
void convolve_in_registers(const DepthwiseRow& row, const DepthwiseTask& task, const Parts<Width>& parts,
                           const BlockValues<Width>& values, const CodeRule& rule) {
  Weights w[3][4];
  for (int k = 0; k < 3; ++k)
    for (int q = 0; q < 4; ++q) w[k][q] = load_weights<Width>(task.weights + (k * 4 + q) * task.width);
  for (int64_t h = 0; h < task.rows; ++h) {
    const uint8_t* codes = task.codes + h * task.row_step;
    Sink sink{parts, values, rule, moved(task.output, h, 0)};
    if (row.stride == 1)
      sum_in_registers<Width, 1>(row, codes, parts, w, values, sink);
    else
      sum_in_registers<Width, 2>(row, codes, parts, w, values, sink);
  }
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
#endif
