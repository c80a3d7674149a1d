// Depthwise convolution on the vector paths, a strip of a row at a time: the strip's columns are interleaved once, so
// that each serves all outputs that read it; then tiles of neighbouring outputs are multiplied with each weight.
#include <memory>
#include <numeric>

#include "cpu/int8_conv/depthwise_vectors.h"

namespace qkernels::QK_NAMESPACE {
namespace {

constexpr Isa kDepthwiseIsa = static_cast<Isa>(QK_PATH);
constexpr int kChannels = kLanes * 16;       // of a vector
constexpr int64_t kStrip = 32;               // most outputs of a strip: their sums are 8 KiB
constexpr int64_t kStripBytes = 20 << 10;    // of interleaved codes, beside which sums and weights fit 32 KiB

// A vector holds kChannels / Width parts of a row, which are computed at once.
template <int Width>
struct Parts {
  static constexpr int kCount = kChannels / Width;
  int64_t outputs;       // of each part
  int64_t first[kCount]; // outputs; the last part begins earlier where the row is not a multiple
  int64_t bytes[kCount];

  explicit Parts(const DepthwiseRow& row) : outputs((row.outputs + kCount - 1) / kCount) {
    for (int p = 0; p < kCount; ++p) {
      first[p] = std::min(p * outputs, row.outputs - outputs);
      bytes[p] = first[p] * row.stride * row.pixel_bytes;
    }
  }
};

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

// The values of a block's channels in the order of the sums, [channel / 4 % 4][channel / 16][channel % 4], once for each
// part.
struct BlockValues {
  alignas(64) int32_t start[kChannels];
  alignas(64) float scale[kChannels];
  alignas(64) float bias[kChannels];
};

template <int Width, typename T>
inline void permute(const T* natural, T* values) {
  for (int q = 0; q < 4; ++q)
    for (int lane = 0; lane < kLanes; ++lane)
      std::memcpy(values + (q * kLanes + lane) * 4, natural + lane % (Width / 16) * 16 + q * 4, 16);
}

template <int Width>
inline void set_values(BlockValues& values, const ConvOutput& o, int64_t channels) {
  int32_t start[Width] = {};
  float scale[Width] = {}, bias[Width] = {};
  for (int64_t c = 0; c < channels; ++c) {
    start[c] = -(o.in_zero_point + 128) * o.colsum[c];
    scale[c] = o.scale[c];
    if (o.bias) bias[c] = o.bias[c];
  }
  permute<Width>(start, values.start);
  permute<Width>(scale, values.scale);
  permute<Width>(bias, values.bias);
}

// Where results are codes alone, and activations only bound them, sums become codes in the order they have. Bounds of
// codes are those of the activations, since rounding keeps order. Nothing may be NaN on the way.
inline bool clamps(const ActivationStep& step) {
  return step.kind == Activation::none || step.kind == Activation::relu || step.kind == Activation::clamp;
}

inline bool positive(float v) { return v > 0 && v <= std::numeric_limits<float>::max(); }

inline bool can_code_directly(const ConvOutput& o, const BlockValues& values) {
  if (o.floats || !o.codes.data || o.residual || o.residual_codes || !clamps(o.first) || !clamps(o.second)) return false;
  if (!positive(o.in_scale) || !positive(o.codes_q.inverse)) return false;
  bool finite = true;
  for (int c = 0; c < kChannels; ++c) finite &= std::isfinite(values.scale[c]) & std::isfinite(values.bias[c]);
  return finite;
}

inline CodeRule code_rule(const ConvOutput& o) {
  const Quantizer& q = o.codes_q;
  const auto code = [&](float v) {
    const float steps = std::nearbyint(v * q.inverse) + static_cast<float>(q.zero_point);
    return std::min(static_cast<float>(q.high), std::max(static_cast<float>(q.low), steps));
  };
  float low = static_cast<float>(q.low), high = static_cast<float>(q.high);
  for (const ActivationStep& step : {o.first, o.second}) {
    if (step.kind == Activation::none) continue;
    const float least = code(step.kind == Activation::relu ? 0.0f : step.low);
    const float most = step.kind == Activation::relu ? static_cast<float>(q.high) : code(step.high);
    low = std::min(most, std::max(least, low));
    high = std::min(most, std::max(least, high));
  }
  return {o.in_scale, q.inverse, q.zero_point, static_cast<int32_t>(low), static_cast<int32_t>(high)};
}

template <int Width>
inline void store_codes(uint8_t* to, int64_t pixel_step, const Parts<Width>& parts, int64_t output, int64_t channels,
                        Codes codes) {
  if (channels == Width) {
#pragma GCC unroll 4
    for (int p = 0; p < Parts<Width>::kCount; ++p)
      store_part<Width>(to + (parts.first[p] + output) * pixel_step, codes, p);
    return;
  }
  alignas(64) uint8_t bytes[kChannels];
  store_bytes(bytes, codes);
  for (int p = 0; p < Parts<Width>::kCount; ++p)
    std::memcpy(to + (parts.first[p] + output) * pixel_step, bytes + p * Width, static_cast<size_t>(channels));
}

// sums[outputs][kChannels] of the outputs from `output` of each part on become floats, or codes by way of floats.
template <int Width>
inline void finish_strip(const int32_t* sums, int64_t outputs, int64_t output, const Parts<Width>& parts,
                         int64_t channels, const ConvOutput& o) {
  for (int p = 0; p < Parts<Width>::kCount; ++p)
    for (int64_t i = 0; i < outputs; ++i) {
      int32_t natural[Width];
      for (int lane = 0; lane < Width / 16; ++lane)
        for (int q = 0; q < 4; ++q)
          std::memcpy(natural + lane * 16 + q * 4,
                      sums + i * kChannels + (q * kLanes + p * (Width / 16) + lane) * 4, 16);
      finish_row(natural, Width, 1, parts.first[p] + output + i, channels, o);
    }
}

// A strip's columns of 4 rows, interleaved: [4][columns] vectors.
template <int Width>
inline void interleave_columns(const DepthwiseRow& row, const uint8_t* codes, const int64_t* row_bytes, int64_t pixel,
                               const StripColumns& columns, const Parts<Width>& parts, uint8_t* strip) {
  const int64_t last = row.last - parts.first[Parts<Width>::kCount - 1] * row.stride;
  for (int64_t c = 0; c < columns.count; ++c) {
    const int64_t first = pixel + c % columns.outputs * columns.pixels[0] + c / columns.outputs * columns.pixels[1];
    Codes rows[4];
    for (int r = 0; r < 4; ++r)
      rows[r] = load_codes<Width>(
          codes + row_bytes[r] + std::min(last, first + row.row_pixels[r]) * row.pixel_bytes, parts.bytes);
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
void convolve_width(const DepthwiseRow& row, const DepthwiseTask& task, int64_t block_width) {
  const Parts<Width> parts(row);
  BlockValues values;
  set_values<Width>(values, task.output, task.channels);
  const bool direct = can_code_directly(task.output, values);
  const CodeRule rule = code_rule(task.output);
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
      sum_strip(row, codes, output * row.stride, outputs, parts, task.weights, block_width, values, groups_at_once,
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

// The channels of a block from `first` on.
DepthwiseTask half_of(DepthwiseTask task, int64_t first) {
  task.codes += first;
  task.weights += first;
  task.channels -= first;
  task.output = moved(task.output, 0, first);
  return task;
}

void convolve_rows(const DepthwiseRow& row, const DepthwiseTask& task) {
  const int64_t width = block_width(task.channels, 0);
  if (width == 16) return convolve_width<16>(row, task, width);
  if (width == 32) return convolve_width<32>(row, task, width);
#if QK_PATH == QK_PATH_AVX2
  DepthwiseTask half = task;
  half.channels = 32;
  convolve_width<32>(row, half, width);
  convolve_width<32>(row, half_of(task, 32), width);
#else
  convolve_width<64>(row, task, width);
#endif
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
