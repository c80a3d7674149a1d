// From exact sums to floats and codes, 16 channels of a pixel at a time: scales, bias, activations, residual. What
// ConvOutput says, in its order.
#ifndef QK_CONV_OUTPUT
#define QK_CONV_OUTPUT

#include "cpu/common/activation_kernels.h"
#include "cpu/int8_conv/codes.h"

namespace qkernels::QK_NAMESPACE {
namespace {

inline F32 activate(F32 v, const ActivationStep& step) { return activate(v, step.kind, step.low, step.high); }

inline bool only_clamps(const ActivationStep& step) {
  return step.kind == Activation::none || step.kind == Activation::relu || step.kind == Activation::clamp;
}

// Whether results are codes alone and activations only bound them. Then codes can be bounded instead, because rounding
// keeps order; byte_of of -infinity and infinity gives the bounds. If scale and bias are finite too, nothing is NaN.
// Only some callers take a residual of codes; it must not be added to what an activation has bounded.
inline bool gives_clamped_codes(const ConvOutput& o, bool with_residual = false) {
  const bool fits = !o.residual_codes || (with_residual && o.first.kind == Activation::none);
  return o.codes.data && !o.floats && !o.residual && fits && only_clamps(o.first) && only_clamps(o.second) &&
         o.in_scale > 0 && std::isfinite(o.in_scale) && o.codes_q.inverse > 0 && std::isfinite(o.codes_q.inverse);
}

inline uint8_t byte_of(float v, const ConvOutput& o) {
  float lane[16];
  ToCodes(o.codes_q)(activate(activate(F32::set1(v), o.first), o.second)).store(lane);
  return static_cast<uint8_t>(lane[0]);
}

// none, relu and clamp as the clamp that they are: a NaN and the sign of a zero stay.
inline float low_of(const ActivationStep& step) {
  if (step.kind == Activation::clamp) return step.low;
  return step.kind == Activation::relu ? 0 : -std::numeric_limits<float>::infinity();
}
inline float high_of(const ActivationStep& step) {
  return step.kind == Activation::clamp ? step.high : std::numeric_limits<float>::infinity();
}
struct Clamp {
  bool any;  // most layers of floats have none, which is then a branch that is always foreseen
  F32 low, high;

  explicit Clamp(const ActivationStep& step)
      : any(step.kind != Activation::none), low(F32::set1(low_of(step))), high(F32::set1(high_of(step))) {}
  // One after the other.
  Clamp(const ActivationStep& first, const ActivationStep& second)
      : any(first.kind != Activation::none || second.kind != Activation::none),
        low(F32::set1(clamped(low_of(first), second))),
        high(F32::set1(clamped(high_of(first), second))) {}

  F32 operator()(F32 v) const { return any ? min(high, max(low, v)) : v; }

 private:
  static float clamped(float bound, const ActivationStep& step) {
    return std::min(std::max(bound, low_of(step)), high_of(step));
  }
};

enum class Residual { none, floats, codes };

// Where the results of neighbouring pixels lie, at the first of their channels.
struct PixelResults {
  float* floats;
  uint8_t* codes;
  const float* residual;
  const uint8_t* residual_codes;
  int64_t floats_step, codes_step, residual_step;  // from pixel to pixel
};

template <Residual kResidual, bool kFloats, bool kCodes, bool kClamps>
class Epilogue {
 public:
  Epilogue(const ConvOutput& o, const PixelResults& results)
      : o_(o),
        to_(results),
        in_scale_(F32::set1(o.in_scale)),
        first_(kResidual == Residual::none ? Clamp(o.first, o.second) : Clamp(o.first)),
        second_(o.second),
        from_codes_(o.residual_q),
        to_codes_(o.codes_q) {}

  // v: the sums of 16 channels from `at` on, or of `tail` channels.
  template <typename... Tail>
  QK_INLINE void operator()(F32 v, const float* scale, const float* bias, int64_t pixel, int64_t at,
                            Tail... tail) const {
    v = v * F32::load(scale + at) * in_scale_ + F32::load(bias + at);
    v = kClamps ? first_(v) : activate(v, o_.first);
    if constexpr (kResidual == Residual::floats)
      v = v + F32::load(to_.residual + pixel * to_.residual_step + at, tail...);
    if constexpr (kResidual == Residual::codes)
      v = v + from_codes_(F32::load(to_.residual_codes + pixel * to_.residual_step + at, tail...));
    if constexpr (!kClamps || kResidual != Residual::none) v = kClamps ? second_(v) : activate(v, o_.second);
    if constexpr (kFloats) v.store(to_.floats + pixel * to_.floats_step + at, tail...);
    if constexpr (kCodes) to_codes_(v).store(to_.codes + pixel * to_.codes_step + at, tail...);
  }

 private:
  const ConvOutput& o_;
  const PixelResults& to_;
  F32 in_scale_;
  Clamp first_, second_;
  FromCodes from_codes_;
  ToCodes to_codes_;
};

// F::run<Epilogue<…>>, for the Finish that does what the output asks for.
template <typename F, Residual kResidual, bool kClamps>
auto run_of(const ConvOutput& o) {
  if (!o.codes.data) return &F::template run<Epilogue<kResidual, true, false, kClamps>>;
  return o.floats ? &F::template run<Epilogue<kResidual, true, true, kClamps>>
                  : &F::template run<Epilogue<kResidual, false, true, kClamps>>;
}

template <typename F>
auto run_of(const ConvOutput& o) {
  const bool clamps = only_clamps(o.first) && only_clamps(o.second);
  if (o.residual) return clamps ? run_of<F, Residual::floats, true>(o) : run_of<F, Residual::floats, false>(o);
  if (o.residual_codes) return clamps ? run_of<F, Residual::codes, true>(o) : run_of<F, Residual::codes, false>(o);
  return clamps ? run_of<F, Residual::none, true>(o) : run_of<F, Residual::none, false>(o);
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE

#endif
