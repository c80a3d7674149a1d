// What the vector kernels know of a block of channels, and what they do with its sums.
#ifndef QK_DEPTHWISE_BLOCK
#define QK_DEPTHWISE_BLOCK

#include "cpu/int8_conv/depthwise_epilogue.h"
#include "cpu/int8_conv/depthwise_layout.h"
#include "cpu/int8_conv/depthwise_vectors.h"

namespace qkernels::QK_NAMESPACE {
namespace {

constexpr int kChannels = kLanes * 16;  // of a vector

// A vector holds kChannels / Width parts of a row, which are computed at once.
template <int Width>
struct Parts {
  static constexpr int kCount = kChannels / Width;
  int64_t outputs;        // of each part
  int64_t first[kCount];  // outputs; the last part begins earlier where the row is not a multiple
  int64_t bytes[kCount];

  explicit Parts(const DepthwiseRow& row) : outputs((row.outputs + kCount - 1) / kCount) {
    for (int p = 0; p < kCount; ++p) {
      first[p] = std::min(p * outputs, row.outputs - outputs);
      bytes[p] = first[p] * row.stride * row.pixel_bytes;
    }
  }
};

// The values of a block's channels in the order of the sums, [channel / 4 % 4][channel / 16][channel % 4], once for
// each part.
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
  if (o.floats || !o.codes.data || o.residual || o.residual_codes || !clamps(o.first) || !clamps(o.second))
    return false;
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

// Takes the sums of a row's outputs, one of each part at a time.
template <int Width, bool Direct>
struct RowSink {
  const Parts<Width>& parts;
  const BlockValues& values;
  const CodeRule& rule;
  int64_t channels;
  ConvOutput output;

  QK_INLINE void operator()(int64_t i, const Sums (&sums)[4]) const {
    if constexpr (Direct) {
      store_codes(output.codes.data, output.codes.stride_w, parts, i, channels, rule(sums, values.scale, values.bias));
      return;
    }
    alignas(64) int32_t lanes[kChannels];
    store_lanes(lanes, sums);
    for (int p = 0; p < Parts<Width>::kCount; ++p)
      finish_row(lanes + p * Width, Width, 1, parts.first[p] + i, channels, output);
  }
};

}  // namespace
}  // namespace qkernels::QK_NAMESPACE

#endif
