// The epilogue of a panel.
#ifndef QK_CONV_EPILOGUE
#define QK_CONV_EPILOGUE

#include "cpu/int8_conv/conv_work.h"
#include "cpu/int8_conv/epilogue.h"
#include "cpu/int8_gemm/int8_gemm.h"

namespace qkernels::QK_NAMESPACE {
namespace {

constexpr float kMostSteps = 1e9f;  // of a quantizer: more might not fit into int32, and mean the highest code too

// The values of a panel's channels, padded to its width.
struct PanelValues {
  int64_t first, channels;  // output channels
  bool bounded = true;      // no result without a residual, nor one with codes of it, has more steps than kMostSteps
  alignas(64) int32_t start[kPanel];
  alignas(64) int32_t colsum[kPanel];
  alignas(64) float scale[kPanel], bias[kPanel];

  PanelValues(const ConvWork& work, int64_t first_channel, int64_t n)
      : first(first_channel), channels(n), start(), colsum(), scale(), bias() {
    const ConvOutput& o = *work.output;
    const float most_sum = 255.0f * 128.0f * static_cast<float>(work.panel_bytes / kPanel);  // of K products
    const float added = o.residual_codes ? 255 * std::abs(o.residual_q.scale) : 0;
    const uint32_t offset = 128u + (work.wide ? 0u : static_cast<uint32_t>(o.in_zero_point));
    for (int64_t c = 0; c < n; ++c) {
      colsum[c] = o.colsum[first + c];
      start[c] = static_cast<int32_t>(0u - offset * static_cast<uint32_t>(colsum[c]));
      scale[c] = o.scale[first + c];
      bias[c] = o.bias ? o.bias[first + c] : -0.0f;  // adding it changes nothing, not even the sign of a zero
      const float most = most_sum * std::abs(scale[c]) * o.in_scale + std::abs(bias[c]) + added;
      bounded = bounded && most * o.codes_q.inverse <= kMostSteps;  // false for NaN
    }
  }

  uint32_t inside() const { return channels == kPanel ? ~0u : (1u << channels) - 1; }  // a bit for each channel
};

// Codes of results that are bounded and whose activation only clamps them, so that it can clamp their codes instead. As
// bytes code + 128.
struct ClampedCodes {
  float in_scale, inverse;
  int16_t zero_point;
  uint8_t low, high;
  uint32_t inside;  // a bit for each channel of the panel
  uint8_t* codes[2];
  int64_t step;
  float residual_scale, residual_zero;
  const uint8_t* residual[2];  // its codes, or null
  int64_t residual_step;
};

inline bool has_clamped_codes(const ConvWork& work) { return !work.wide && gives_clamped_codes(*work.output, true); }

inline ClampedCodes clamped_codes(const ConvWork& work) {
  const ConvOutput& o = *work.output;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  return {o.in_scale,
          o.codes_q.inverse,
          static_cast<int16_t>(o.codes_q.zero_point + 128),
          byte_of(-kInfinity, o),
          byte_of(kInfinity, o),
          0,
          {},
          work.step.codes,
          o.residual_q.scale,
          static_cast<float>(128 + o.residual_q.zero_point),
          {},
          work.step.residual};
}

// Results that are floats with channels side by side, or codes of what a residual of floats is added to, and whose
// activations only clamp them: `low` and `high` are those of all activations.
struct TileFloats {
  float in_scale, inverse, low, high;
  int16_t zero_point;  // codes are bytes code + 128
  uint8_t code_low, code_high;
  uint32_t inside;  // a bit for each channel of the panel
  float* floats[2];
  const float* residual[2];
  uint8_t* codes[2];
  int64_t floats_step, residual_step, codes_step;
};

inline bool has_tile_floats(const ConvWork& work) {
  const ConvOutput& o = *work.output;
  const bool results = o.floats ? o.floats_c == 1 : o.residual != nullptr;
  const bool clamps =
      only_clamps(o.first) && only_clamps(o.second) && !(o.residual && o.first.kind != Activation::none);
  return results && clamps && !o.residual_codes && !work.wide;
}

inline TileFloats tile_floats(const ConvWork& work) {
  const ConvOutput& o = *work.output;
  float low[16], high[16];
  const Clamp clamp(o.first, o.second);
  clamp.low.store(low);
  clamp.high.store(high);
  const Quantizer& q = o.codes_q;
  return {o.in_scale,
          q.inverse,
          low[0],
          high[0],
          static_cast<int16_t>(q.zero_point + 128),
          static_cast<uint8_t>(q.low + 128),
          static_cast<uint8_t>(q.high + 128),
          0,
          {},
          {},
          {},
          work.step.floats,
          work.step.residual,
          work.step.codes};
}

// acc - zero_point * colsum where it may leave int32.
inline void exact_floats(const int32_t* sums, const PanelValues& panel, int32_t zero_point, float* v) {
  for (int c = 0; c < kPanel; ++c)
    v[c] = static_cast<float>(sums[c] - static_cast<int64_t>(zero_point) * panel.colsum[c]);
}

// sums[pixels][32] of a segment become its outputs.
using Finish = void (*)(const int32_t*, int64_t, const PanelValues&, const ConvWork&, const PixelResults&);

struct FinishSegment {
  template <typename E>
  static void run(const int32_t* sums, int64_t pixels, const PanelValues& panel, const ConvWork& work,
                  const PixelResults& results) {
    const E finish(*work.output, results);
    for (int64_t pixel = 0; pixel < pixels; ++pixel, sums += kPanel) {
      float wide[kPanel];
      if (work.wide) exact_floats(sums, panel, work.output->in_zero_point, wide);
      for_each_16(panel.channels, [&](int64_t at, auto... tail) QK_INLINE {
        finish(work.wide ? F32::load(wide + at) : F32::load(sums + at), panel.scale, panel.bias, pixel, at, tail...);
      });
    }
  }
};

}  // namespace
}  // namespace qkernels::QK_NAMESPACE

#endif
