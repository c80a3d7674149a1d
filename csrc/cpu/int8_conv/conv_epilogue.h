// From exact sums to floats and codes: scales, bias, activations, residual.
#ifndef QK_CONV_EPILOGUE
#define QK_CONV_EPILOGUE

#include "cpu/common/activation_kernels.h"
#include "cpu/common/vec.h"
#include "cpu/int8_conv/conv_work.h"
#include "cpu/int8_gemm/int8_gemm.h"

namespace qkernels::QK_NAMESPACE {
namespace {

// The values of a panel's channels, padded to its width.
struct PanelValues {
  int64_t first, channels;  // output channels
  bool finite = true;       // scale and bias
  alignas(64) int32_t start[kPanel];
  alignas(64) int32_t colsum[kPanel];
  alignas(64) float scale[kPanel], bias[kPanel];

  PanelValues(const ConvOutput& o, int64_t first_channel, int64_t n, bool wide)
      : first(first_channel), channels(n), start(), colsum(), scale(), bias() {
    const uint32_t offset = 128u + (wide ? 0u : static_cast<uint32_t>(o.in_zero_point));
    for (int64_t c = 0; c < n; ++c) {
      colsum[c] = o.colsum[first + c];
      start[c] = static_cast<int32_t>(0u - offset * static_cast<uint32_t>(colsum[c]));
      scale[c] = o.scale[first + c];
      bias[c] = o.bias ? o.bias[first + c] : -0.0f;  // adding it changes nothing, not even the sign of a zero
      finite = finite && std::isfinite(scale[c]) && std::isfinite(bias[c]);
    }
  }
};

// Codes of results that are finite and whose activation only clamps them, so that it can clamp their codes instead. As
// bytes code + 128.
struct ClampedCodes {
  float in_scale, inverse;
  int16_t zero_point;
  uint8_t low, high;
  uint32_t inside;  // a bit for each channel of the panel
  uint8_t* codes[2];
  int64_t step;
};

// Where the results of a segment lie, at the panel's first channel.
struct SegmentOutput {
  float* floats;
  int64_t floats_step;  // from pixel to pixel
  uint8_t* codes;
  const float* residual;
  const uint8_t* residual_codes;
};

inline F32 activate(F32 v, const ActivationStep& step) { return activate(v, step.kind, step.low, step.high); }

// As bytes code + 128. No code is NaN: a NaN becomes the zero point.
inline F32 to_codes(F32 v, const Quantizer& q) {
  const F32 zero_point = F32::set1(static_cast<float>(q.zero_point + 128));
  const F32 low = F32::set1(static_cast<float>(q.low + 128)), high = F32::set1(static_cast<float>(q.high + 128));
  const F32 code = min(high, max(low, round(v * F32::set1(q.inverse)) + zero_point));
  return select(is_nan(code), zero_point, code);
}

inline F32 from_codes(F32 bytes, const Quantizer& q) {
  return (bytes - F32::set1(static_cast<float>(128 + q.zero_point))) * F32::set1(q.scale);
}

inline bool only_clamps(const ActivationStep& step) {
  return step.kind == Activation::none || step.kind == Activation::relu || step.kind == Activation::clamp;
}

// Whether all results are codes that ClampedCodes describes, as far as the panel's values do not matter.
inline bool has_clamped_codes(const ConvWork& work) {
  const ConvOutput& o = *work.output;
  return o.codes.data && !o.floats && !o.residual && !o.residual_codes && !work.wide && only_clamps(o.first) &&
         only_clamps(o.second) && o.in_scale > 0 && std::isfinite(o.in_scale) && o.codes_q.inverse > 0 &&
         std::isfinite(o.codes_q.inverse);
}

inline uint8_t byte_of(float v, const ConvOutput& o) {
  float lane[16];
  to_codes(activate(activate(F32::set1(v), o.first), o.second), o.codes_q).store(lane);
  return static_cast<uint8_t>(lane[0]);
}

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
          work.step.codes};
}

// acc - zero_point * colsum where it may leave int32.
inline void exact_floats(const int32_t* sums, const PanelValues& panel, int32_t zero_point, float* v) {
  for (int c = 0; c < kPanel; ++c)
    v[c] = static_cast<float>(sums[c] - static_cast<int64_t>(zero_point) * panel.colsum[c]);
}

// none, relu and clamp as the clamp that they are: a NaN and the sign of a zero stay.
struct Clamp {
  F32 low, high;

  explicit Clamp(const ActivationStep& step) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const bool clamp = step.kind == Activation::clamp;
    low = F32::set1(clamp ? step.low : step.kind == Activation::relu ? 0 : -kInfinity);
    high = F32::set1(clamp ? step.high : kInfinity);
  }
  F32 operator()(F32 v) const { return min(high, max(low, v)); }
};

enum class Residual { none, floats, codes };

// sums[pixels][32] of a segment become its outputs.
template <Residual kResidual, bool kFloats, bool kCodes, bool kClamps>
void finish_segment(const int32_t* sums, int64_t pixels, const PanelValues& panel, const ConvWork& work,
                    const SegmentOutput& out) {
  const ConvOutput& o = *work.output;
  const F32 in_scale = F32::set1(o.in_scale);
  const Clamp first(o.first), second(o.second);
  for (int64_t pixel = 0; pixel < pixels; ++pixel, sums += kPanel) {
    float wide[kPanel];
    if (work.wide) exact_floats(sums, panel, o.in_zero_point, wide);
    for_each_16(panel.channels, [&](int64_t at, auto... tail) QK_INLINE {
      F32 v = work.wide ? F32::load(wide + at) : F32::load(sums + at);
      v = v * F32::load(panel.scale + at) * in_scale + F32::load(panel.bias + at);
      v = kClamps ? first(v) : activate(v, o.first);
      if constexpr (kResidual == Residual::floats)
        v = v + F32::load(out.residual + pixel * work.step.residual + at, tail...);
      if constexpr (kResidual == Residual::codes)
        v = v + from_codes(F32::load(out.residual_codes + pixel * work.step.residual + at, tail...), o.residual_q);
      v = kClamps ? second(v) : activate(v, o.second);
      if constexpr (kFloats) v.store(out.floats + pixel * out.floats_step + at, tail...);
      if constexpr (kCodes) to_codes(v, o.codes_q).store(out.codes + pixel * work.step.codes + at, tail...);
    });
  }
}

using Finish = void (*)(const int32_t*, int64_t, const PanelValues&, const ConvWork&, const SegmentOutput&);

template <Residual kResidual, bool kClamps>
Finish finish_of(const ConvOutput& o) {
  if (!o.codes.data) return finish_segment<kResidual, true, false, kClamps>;
  return o.floats ? finish_segment<kResidual, true, true, kClamps> : finish_segment<kResidual, false, true, kClamps>;
}

inline Finish finish_of(const ConvOutput& o) {
  const bool clamps = only_clamps(o.first) && only_clamps(o.second);
  if (o.residual) return clamps ? finish_of<Residual::floats, true>(o) : finish_of<Residual::floats, false>(o);
  if (o.residual_codes) return clamps ? finish_of<Residual::codes, true>(o) : finish_of<Residual::codes, false>(o);
  return clamps ? finish_of<Residual::none, true>(o) : finish_of<Residual::none, false>(o);
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE

#endif
