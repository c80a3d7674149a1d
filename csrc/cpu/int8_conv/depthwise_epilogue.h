// From exact sums to the outputs of a row.
#ifndef QK_DEPTHWISE_EPILOGUE
#define QK_DEPTHWISE_EPILOGUE

#include "cpu/common/activation_kernels.h"
#include "cpu/int8_conv/int8_conv.h"

namespace qkernels::QK_NAMESPACE {
namespace {

inline F32 apply(F32 x, const ActivationStep& step) {
  switch (step.kind) {
    case Activation::none: return x;
    case Activation::clamp: return min(F32::set1(step.high), max(F32::set1(step.low), x));
    case Activation::leaky_relu: {
      const auto positive = between(x, zero<F32>(), F32::set1(std::numeric_limits<float>::infinity()));
      return select(positive, x, x * F32::set1(step.low));
    }
    default: return activate(x, step.kind);
  }
}

// sums[pixels][width] of the outputs from `pixel` on.
inline void finish_row(const int32_t* sums, int64_t width, int64_t pixels, int64_t pixel, int64_t channels,
                       const ConvOutput& o) {
  for (int64_t p = pixel; p < pixel + pixels; ++p, sums += width)
    for (int64_t c = 0; c < channels; c += 16) {
      const int64_t n = std::min<int64_t>(16, channels - c);
      F32 v = F32::load(sums + c, n) * F32::load(o.scale + c, n) * F32::set1(o.in_scale);
      if (o.bias) v = v + F32::load(o.bias + c, n);
      v = apply(v, o.first);
      if (o.residual) v = v + F32::load(o.residual + p * o.residual_w + c, n);
      if (o.residual_codes) {
        const F32 code = F32::load(o.residual_codes + p * o.residual_w + c, n);
        v = v + (code - F32::set1(static_cast<float>(o.residual_q.zero_point + 128))) * F32::set1(o.residual_q.scale);
      }
      v = apply(v, o.second);
      if (o.floats) {
        float values[16];
        v.store(values);
        for (int64_t i = 0; i < n; ++i) o.floats[p * o.floats_w + (c + i) * o.floats_c] = values[i];
      }
      if (o.codes.data) {
        const Quantizer& q = o.codes_q;
        const F32 zero_point = F32::set1(static_cast<float>(q.zero_point));
        const F32 code = min(F32::set1(static_cast<float>(q.high)),
                             max(F32::set1(static_cast<float>(q.low)), round(v * F32::set1(q.inverse)) + zero_point));
        (select(is_nan(code), zero_point, code) + F32::set1(128)).store(o.codes.data + p * o.codes.stride_w + c, n);
      }
    }
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE

#endif
