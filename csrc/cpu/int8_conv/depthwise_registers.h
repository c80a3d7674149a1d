// Depthwise convolution in registers. 3x3: weights, the columns of an output and its sums fill 28 of the 32 that only
// the AVX-512 VNNI path has. 5x5: columns and sums do; weights come from memory, and so do products that the outputs
// before have made of the fifth row.
#include "cpu/int8_conv/depthwise_block.h"

#if QK_PATH != QK_PATH_SCALAR
namespace qkernels::QK_NAMESPACE {
namespace {

inline bool is_dense(const DepthwiseRow& row, int64_t columns, int64_t products) {
  const DepthwiseGroup& group = row.groups[0];
  return row.products == products && group.products == columns && group.dilation == 1 && row.stride <= 2;
}
// 3 columns of up to 4 rows; or 5 columns of 5 rows, of which the last takes 2 products of 4 taps.
inline bool fits_registers(const DepthwiseRow& row) { return is_dense(row, 3, 3) || is_dense(row, 5, 7); }

// The columns of the first 4 rows, one after the other.
template <int Width>
struct Columns {
  const DepthwiseRow& row;
  const Parts<Width>& parts;
  const uint8_t* rows[4];

  QK_INLINE Columns(const DepthwiseRow& r, const uint8_t* codes, const Parts<Width>& p) : row(r), parts(p) {
    for (int i = 0; i < 4; ++i) rows[i] = codes + row.groups[0].row_bytes[i];
  }
  QK_INLINE void next(Interleaved (&v)[4]) {
    Codes of_row[4];
    for (int i = 0; i < 4; ++i) {
      of_row[i] = load_codes<Width>(rows[i], parts.bytes);
      rows[i] += row.pixel_bytes;
    }
    interleave(of_row, v);
  }
};

template <int Width, int Stride, typename Sink>
inline void sum_in_registers(const DepthwiseRow& row, const uint8_t* codes, const Parts<Width>& parts,
                             const Weights (&w)[3][4], const BlockValues<Width>& values, Sink& sink) {
  Columns<Width> columns(row, codes, parts);
  Interleaved v[3][4];
  for (int k = 0; k < 3 - Stride; ++k) columns.next(v[k]);
  for (int64_t output = 0; output < parts.outputs; ++output) {
    for (int k = 3 - Stride; k < 3; ++k) columns.next(v[k]);
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

template <int Width, int Stride, typename Sink>
inline void sum_5x5(const DepthwiseRow& row, const uint8_t* codes, const Parts<Width>& parts, const uint8_t* weights,
                    const BlockValues<Width>& values, Sink& sink) {
  Columns<Width> columns(row, codes, parts);
  // The fifth row: 4 neighbouring codes from `column` on. An output reads those of its first column and, with three
  // weights of 0, those of its last.
  const uint8_t* const fifth = codes + row.groups[1].row_bytes[0];
  const int64_t last = row.last - parts.first[Parts<Width>::kCount - 1] * row.stride;
  const auto neighbours = [&](int64_t column, Interleaved(&v)[4]) QK_INLINE {
    Codes of_pixel[4];
    for (int p = 0; p < 4; ++p)
      of_pixel[p] = load_codes<Width>(fifth + std::min(column + p, last) * row.pixel_bytes, parts.bytes);
    interleave(of_pixel, v);
  };
  constexpr int kWaiting = 4 / Stride;  // outputs until a last column is a first one
  alignas(64) uint8_t waiting[kWaiting][4][kVectorBytes];
  for (int i = 0; i < kWaiting; ++i) {
    Interleaved v[4];
    neighbours(i * Stride, v);
    for (int q = 0; q < 4; ++q) store(waiting[i][q], v[q]);
  }
  const auto weight = [&](int product, int q)
                          QK_INLINE { return load_interleaved(weights + (product * 4 + q) * kVectorBytes); };
  Interleaved v[5][4];
  for (int k = 0; k < 5 - Stride; ++k) columns.next(v[k]);
  for (int64_t output = 0; output < parts.outputs; ++output) {
    for (int k = 5 - Stride; k < 5; ++k) columns.next(v[k]);
    Interleaved end[4];
    neighbours(output * Stride + 4, end);
    Sums sums[4];
    for (int q = 0; q < 4; ++q) {
      uint8_t* const begin = waiting[output % kWaiting][q];
      sums[q] = load_sums(values.sums_start + q * kLanes * 4);
      for (int k = 0; k < 5; ++k) sums[q] = multiply_add(sums[q], v[k][q], weight(k, q));
      sums[q] = multiply_add(sums[q], load_interleaved(begin), weight(5, q));
      sums[q] = multiply_add(sums[q], end[q], weight(6, q));
      store(begin, end[q]);
    }
    sink(output, sums);
    for (int k = 0; k < 5 - Stride; ++k)
      for (int q = 0; q < 4; ++q) v[k][q] = v[k + Stride][q];
  }
}

template <int Width, typename Sink>
void convolve_5x5(const DepthwiseRow& row, const DepthwiseTask& task, const Parts<Width>& parts,
                  const BlockValues<Width>& values, const CodeRule& rule) {
  alignas(64) uint8_t weights[7 * 4 * kVectorBytes];
  for (int i = 0; i < 7 * 4; ++i) store(weights + i * kVectorBytes, load_weights<Width>(task.weights + i * task.width));
  for (int64_t h = 0; h < task.rows; ++h) {
    const uint8_t* codes = task.codes + h * task.row_step;
    Sink sink{parts, values, rule, moved(task.output, h, 0)};
    if (row.stride == 1)
      sum_5x5<Width, 1>(row, codes, parts, weights, values, sink);
    else
      sum_5x5<Width, 2>(row, codes, parts, weights, values, sink);
  }
}

template <int Width, typename Sink>
void convolve_in_registers(const DepthwiseRow& row, const DepthwiseTask& task, const Parts<Width>& parts,
                           const BlockValues<Width>& values, const CodeRule& rule) {
  if (row.products == 7) return convolve_5x5<Width, Sink>(row, task, parts, values, rule);
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
