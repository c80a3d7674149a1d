// ReLU fused with fake quantization.
#include "cpu/fake_quantize_learnable_kernels.h"

namespace qkernels::QK_NAMESPACE {

template <typename V>
inline V rectified(V v) {  // a NaN stays
  return max(zero<V>(), v);
}

template <typename V>
inline typename V::Mask is_off(V v) {  // where ReLU gives 0, and no gradient
  return inside(v, V::set1(static_cast<typename V::Scalar>(-INFINITY)), zero<V>());
}

// Where the gradient of v passes. `steps` and q are those of the rectified v.
template <bool kLsq, typename V>
inline typename V::Mask passes(V v, V steps, V q, V z, const Bounds<V>& b) {
  const V nan = V::set1(static_cast<typename V::Scalar>(NAN));
  const auto off = is_off(v);
  return counts_inside<inside_of(kLsq)>(select(off, nan, steps), select(off, nan, q), z, b);
}

template <bool kMask, bool kLsq = false, typename S>
void relu_forward(const IndexedRuns& runs, const Qparams<Arithmetic<S>>& qparams, int64_t numel, const S* x, S* y,
                  uint8_t* mask) {
  using V = typename VecOf<S>::type;
  const Bounds<V> b(qparams);
  for_each_stretch<V>(runs, qparams, numel, [&](int64_t at, int64_t n, const auto& p) {
    BitWriter bits(mask, at);
    for_each_16(n, [&](int64_t i, auto... tail) {
      const V v = V::load(x + at + i, tail...), z = p.zero_point(i, tail...);
      const V steps = rectified(v) * p.inv(i, tail...), q = round(steps) + z;
      if constexpr (kMask) bits.add(bits_of(passes<kLsq>(v, steps, q, z, b).bits(), tail...), lanes_of(tail...));
      ((min(b.high, max(b.low, q)) - z) * p.scale(i, tail...)).store(y + at + i, tail...);
    });
    if constexpr (kMask) bits.finish();
  });
}

template <bool kLsq, typename S>
void relu_forward_mask(const IndexedRuns& runs, const Qparams<Arithmetic<S>>& qparams, int64_t numel, const S* x, S* y,
                       uint8_t* mask) {
  relu_forward<true, kLsq>(runs, qparams, numel, x, y, mask);
}

template <bool kLsq = false, typename S>
void relu_backward(const IndexedRuns& runs, const Qparams<Arithmetic<S>>& qparams, int64_t numel, const S* grad,
                   const S* x, S* dx) {
  using V = typename VecOf<S>::type;
  const Bounds<V> b(qparams);
  for_each_stretch<V>(runs, qparams, numel, [&](int64_t at, int64_t n, const auto& p) {
    for_each_16(n, [&](int64_t i, auto... tail) {
      const V v = V::load(x + at + i, tail...), z = p.zero_point(i, tail...);
      const V steps = rectified(v) * p.inv(i, tail...);
      select(passes<kLsq>(v, steps, round(steps) + z, z, b), V::load(grad + at + i, tail...), zero<V>())
          .store(dx + at + i, tail...);
    });
  });
}

template <typename V, Inside kInside>
struct ReluTerms {
  LearnedTerms<V, kInside> learned;
  ReluTerms along(int64_t, int64_t) const { return *this; }
  void operator()(int64_t i, V dy, V value, V inv, V scale, V z, const Bounds<V>& b, V& dx, V& dscale,
                  V& dzero_point) const {
    learned(i, dy, rectified(value), inv, scale, z, b, dx, dscale, dzero_point);
    dx = select(is_off(value), zero<V>(), dx);
  }
};

template <bool kLsq = false, typename S>
void relu_learnable_backward(const IndexedRuns& runs, const Qparams<Arithmetic<S>>& qparams, int64_t numel,
                             const S* grad, const S* x, S* dx, double grad_factor, double* dscale,
                             double* dzero_point) {
  using Terms = ReluTerms<typename VecOf<S>::type, inside_of(kLsq)>;
  reduce_channels(runs, numel, LearnableOp<S, Terms>{qparams, runs, grad, x, dx, grad_factor, dscale, dzero_point});
}

}  // namespace qkernels::QK_NAMESPACE
