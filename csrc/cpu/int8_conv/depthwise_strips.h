// Depthwise convolution a strip of a row at a time: the strip's columns are interleaved once, so that each serves all
// outputs that read it; then tiles of neighbouring outputs are multiplied with each weight.
#include <memory>
#include <numeric>

#include "cpu/int8_conv/depthwise_block.h"

namespace qkernels::QK_NAMESPACE {
namespace {

constexpr int64_t kStrip = 32;             // most outputs of a strip: their sums are 8 KiB
constexpr int64_t kStripBytes = 20 << 10;  // of interleaved codes, beside which sums and weights fit 32 KiB

// The columns of a strip that are interleaved. Output i reads for tap column k the one with number i * output_step +
// k * tap_step.
struct StripColumns {
  int64_t count, output_step, tap_step;
  int64_t outputs, pixels[2];  // column c is at pixel c % outputs * pixels[0] + c / outputs * pixels[1]

  StripColumns(const DepthwiseRow& row, int64_t strip_outputs) {
    const int64_t taps = row.taps.columns, unit = std::gcd(row.stride, row.dilation);
    output_step = row.stride / unit;
    tap_step = row.dilation / unit;
    count = outputs = (strip_outputs - 1) * output_step + (taps - 1) * tap_step + 1;
    pixels[0] = unit;
    pixels[1] = 0;
    if (count <= strip_outputs * taps) return;
    // Strides or dilations beyond the kernel: no two outputs read the same column.
    output_step = 1;
    tap_step = outputs = strip_outputs;
    count = strip_outputs * taps;
    pixels[0] = row.stride;
    pixels[1] = row.dilation;
  }
};

// A strip's columns of 4 rows, interleaved: [4][columns] vectors.
template <int Width>
inline void interleave_columns(const DepthwiseRow& row, const uint8_t* codes, const int64_t* row_bytes, int64_t pixel,
                               const StripColumns& columns, const Parts<Width>& parts, uint8_t* strip) {
  const int64_t last = row.last - parts.first[Parts<Width>::kCount - 1] * row.stride;
  for (int64_t c = 0; c < columns.count; ++c) {
    const int64_t first = pixel + c % columns.outputs * columns.pixels[0] + c / columns.outputs * columns.pixels[1];
    Codes rows[4];
    for (int r = 0; r < 4; ++r)
      rows[r] = load_codes<Width>(codes + row_bytes[r] + std::min(last, first + row.row_pixels[r]) * row.pixel_bytes,
                                  parts.bytes);
    Interleaved v[4];
    interleave(rows, v);
    for (int q = 0; q < 4; ++q) store(strip + (q * columns.count + c) * kVectorBytes, v[q]);
  }
}

using Tile = void (*)(const uint8_t*, int64_t, int64_t, int64_t, int64_t, int64_t, const int8_t*, int64_t,
                      const int32_t*, int64_t, int32_t*);

// The sums of vector q of N outputs: those at `from` plus the products of some groups of rows. `sums` and `from` are
// [N][kChannels], a weight is 4 * weight_step bytes from the next.
template <int Width, int N>
void tile(const uint8_t* codes, int64_t output_step, int64_t tap_step, int64_t group_step, int64_t columns,
          int64_t groups, const int8_t* weights, int64_t weight_step, const int32_t* from, int64_t from_step,
          int32_t* sums) {
  Sums acc[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) acc[i] = load_sums(from + i * from_step);
  for (int64_t g = 0; g < groups; ++g, codes += group_step) {
    const uint8_t* column = codes;
    for (int64_t k = 0; k < columns; ++k, column += tap_step, weights += weight_step) {
      const Weights w = load_weights<Width>(weights);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) acc[i] = multiply_add(acc[i], load_interleaved(column + i * output_step), w);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) store(sums + i * kChannels, acc[i]);
}

template <int Width, int... N>
constexpr std::array<Tile, sizeof...(N)> make_tiles(std::integer_sequence<int, N...>) {
  return {tile<Width, N + 1>...};
}

// The sums of a strip: sums[outputs][kChannels].
template <int Width>
inline void sum_strip(const DepthwiseRow& row, const uint8_t* codes, int64_t pixel, int64_t outputs,
                      const Parts<Width>& parts, const int8_t* weights, int64_t block_width, const BlockValues& values,
                      int64_t groups_at_once, uint8_t* strip, int32_t* sums) {
  static constexpr auto kTiles = make_tiles<Width>(std::make_integer_sequence<int, kMostOutputs>());
  const DepthwiseTaps& taps = row.taps;
  const StripColumns columns(row, outputs);
  const int64_t vector_bytes = columns.count * kVectorBytes, group_bytes = 4 * vector_bytes;
  const int64_t tiles = (outputs + kMostOutputs - 1) / kMostOutputs;
  for (int64_t g = 0; g < taps.groups; g += groups_at_once) {
    const int64_t groups = std::min(groups_at_once, taps.groups - g);
    for (int64_t i = 0; i < groups; ++i)
      interleave_columns(row, codes, row.row_bytes.data() + (g + i) * 4, pixel, columns, parts,
                         strip + i * group_bytes);
    for (int q = 0; q < 4; ++q)
      for (int64_t i = 0, output = 0; i < tiles; ++i) {
        const int64_t n = (outputs - output) / (tiles - i);
        int32_t* to = sums + output * kChannels + q * kLanes * 4;
        kTiles[static_cast<size_t>(n - 1)](
            strip + q * vector_bytes + output * columns.output_step * kVectorBytes, columns.output_step * kVectorBytes,
            columns.tap_step * kVectorBytes, group_bytes, taps.columns, groups,
            weights + g * taps.columns * block_width * 4 + q * block_width, block_width * 4,
            g == 0 ? values.start + q * kLanes * 4 : to, g == 0 ? 0 : kChannels, to);
        output += n;
      }
  }
}

template <int Width>
void convolve_strips(const DepthwiseRow& row, const DepthwiseTask& task, const Parts<Width>& parts,
                     const BlockValues& values, bool direct, const CodeRule& rule) {
  const int64_t strips = (parts.outputs + kStrip - 1) / kStrip, most = (parts.outputs + strips - 1) / strips;
  const int64_t group_bytes = StripColumns(row, most).count * 4 * kVectorBytes;
  const int64_t groups_at_once = std::clamp<int64_t>(kStripBytes / group_bytes, 1, row.taps.groups);
  const std::unique_ptr<uint8_t[]> scratch(new uint8_t[static_cast<size_t>(groups_at_once * group_bytes + 64)]);
  uint8_t* strip = scratch.get() + (64 - reinterpret_cast<uintptr_t>(scratch.get()) % 64) % 64;
  alignas(64) int32_t sums[kStrip * kChannels];
  for (int64_t h = 0; h < task.rows; ++h) {
    const uint8_t* codes = task.codes + h * task.row_step;
    const ConvOutput o = moved(task.output, h, 0);
    for (int64_t i = 0, output = 0; i < strips; ++i) {
      const int64_t outputs = (parts.outputs - output) / (strips - i);
      sum_strip(row, codes, output * row.stride, outputs, parts, task.weights, task.width, values, groups_at_once,
                strip, sums);
      if (direct) {
        for (int64_t j = 0; j < outputs; ++j) {
          Sums of_output[4];
          for (int q = 0; q < 4; ++q) of_output[q] = load_sums(sums + j * kChannels + q * kLanes * 4);
          store_codes(o.codes.data, o.codes.stride_w, parts, output + j, task.channels,
                      rule(of_output, values.scale, values.bias));
        }
      } else {
        finish_strip(sums, outputs, output, parts, task.channels, o);
      }
      output += outputs;
    }
  }
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
