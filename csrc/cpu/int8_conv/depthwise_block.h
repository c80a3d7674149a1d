// What the vector kernels know of a block of channels, and what they do with its sums.
#ifndef QK_DEPTHWISE_BLOCK
#define QK_DEPTHWISE_BLOCK

#include "cpu/int8_conv/depthwise_output.h"
#include "cpu/int8_conv/depthwise_vectors.h"

#if QK_PATH != QK_PATH_SCALAR
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

// The values of a block's channels in the order of the sums too, [channel / 4 % 4][channel / 16][channel % 4], once for
// each part.
template <int Width>
struct BlockValues : ChannelValues {
  bool finite = true;
  alignas(64) int32_t sums_start[kChannels];
  alignas(64) float sums_scale[kChannels], sums_bias[kChannels];

  BlockValues(const ConvOutput& o, int64_t n) : ChannelValues(o, n) {
    for (int64_t c = 0; c < n; ++c) finite = finite && std::isfinite(scale[c]) && std::isfinite(bias[c]);
    permute(start, sums_start);
    permute(scale, sums_scale);
    permute(bias, sums_bias);
  }

 private:
  template <typename T>
  static void permute(const T* values, T* in_order_of_sums) {
    for (int q = 0; q < 4; ++q)
      for (int lane = 0; lane < kLanes; ++lane)
        std::memcpy(in_order_of_sums + (q * kLanes + lane) * 4, values + lane % (Width / 16) * 16 + q * 4, 16);
  }
};

// memcpy of n bytes, at most Most, for which a call would take longer.
template <int Most>
inline void copy_bytes(uint8_t* to, const uint8_t* from, int64_t n) {
  if constexpr (Most > 1) {
    constexpr int kHalf = Most / 2;
    if (n < kHalf) return copy_bytes<kHalf>(to, from, n);
    // Two copies that may overlap.
    std::memcpy(to, from, kHalf);
    std::memcpy(to + n - kHalf, from + n - kHalf, kHalf);
  } else if (n) {
    *to = *from;
  }
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
    copy_bytes<Width>(to + (parts.first[p] + output) * pixel_step, bytes + p * Width, channels);
}

// Takes the sums of a row's outputs, one of each part at a time, and makes codes of them without leaving registers.
template <int Width>
struct CodeSink {
  const Parts<Width>& parts;
  const BlockValues<Width>& values;
  const CodeRule& rule;
  ConvOutput output;

  QK_INLINE void operator()(int64_t i, const Sums (&sums)[4]) {
    store_codes(output.codes.data, output.codes.stride_w, parts, i, values.channels,
                rule(sums, values.sums_scale, values.sums_bias));
  }
};

// The same for floats with the channels innermost.
template <int Width>
struct FloatSink {
  using Finish = Epilogue<Residual::none, true, false, true>;

  const Parts<Width>& parts;
  const BlockValues<Width>& values;
  const ConvOutput output;
  const PixelResults results;
  const Finish finish;

  FloatSink(const Parts<Width>& row_parts, const BlockValues<Width>& block_values, const CodeRule&, const ConvOutput& o)
      : parts(row_parts),
        values(block_values),
        output(o),
        results{o.floats, nullptr, nullptr, nullptr, o.floats_w, 0, 0},
        finish(output, results) {}

  static bool fits(const ConvOutput& o) {
    return o.floats && o.floats_c == 1 && !o.codes.data && !o.residual && !o.residual_codes && only_clamps(o.first) &&
           only_clamps(o.second);
  }

  QK_INLINE void operator()(int64_t i, const Sums (&sums)[4]) {
    Sums lanes[4];
    to_lanes(sums, lanes);
#pragma GCC unroll 4
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t pixel = parts.first[lane * 16 / Width] + i, at = lane * 16 % Width, left = values.channels - at;
      const F32 v = floats_of_lane(lanes, lane);
      if (left >= 16)
        finish(v, values.scale, values.bias, pixel, at);
      else if (left > 0)
        finish(v, values.scale, values.bias, pixel, at, left);
    }
  }
};

// The same for all other kinds of output.
template <int Width>
struct GeneralSink {
  const Parts<Width>& parts;
  const BlockValues<Width>& values;
  const CodeRule& rule;
  ConvOutput output;
  alignas(64) int32_t waiting[kMostPixels * kChannels];

  void operator()(int64_t i, const Sums (&sums)[4]) {
    const int64_t at = i % kMostPixels, first = i - at;
    Sums lanes[4];
    to_lanes(sums, lanes);
    for (int v = 0; v < 4; ++v) store(waiting + at * kChannels + v * kLanes * 4, lanes[v]);
    if (at + 1 < kMostPixels && i + 1 < parts.outputs) return;
    for (int p = 0; p < Parts<Width>::kCount; ++p)
      finish_pixels(waiting + p * Width, kChannels, parts.first[p] + first, at + 1, values, output);
  }
};

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
#endif

#endif
