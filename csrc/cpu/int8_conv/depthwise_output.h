// From sums of neighbouring outputs to floats, or to codes by way of floats.
#ifndef QK_DEPTHWISE_OUTPUT
#define QK_DEPTHWISE_OUTPUT

#include "cpu/int8_conv/conv_transpose.h"
#include "cpu/int8_conv/depthwise_layout.h"
#include "cpu/int8_conv/epilogue.h"

namespace qkernels::QK_NAMESPACE {
namespace {

constexpr int64_t kMostPixels = 8;  // of one call

struct ChannelValues {
  int64_t channels;
  alignas(64) int32_t start[kBlockChannels] = {};
  alignas(64) float scale[kBlockChannels] = {}, bias[kBlockChannels] = {};

  ChannelValues(const ConvOutput& o, int64_t n) : channels(n) {
    for (int64_t c = 0; c < n; ++c) {
      start[c] = -(o.in_zero_point + 128) * o.colsum[c];
      scale[c] = o.scale[c];
      bias[c] = o.bias ? o.bias[c] : -0.0f;  // adding it changes nothing, not even the sign of a zero
    }
  }
};

struct FinishPixels {
  template <typename E>
  static void run(const int32_t* sums, int64_t step, int64_t pixels, const ChannelValues& values, const ConvOutput& o,
                  const PixelResults& results) {
    const E finish(o, results);
    for (int64_t p = 0; p < pixels; ++p, sums += step)
      for_each_16(values.channels, [&](int64_t c, auto... tail) QK_INLINE {
        finish(F32::load(sums + c), values.scale, values.bias, p, c, tail...);
      });
  }
};

// sums are `step` from pixel to pixel; o is that of a row.
inline void finish_pixels(const int32_t* sums, int64_t step, int64_t first, int64_t pixels, const ChannelValues& values,
                          const ConvOutput& o) {
  const auto run = run_of<FinishPixels>(o);
  const int64_t residual = first * o.residual_w;
  float* const floats = o.floats ? o.floats + first * o.floats_w : nullptr;
  PixelResults results = {floats,
                          o.codes.data ? o.codes.data + first * o.codes.stride_w : nullptr,
                          o.residual ? o.residual + residual : nullptr,
                          o.residual_codes ? o.residual_codes + residual : nullptr,
                          o.floats_w,
                          o.codes.stride_w,
                          o.residual_w};
  if (!floats || o.floats_c == 1) return run(sums, step, pixels, values, o, results);
  alignas(64) float by_pixel[kMostPixels * kBlockChannels];
  results.floats = by_pixel;
  results.floats_step = kBlockChannels;
  run(sums, step, pixels, values, o, results);
  store_by_channel(by_pixel, kBlockChannels, pixels, values.channels, floats, o.floats_c, o.floats_w);
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE

#endif
