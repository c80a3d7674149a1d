// The straight-through kernels, compiled once per path by foreach_isa.h: LSQ's sums with other terms.
#include "cpu/fake_quantize_kernels.h"

template <typename V>
struct PassTerms {
  LearnedTerms<V> learned;
  PassTerms along(int64_t, int64_t) const { return *this; }
  void operator()(int64_t i, V dy, V value, V inv, V scale, V z, const Bounds<V>& b, V& dx, V& dscale,
                  V& dzero_point) const {
    learned(i, dy, value, inv, scale, z, b, dx, dscale, dzero_point);
    dx = dy;
  }
};

// Clipped is what lies below the range before rounding, or at its upper end or above: alpha <= x in the paper.
template <typename V>
struct PactTerms {
  PactTerms along(int64_t, int64_t) const { return *this; }
  void operator()(int64_t, V dy, V value, V inv, V scale, V z, const Bounds<V>& b, V& dx, V& dscale,
                  V& dzero_point) const {
    using T = typename V::Scalar;
    const V steps = value * inv, bottom = b.low - z, top = b.high - z;
    const auto at_top = inside(steps, top, V::set1(static_cast<T>(INFINITY)));
    const auto in = inside(select(at_top, V::set1(static_cast<T>(NAN)), steps), bottom, top);
    dx = select(in, dy, zero<V>());
    dscale = select(in, zero<V>(), dy * (min(b.high, max(b.low, round(steps) + z)) - z));
    dzero_point = select(in, zero<V>(), (zero<V>() - dy) * scale);
  }
};

// d is delta with dy's sign: the gradient of rounding is 1 + d·(steps − rounded), and the scale's follows from it. The
// paper clips before it rounds.
template <typename V>
struct EwgsTerms {
  typename V::Scalar delta;
  LearnedTerms<V, Inside::closed> learned = {};
  EwgsTerms along(int64_t, int64_t) const { return *this; }
  void operator()(int64_t i, V dy, V value, V inv, V scale, V z, const Bounds<V>& b, V& dx, V& dscale,
                  V& dzero_point) const {
    learned(i, dy, value, inv, scale, z, b, dx, dscale, dzero_point);
    const V one = V::set1(1), infinity = V::set1(static_cast<typename V::Scalar>(INFINITY));
    const V steps = value * inv, rounded = round(steps);
    const auto in = inside(steps, b.low - z, b.high - z);
    const V d = select(inside(dy, zero<V>(), infinity), V::set1(delta), V::set1(-delta));
    dx = select(in, dy * (one + d * (steps - rounded)), zero<V>());
    dscale = dscale * select(in, one + d * steps, one);
  }
};

template <typename S>
void pass_backward(const View& view, const Quantizer<Arithmetic<S>>& quantizer, int64_t numel, const S* grad,
                   const S* x, S* dx, double grad_factor, double* dscale, double* dzero_point) {
  using Terms = PassTerms<typename VecOf<S>::type>;
  reduce_channels(view, numel, LearnableOp<S, Terms>{quantizer, view, grad, x, dx, grad_factor, dscale, dzero_point});
}

template <typename S>
void pact_backward(const View& view, const Quantizer<Arithmetic<S>>& quantizer, int64_t numel, const S* grad,
                   const S* x, S* dx, double grad_factor, double* dscale, double* dzero_point) {
  using Terms = PactTerms<typename VecOf<S>::type>;
  reduce_channels(view, numel, LearnableOp<S, Terms>{quantizer, view, grad, x, dx, grad_factor, dscale, dzero_point});
}

template <typename S>
void ewgs_backward(const View& view, const Quantizer<Arithmetic<S>>& quantizer, int64_t numel, const S* grad,
                   const S* x, S* dx, double delta, double grad_factor, double* dscale, double* dzero_point) {
  using Terms = EwgsTerms<typename VecOf<S>::type>;
  const Terms terms{static_cast<Arithmetic<S>>(delta)};
  reduce_channels(view, numel,
                  LearnableOp<S, Terms>{quantizer, view, grad, x, dx, grad_factor, dscale, dzero_point, terms});
}
