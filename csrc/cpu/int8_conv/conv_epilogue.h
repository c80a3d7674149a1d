// The epilogue of a panel.
#ifndef QK_CONV_EPILOGUE
#define QK_CONV_EPILOGUE

#include "cpu/int8_conv/conv_work.h"
#include "cpu/int8_conv/epilogue.h"
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
  // If `residual` is not null, results are first clamped, and then its codes are added.
  float first_low, first_high, residual_scale, residual_zero;
  const uint8_t* residual[2];
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
          low_of(o.first),
          high_of(o.first),
          o.residual_q.scale,
          static_cast<float>(128 + o.residual_q.zero_point),
          {},
          work.step.residual};
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
