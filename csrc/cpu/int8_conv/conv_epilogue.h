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
    }
  }
};

// Where the results of a segment lie, at the panel's first channel.
struct SegmentOutput {
  float* floats;
  uint8_t* codes;
  const float* residual;
  const uint8_t* residual_codes;
};

inline F32 activate(F32 v, const ActivationStep& step) { return activate(v, step.kind, step.low, step.high); }

inline F32 to_codes(F32 v, const Quantizer& q) {
  const F32 zero_point = F32::set1(static_cast<float>(q.zero_point));
  const F32 steps = round(v * F32::set1(q.inverse)) + zero_point;
  const F32 code = min(F32::set1(static_cast<float>(q.high)), max(F32::set1(static_cast<float>(q.low)), steps));
  return select(is_nan(code), zero_point, code);
}

inline F32 from_codes(F32 bytes, const Quantizer& q) {
  return (bytes - F32::set1(static_cast<float>(128 + q.zero_point))) * F32::set1(q.scale);
}

// acc - zero_point * colsum where it may leave int32.
inline void exact_floats(const int32_t* sums, const PanelValues& panel, int32_t zero_point, float* v) {
  for (int c = 0; c < kPanel; ++c)
    v[c] = static_cast<float>(sums[c] - static_cast<int64_t>(zero_point) * panel.colsum[c]);
}

// 16 channels of a pixel, or `tail` of them.
template <typename... Tail>
inline void finish_16(F32 v, int64_t at, const PanelValues& panel, const ConvWork& work, const SegmentOutput& out,
                      int64_t pixel, Tail... tail) {
  const ConvOutput& o = *work.output;
  v = v * F32::load(panel.scale + at) * F32::set1(o.in_scale) + F32::load(panel.bias + at);
  v = activate(v, o.first);
  if (out.residual) v = v + F32::load(out.residual + pixel * work.residual.w + at, tail...);
  if (out.residual_codes)
    v = v + from_codes(F32::load(out.residual_codes + pixel * work.residual.w + at, tail...), o.residual_q);
  v = activate(v, o.second);
  if (out.floats && o.floats_c == 1) v.store(out.floats + pixel * work.floats.w + at, tail...);
  if (out.floats && o.floats_c != 1) {
    float lane[16];
    v.store(lane);
    float* to = out.floats + pixel * work.floats.w + at * o.floats_c;
    for (int i = 0; i < lanes_of(tail...); ++i) to[i * o.floats_c] = lane[i];
  }
  if (out.codes) (to_codes(v, o.codes_q) + F32::set1(128)).store(out.codes + pixel * work.codes.w + at, tail...);
}

// sums[pixels][32] of a segment become its outputs.
inline void finish_segment(const int32_t* sums, int64_t pixels, const PanelValues& panel, const ConvWork& work,
                           const SegmentOutput& out) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel, sums += kPanel) {
    float wide[kPanel];
    if (work.wide) exact_floats(sums, panel, work.output->in_zero_point, wide);
    for_each_16(panel.channels, [&](int64_t at, auto... tail) {
      const F32 v = work.wide ? F32::load(wide + at) : F32::load(sums + at);
      finish_16(v, at, panel, work, out, pixel, tail...);
    });
  }
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE

#endif
